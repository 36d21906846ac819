"""Schedules: which clients take part in which round, drawn before training.

A schedule is a `Cohort` with a leading axis [T]. Its rows do not depend on how
many rows follow: with the same seed, more rounds extend a schedule (and may
widen the padding of a Bernoulli schedule).
"""

from collections.abc import Sequence
import os

import numpy as np

from fedftg_jax.base import NO_LIMIT, Cohort
from fedftg_jax.data import arrays


def exact(
  num_rounds: int,
  num_clients: int,
  cohort: int,
  seed: int,
  available: np.ndarray | None = None,
) -> Cohort:
  """Draws `cohort` different clients in every round, uniformly at random.

  Args:
    num_rounds: T.
    num_clients: N.
    cohort: S; if fewer clients are available in a round, those take part.
    seed: seed of the draws.
    available: [N] probability that a client is available in a round; None for
      always. A round in which no client is available is drawn again.

  Returns:
    The schedule.
  """
  _check(num_clients, cohort)
  ids = np.full((num_rounds, cohort), num_clients)
  for t, row in enumerate(ids):
    order = np.random.RandomState([seed, t]).permutation(num_clients)
    if available is not None:
      order = order[_reachable(available, seed, t, num_clients)[order]]
    chosen = order[:cohort]
    row[: len(chosen)] = chosen
  return from_ids(ids, num_clients)


def bernoulli(
  num_rounds: int,
  num_clients: int,
  cohort: int,
  seed: int,
  available: np.ndarray | None = None,
) -> Cohort:
  """Draws every client with probability cohort / num_clients, at least one.

  These are the official code's draws: client k takes part if the k-th uniform
  of `RandomState(seed + t + i)` is at most that probability, where i counts the
  empty draws so far, this round's retries included. Arguments as in `exact`.
  """
  _check(num_clients, cohort)
  rows, empty = [], 0
  for t in range(num_rounds):
    reachable = _reachable(available, seed, t, num_clients)
    while True:
      draws = np.random.RandomState(seed + t + empty).uniform(size=num_clients)
      chosen = np.flatnonzero((draws <= cohort / num_clients) & reachable)
      if len(chosen):
        break
      empty += 1
    rows.append(chosen)
  return _of_unequal_rounds(rows, num_clients)


def poisson(
  num_rounds: int,
  num_clients: int,
  cohort: int,
  seed: int,
  available: np.ndarray | None = None,
) -> Cohort:
  """Draws every client with probability cohort / num_clients.

  This is Poisson sampling, as the accounting of differential privacy requires:
  rounds and clients are independent, so a round may have no client. Arguments
  as in `exact`, except that a round is never drawn again.
  """
  _check(num_clients, cohort)
  rate = cohort / num_clients * (1 if available is None else available)
  rows = [
    np.flatnonzero(
      np.random.RandomState([seed, t, 4]).uniform(size=num_clients) < rate
    )
    for t in range(num_rounds)
  ]
  return _of_unequal_rounds(rows, num_clients)


def _of_unequal_rounds(rows, num_clients):
  """Makes a schedule from one list of clients per round."""
  width = max(1, max(map(len, rows), default=1))
  ids = np.full((len(rows), width), num_clients)
  for row, chosen in zip(ids, rows):
    row[: len(chosen)] = chosen
  return from_ids(ids, num_clients)


def availability(
  num_clients: int, lowest: float, seed: int
) -> np.ndarray | None:
  """Draws each client's probability [N] of being available, in [lowest, 1].

  The distribution is uniform. None (always available) if `lowest` is 1.
  """
  _check_rate('lowest', lowest)
  if lowest == 1:
    return None
  return np.random.RandomState([seed, 2**31]).uniform(lowest, 1, num_clients)


def with_dropouts(
  schedule: Cohort, rate: float, seed: int, after_work: bool = False
) -> Cohort:
  """Lets each selected client drop out with probability `rate`.

  Args:
    schedule: leading axis [T].
    rate: probability that a client does not arrive, independently for each
      client and round.
    seed: seed of the draws.
    after_work: whether a client that drops out has trained all the same, and
      keeps its new slots.

  Returns:
    The schedule.
  """
  _check_rate('rate', rate)
  if not rate:
    return schedule
  stays = _draws(schedule, seed, 1) >= rate
  return schedule._replace(
    arrived=schedule.arrived & stays,
    worked=schedule.arrived if after_work else None,
  )


def with_all_at_work(schedule: Cohort, num_clients: int) -> Cohort:
  """Lets all clients train in every round and keep what they learn.

  Only the clients that arrive in `schedule` arrive. A selected client that
  drops out before its training does not train here, either.

  Args:
    schedule: leading axis [T].
    num_clients: N.

  Returns:
    The schedule, with a cohort of all N clients.
  """
  length = len(schedule.client_id)
  rows = np.arange(length)[:, None]

  def spread(values, others):
    """Spreads values [T, S] to [T, N]; `others` is for clients not selected."""
    found = np.full((length, num_clients + 1), others)  # one more for padding
    found[rows, schedule.client_id] = values
    return found[:, :num_clients]

  worked = schedule.arrived if schedule.worked is None else schedule.worked
  return Cohort(
    np.tile(np.arange(num_clients, dtype=np.int32), (length, 1)),
    spread(schedule.arrived, False),
    spread(schedule.num_steps, np.int32(NO_LIMIT)),
    spread(worked, True),
  )


def without(schedule: Cohort, clients: Sequence[int]) -> Cohort:
  """Lets some clients neither train nor arrive."""
  stays = ~np.isin(schedule.client_id, clients)
  worked = schedule.worked
  return schedule._replace(
    arrived=schedule.arrived & stays,
    worked=worked if worked is None else worked & stays,
  )


def with_stragglers(
  schedule: Cohort, full_steps: np.ndarray, rate: float, seed: int
) -> Cohort:
  """Lets some clients take only some of their local steps.

  As in FedProx (Li et al., MLSys 2020), the work of a straggler is uniform: 1
  to as many steps as it would have taken, drawn for each client and round.

  Args:
    schedule: leading axis [T].
    full_steps: [N] number of steps that each client takes otherwise.
    rate: probability of being a straggler, for each client and round.
    seed: seed of the draws.

  Returns:
    The schedule.
  """
  _check_rate('rate', rate)
  if not rate:
    return schedule
  slow = _draws(schedule, seed, 2) < rate
  full = np.append(full_steps, 1)[schedule.client_id]
  some = 1 + np.floor(_draws(schedule, seed, 3) * full).astype(np.int32)
  return schedule._replace(
    num_steps=np.where(slow, some, schedule.num_steps).astype(np.int32)
  )


def _draws(schedule, seed, purpose):
  """Draws uniforms [T, S] that depend only on client and round."""
  width = int(schedule.client_id.max(initial=0)) + 1
  return np.array(
    [
      np.random.RandomState([seed, t, purpose]).uniform(size=width)[ids]
      for t, ids in enumerate(schedule.client_id)
    ]
  )


def _reachable(available, seed, t, num_clients):
  """Draws which clients [N] are available in round t; at least one is."""
  if available is None:
    return np.ones(num_clients, bool)
  if np.max(available) < 1e-4:  # it would be drawn again and again
    raise ValueError(
      'available must be at least 1e-4 for some client, got at most '
      f'{np.max(available)}.'
    )
  rng = np.random.RandomState([seed, t, 0])
  while True:
    reachable = rng.uniform(size=num_clients) < available
    if reachable.any():
      return reachable


def _check_rate(name, rate):
  if not 0 <= rate <= 1:
    raise ValueError(f'{name} must be between 0 and 1, got {rate}.')


def from_ids(ids: np.ndarray, num_clients: int) -> Cohort:
  """Makes a schedule in which all selected clients arrive.

  Args:
    ids: [T, S] client ids; -1 (or N) for padding.
    num_clients: N.

  Returns:
    The schedule.

  Raises:
    ValueError: for an id out of range.
  """
  if ids.size and not (-1 <= ids.min() and ids.max() <= num_clients):
    raise ValueError(
      f'client ids must lie between 0 and {num_clients - 1} (-1 for padding), '
      f'got {ids.min()} to {ids.max()}'
    )
  ids = np.sort(np.where(ids < 0, num_clients, ids), axis=1).astype(np.int32)
  return Cohort(ids, ids < num_clients, np.full(ids.shape, NO_LIMIT, np.int32))


def save(
  path: str | os.PathLike[str], schedule: Cohort, num_clients: int
) -> None:
  """Writes a schedule as .npz.

  The arrays are ids (-1 for padding), arrived, num_steps and, if the schedule
  has it, worked, all [T, S].
  """
  ids = schedule.client_id
  worked = {} if schedule.worked is None else {'worked': schedule.worked}
  np.savez_compressed(
    path,
    ids=np.where(ids == num_clients, -1, ids),
    arrived=schedule.arrived,
    num_steps=schedule.num_steps,
    **worked,  # type: ignore[arg-type]
  )


def load(path: str, num_rounds: int, num_clients: int) -> Cohort:
  """Reads a schedule that `save` wrote, or a .npy file with ids [T, S].

  Raises:
    ValueError: for an unreadable file, a wrong shape, or too few rounds.
  """
  file = arrays.read(path, single='ids')
  if 'ids' not in file:
    raise ValueError(f'{path}: lacks the array ids; it has {", ".join(file)}')
  for name, what, kind, dtype in (
    ('ids', 'client ids', 'integers', np.integer),
    ('arrived', 'arrived', 'bools', np.bool_),
    ('worked', 'worked', 'bools', np.bool_),
    ('num_steps', 'num_steps', 'integers', np.integer),
  ):
    array = file.get(name)
    if array is not None and (
      array.ndim != 2
      or array.shape != file['ids'].shape
      or not np.issubdtype(array.dtype, dtype)
    ):
      raise ValueError(
        f'{path}: {what} must be {kind} [rounds, cohort], got '
        f'{list(array.shape)} of {array.dtype}'
      )
  ids = file['ids']
  if len(ids) < num_rounds:
    raise ValueError(
      f'{path}: has {len(ids)} rounds, but {num_rounds} are needed'
    )
  ids = ids[:num_rounds]
  order = np.argsort(np.where(ids < 0, num_clients, ids), axis=1, kind='stable')
  schedule = from_ids(ids, num_clients)
  selected = schedule.arrived
  for name in ('arrived', 'num_steps', 'worked'):
    if name in file:
      column = np.take_along_axis(file[name][:num_rounds], order, 1)
      schedule = schedule._replace(
        **{name: column if name == 'num_steps' else column & selected}
      )
  return schedule


def _check(num_clients, cohort):
  if not 1 <= cohort <= num_clients:
    raise ValueError(
      f'cohort must be between 1 and the number of clients ({num_clients}), '
      f'got {cohort}.'
    )
