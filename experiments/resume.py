"""Where a stopped run goes on: its checkpoints, and the rows up to them."""

import contextlib
import hashlib
import pathlib
import signal
import tempfile
import threading
from typing import Any, Iterator, Sequence

import jax
import numpy as np
from upath import UPath

from experiments import assembly
from experiments import devices
from experiments import files
from experiments import folders
from experiments import progress
from fedftg_jax import checkpoint
from fedftg_jax.base import PyTree

FOLDER = 'checkpoints'  # in a run's folder


def is_due(done: int, config: dict[str, Any], every: int) -> bool:
  """Whether a checkpoint belongs after `done` rounds.

  Always at the end of a whole chunk of rounds, so that a run which goes on cuts the
  remaining rounds into the same chunks: every `every` rounds, rounded up to whole
  chunks, and after the last.
  """
  chunk = config['eval_every']
  if not every or done % chunk:
    return False
  return done % (-(-every // chunk) * chunk) == 0 or done == config['rounds']


def save(folder: UPath, experiment: assembly.Experiment, seed: int,
         done: int, state: PyTree, keep: int) -> None:
  """Writes the checkpoint after `done` rounds of one seed's run."""
  state = jax.device_get(state)
  if not devices.is_first():
    return
  note = _note(experiment, seed, done)
  if files.is_local(folder):
    checkpoint.save(folder / FOLDER, done, state, note, keep)
    return
  with tempfile.TemporaryDirectory() as here:  # a store gets whole files
    checkpoint.save(here, done, state, note)
    files.upload(pathlib.Path(here, str(done)), folder / FOLDER / str(done))
  for old in _rounds(folder)[:-keep]:
    files.remove(folder / FOLDER / str(old))


def _rounds(folder):
  """The rounds of which a run has checkpoints, ascending."""
  return sorted(int(n) for n in files.names(folder / FOLDER) if n.isdigit())


def newest(workdirs: Sequence[UPath], experiment: assembly.Experiment,
           seeds: Sequence[int], states: Sequence[PyTree]
           ) -> tuple[int, list[PyTree]]:
  """The latest round from which all of some runs can go on.

  Args:
    workdirs: one per run.
    experiment: what they run.
    seeds: one per run.
    states: how each run begins, without a round done.

  Returns:
    Rounds done, and the states then. A checkpoint that cannot be used is named
    on the screen, and the one before it tried; 0 where there is none.
  """
  candidates = set.intersection(
      *(set(_rounds(folder)) for folder in workdirs))
  for done in sorted(candidates, reverse=True):
    if done > experiment.config['rounds']:
      continue
    try:
      return done, [_restore(*run, experiment, done)
                    for run in zip(workdirs, seeds, states)]
    except checkpoint.Refused as error:
      progress.say(f'{error}; it is left out')
  return 0, list(states)


def _restore(folder, seed, state, experiment, done):
  try:
    rows = files.read_jsonl(folder / 'metrics.jsonl')
  except (OSError, ValueError) as error:
    raise checkpoint.Refused(
        f'{folder / FOLDER}/{done}: its metrics.jsonl cannot be read') from error
  if done not in [row['round'] for row in rows]:
    raise checkpoint.Refused(
        f'{folder / FOLDER}/{done}: its metrics.jsonl does not reach that round')
  note = _note(experiment, seed, done)
  if files.is_local(folder):
    return checkpoint.restore(folder / FOLDER, done, state, note)
  with tempfile.TemporaryDirectory() as here:
    files.download(folder / FOLDER / str(done), pathlib.Path(here, str(done)))
    return checkpoint.restore(here, done, state, note)


def forget(folder: UPath, after: int) -> None:
  """Removes the checkpoints of later rounds than `after`."""
  for done in _rounds(folder):
    if done > after:
      files.remove(folder / FOLDER / str(done))


def _note(experiment, seed, done):
  """By what a run knows its checkpoints: configuration, files, who was in."""
  digest = hashlib.sha256()
  rows = jax.tree.map(lambda a: a[:done], experiment.schedule)
  for array in [*jax.tree.leaves(rows), *experiment.parts]:
    digest.update(np.ascontiguousarray(array, np.int64))
  return {**folders.identity({**experiment.config, 'seed': seed}),
          'partition and schedule': digest.hexdigest()}


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
