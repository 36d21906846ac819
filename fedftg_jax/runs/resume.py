"""Where a stopped run goes on: its checkpoints, and the rows up to them."""

from collections.abc import Iterator, Sequence
import contextlib
import hashlib
import pathlib
import re
import signal
import tempfile
import threading
from typing import Any

import jax
import numpy as np
from upath import UPath

from fedftg_jax import checkpoint
from fedftg_jax.base import PyTree
from fedftg_jax.configuration import assembly
from fedftg_jax.system import cli, devices, files, progress

FOLDER = 'checkpoints'  # in a run's folder
_WHOLE = 'whole'  # the last file of a checkpoint in a store without rename
_ROUND = re.compile('0|[1-9][0-9]*')
_REFUSED = '.refused'  # behind the name of a checkpoint that cannot be used


def is_due(done: int, config: dict[str, Any], every: int) -> bool:
  """Whether a checkpoint belongs after `done` rounds.

  Always at the end of a whole chunk of rounds, so that a run which goes on cuts
  the remaining rounds into the same chunks: every `every` rounds, rounded up to
  whole chunks, and after the last.
  """
  chunk = config['eval_every']
  if not every or done % chunk:
    return False
  return done % (-(-every // chunk) * chunk) == 0 or done == config['rounds']


def save(
  folder: UPath,
  experiment: assembly.Experiment,
  seed: int,
  done: int,
  state: PyTree,
  keep: int,
) -> None:
  """Writes the checkpoint after `done` rounds of one seed's run."""
  state = jax.device_get(state)
  if not devices.is_first():
    return
  note = _note(experiment, seed, done)
  if files.is_local(folder):
    checkpoint.save(folder / FOLDER, done, state, note, keep)  # type: ignore[arg-type]
    return
  with tempfile.TemporaryDirectory() as here:  # a store gets whole files
    checkpoint.save(here, done, state, note)
    files.upload(pathlib.Path(here, str(done)), folder / FOLDER / str(done))
    files.write_text(folder / FOLDER / str(done) / _WHOLE, '')
  for old in [r for r in _rounds(folder) if r <= done][:-keep]:
    files.remove(folder / FOLDER / str(old))


def _rounds(folder):
  """The rounds of which a run has checkpoints, ascending."""
  there = sorted(
    int(n) for n in files.names(folder / FOLDER) if _ROUND.fullmatch(n)
  )
  return [
    done
    for done in there
    if files.is_local(folder) or (folder / FOLDER / str(done) / _WHOLE).exists()
  ]


def newest(
  workdirs: Sequence[UPath],
  experiment: assembly.Experiment,
  seeds: Sequence[int],
  states: Sequence[PyTree],
) -> tuple[int, list[PyTree]]:
  """The latest round from which all of some runs can go on.

  Args:
    workdirs: one per run.
    experiment: what they run.
    seeds: one per run.
    states: how each run begins, without a round done.

  Returns:
    Rounds done, and the states then. A checkpoint that cannot be used is named
    on the screen and renamed, and the one before it tried; 0 where there is
    none.

  Raises:
    cli.UsageError: if there are checkpoints, but of more rounds than are asked
      for alone.
  """
  candidates = set.intersection(*(set(_rounds(folder)) for folder in workdirs))
  asked = experiment.config['rounds']
  if candidates and min(candidates) > asked:
    raise cli.UsageError(
      'rounds',
      asked,
      f'{workdirs[0] / FOLDER} goes on from round '
      f'{max(candidates)}; must be at least that, or choose another folder',
    )
  for done in sorted(candidates, reverse=True):
    if done > asked:
      continue
    states_then = []
    for run in zip(workdirs, seeds, states):
      try:
        states_then.append(_restore(*run, experiment, done))
      except checkpoint.Refused as error:
        _set_aside(run[0], done, str(error))
        break
    else:
      return done, states_then
  return 0, list(states)


def _set_aside(folder, done, why) -> None:
  """Names a checkpoint that cannot be used, and renames it."""
  place = folder / FOLDER / str(done)
  aside = place.with_name(place.name + _REFUSED)
  if aside.exists():
    files.remove(aside)
  if files.is_local(place):
    place.rename(aside)
  else:
    (place / _WHOLE).unlink(missing_ok=True)
  progress.say(f'{why}; it is left out')


def _restore(folder, seed, state, experiment, done):
  try:
    rows = files.read_jsonl(folder / 'metrics.jsonl')
  except (FileNotFoundError, ValueError) as error:  # others may pass by
    raise checkpoint.Refused(
      f'{folder / FOLDER}/{done}: its metrics.jsonl cannot be read'
    ) from error
  if done not in [row.get('round') for row in rows if isinstance(row, dict)]:
    raise checkpoint.Refused(
      f'{folder / FOLDER}/{done}: its metrics.jsonl does not reach that round'
    )
  note = _note(experiment, seed, done)
  if files.is_local(folder):
    return checkpoint.restore(folder / FOLDER, done, state, note)
  with tempfile.TemporaryDirectory() as here:
    files.download(folder / FOLDER / str(done), pathlib.Path(here, str(done)))
    return checkpoint.restore(here, done, state, note)


def _note(experiment, seed, done):
  """By what a run knows its checkpoints: configuration, files, who was in."""
  digest = hashlib.sha256()
  rows = experiment.schedule
  arrays = list(experiment.parts)
  for t in range(done):  # without padding, whose width depends on later rounds
    selected = rows.client_id[t] < len(experiment.parts)
    arrays += [
      a[t][selected] for a in (rows.client_id, rows.arrived, rows.num_steps)
    ]
  for array in arrays:
    digest.update(np.array([len(array), *array], np.int64))
  identity = {**experiment.config, **experiment.contents, 'seed': seed}
  del identity['rounds']
  return {**identity, 'partition and schedule': digest.hexdigest()}


@contextlib.contextmanager
def listening() -> Iterator[threading.Event]:
  """An event that is set when the process is asked to end (SIGTERM).

  A second signal ends it at once, as does every signal outside of this.
  """
  asked = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield asked  # signals are the main thread's
    return

  def take(number, frame):
    del frame
    asked.set()
    signal.signal(number, before)

  before = signal.signal(signal.SIGTERM, take)
  try:
    yield asked
  finally:
    signal.signal(signal.SIGTERM, before)
