"""Saves and restores the checkpoints of runs, and listens for SIGTERM."""

from collections.abc import Iterator, Sequence
import contextlib
import hashlib
import json
import pathlib
import re
import signal
import tempfile
import threading
from typing import Any

import jax
import numpy as np
from upath import UPath

from fedftg_jax import checkpoint, client_state
from fedftg_jax.base import State
from fedftg_jax.configuration import assembly
from fedftg_jax.system import cli, devices, files, progress

FOLDER = 'checkpoints'  # in a run's folder
_WHOLE = 'whole'  # the last file of a checkpoint in a store without rename
_ROUND = re.compile('0|[1-9][0-9]*')
_ROWS = 'rows of metrics.jsonl'  # in a checkpoint's note
_REFUSED = '.refused'  # behind the name of a checkpoint that cannot be used


def is_due(done: int, config: dict[str, Any], every: int) -> bool:
  """Returns whether a checkpoint is due after `done` rounds.

  It is due after the last round, and every `every` rounds, rounded up to whole
  chunks: a run that resumes then divides the other rounds into equal chunks.
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
  state: State,
) -> None:
  """Writes the checkpoint after `done` rounds of one seed's run.

  If the slots are on the host or on disk, it holds only those of clients that
  have worked.
  """
  ids = _worked(experiment, done)
  if ids is not None:
    if not devices.is_first():
      state = state._replace(clients=())
    else:
      state = state._replace(clients=client_state.read(state.clients, ids))
  state = jax.device_get(state)
  if not devices.is_first():
    return
  note = _note(experiment, seed, done, _read_rows(folder))
  if files.is_local(folder):
    checkpoint.save(folder / FOLDER, done, state, note)  # type: ignore[arg-type]
    return
  with tempfile.TemporaryDirectory() as here:  # a store gets whole files
    checkpoint.save(here, done, state, note)
    files.upload(pathlib.Path(here, str(done)), folder / FOLDER / str(done))
    files.write_text(folder / FOLDER / str(done) / _WHOLE, '')


def _worked(experiment, done) -> np.ndarray | None:
  """Returns the clients that have worked in the first `done` rounds, ascending.

  Only their slots differ from the initial one. None if the slots are on the
  device: checkpoints hold all of them then.
  """
  if experiment.config['client_state'] == 'device':
    return None
  rows = experiment.problem.schedule
  worked = rows.arrived if rows.worked is None else rows.arrived | rows.worked
  return np.unique(rows.client_id[:done][worked[:done]])


def blank(experiment: assembly.Experiment, done: int, state: State) -> State:
  """Returns `state` in the form of a checkpoint, without the slots' values.

  Args:
    experiment: the experiment of the run.
    done: number of rounds done, at least 1.
    state: the initial state.
  """
  ids = _worked(experiment, done)
  if ids is None:
    return state
  return state._replace(
    clients=jax.tree.map(
      lambda a: np.empty((len(ids), *a.shape[1:]), a.dtype), state.clients
    )
  )


def put_back(
  experiment: assembly.Experiment, done: int, state: State, saved: State
) -> State:
  """Returns the state of a checkpoint with the slots of all clients.

  Args:
    experiment: the experiment of the run.
    done: number of rounds done.
    state: the initial state. Slots on the host are changed in place; they may
      be mapped from files.
    saved: a state from `newest`.
  """
  ids = _worked(experiment, done)
  if ids is None:
    return saved
  client_state.write(state.clients, ids, saved.clients)
  return saved._replace(clients=state.clients)


def prune(folder: UPath, done: int, keep: int) -> None:
  """Removes all but a run's last `keep` checkpoints up to `done` rounds."""
  if not devices.is_first():
    return
  if files.is_local(folder):
    checkpoint.prune(folder / FOLDER, done, keep)  # type: ignore[arg-type]
    return
  for old in [r for r in _rounds(folder) if r <= done][:-keep]:
    files.remove(folder / FOLDER / str(old))


def _read_rows(folder):
  """Reads the rows of metrics.jsonl; leaves out lines that are no rows."""
  rows = files.read_jsonl(folder / 'metrics.jsonl')
  return [row for row in rows if isinstance(row, dict) and 'round' in row]


def _rounds(folder):
  """Lists the rounds with a checkpoint, ascending."""
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
  states: Sequence[State],
) -> tuple[int, list[State]]:
  """Restores the latest checkpoint that all runs have.

  A checkpoint that cannot be used is named on the screen and renamed; then the
  one before it is tried.

  Args:
    workdirs: folders, one per run.
    experiment: the experiment of all runs.
    seeds: seeds, one per run.
    states: initial states, one per run.

  Returns:
    The number of rounds done, and the states after them, for `put_back`; 0 and
    the initial states without a checkpoint.

  Raises:
    cli.UsageError: if all checkpoints are of more rounds than --rounds.
    cli.RunError: if the rows up to a checkpoint are not those that the run
      wrote.
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
        if error.differ == (_ROWS,):
          raise cli.RunError(
            f'{run[0] / "metrics.jsonl"}: its rows up to round {done} are not '
            'those that the run wrote; put them back, or delete the '
            'checkpoints beside it to begin anew'
          ) from error
        _set_aside(run[0], done, str(error))
        break
    else:
      return done, states_then
  if candidates:
    progress.say('no checkpoint that can be used: begins at round 1')
  return 0, list(states)


def _set_aside(folder, done, why) -> None:
  """Renames a checkpoint that cannot be used, and says why."""
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
    rows = _read_rows(folder)
  except (FileNotFoundError, ValueError) as error:  # others may pass by
    raise checkpoint.Refused(
      f'{folder / FOLDER}/{done}: its metrics.jsonl cannot be read'
    ) from error
  if done not in [row['round'] for row in rows]:
    raise checkpoint.Refused(
      f'{folder / FOLDER}/{done}: its metrics.jsonl does not reach that round'
    )
  note = _note(experiment, seed, done, rows)
  if files.is_local(folder):
    return _restore_from(folder / FOLDER, experiment, done, state, note)
  with tempfile.TemporaryDirectory() as here:
    files.download(folder / FOLDER / str(done), pathlib.Path(here, str(done)))
    return _restore_from(here, experiment, done, state, note)


def _restore_from(folder, experiment, done, state, note):
  ids = _worked(experiment, done)
  try:
    return checkpoint.restore(
      folder, done, blank(experiment, done, state), note
    )
  except checkpoint.Refused:
    if ids is None or len(ids) == len(experiment.problem.parts):
      raise
    # Earlier versions wrote the slots of all clients, also from the host.
    with contextlib.suppress(checkpoint.Refused):
      whole = checkpoint.restore(folder, done, state, note)
      return whole._replace(
        clients=jax.tree.map(lambda a: a[ids], whole.clients)
      )
    raise


def _note(experiment, seed, done, results):
  """Builds the identity of a checkpoint: configuration, data and rows."""
  rows, parts = experiment.problem.schedule, experiment.problem.parts
  digest = parts.digest.copy()
  for t in range(done):  # without padding, whose width depends on later rounds
    selected = rows.client_id[t] < len(parts)
    for column in (rows.client_id, rows.arrived, rows.num_steps, rows.worked):
      if column is not None:
        array = column[t][selected]
        digest.update(np.insert(array.astype(np.int64), 0, len(array)))
  identity = {**experiment.config, **experiment.contents, 'seed': seed}
  del identity['rounds']
  results = [row for row in results if row['round'] <= done]
  return {
    **identity,
    'partition and schedule': digest.hexdigest(),
    _ROWS: hashlib.sha256(json.dumps(results).encode()).hexdigest(),
  }


@contextlib.contextmanager
def listening() -> Iterator[threading.Event]:
  """Yields an event that is set by SIGTERM, so that a run can end in order.

  A second SIGTERM ends the process at once, as it does outside this context.
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
