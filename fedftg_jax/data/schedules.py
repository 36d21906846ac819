"""Who takes part in which round, made before anything is trained.

A schedule is a `Cohort` with a leading axis [T]. The rows of a schedule do not
depend on how many follow: more rounds from the same seed prolong it (and may
widen a Bernoulli schedule's padding).
"""

import numpy as np

from fedftg_jax.base import Cohort, NO_LIMIT
from fedftg_jax.data import arrays


def exact(num_rounds: int, num_clients: int, cohort: int, seed: int) -> Cohort:
  """`cohort` different clients in every round, uniformly at random."""
  _check(num_clients, cohort)
  rows = [np.random.RandomState([seed, t]).permutation(num_clients)[:cohort]
          for t in range(num_rounds)]
  return from_ids(np.array(rows).reshape(num_rounds, cohort), num_clients)


def bernoulli(
    num_rounds: int, num_clients: int, cohort: int, seed: int) -> Cohort:
  """Every client takes part with probability cohort / num_clients.

  The official code's draws: client k is in if the k-th uniform of
  `RandomState(seed + t + i)` is at most that probability, where i counts the
  rounds (so far, this one's retries included) that came out empty.
  """
  _check(num_clients, cohort)
  rows, empty = [], 0
  for t in range(num_rounds):
    while True:
      draws = np.random.RandomState(seed + t + empty).uniform(size=num_clients)
      chosen = np.flatnonzero(draws <= cohort / num_clients)
      if len(chosen):
        break
      empty += 1
    rows.append(chosen)
  ids = np.full((num_rounds, max(map(len, rows), default=1)), num_clients)
  for row, chosen in zip(ids, rows):
    row[:len(chosen)] = chosen
  return from_ids(ids, num_clients)


def from_ids(ids: np.ndarray, num_clients: int) -> Cohort:
  """A schedule in which all selected arrive.

  Args:
    ids: [T, S] client ids; -1 (or N) for padding.
    num_clients: N.

  Raises:
    ValueError: for an id out of range.
  """
  if ids.size and not (-1 <= ids.min() and ids.max() <= num_clients):
    raise ValueError(
        f'client ids must lie between 0 and {num_clients - 1} (-1 for padding), '
        f'got {ids.min()} to {ids.max()}')
  ids = np.sort(np.where(ids < 0, num_clients, ids), axis=1).astype(np.int32)
  return Cohort(ids, ids < num_clients, np.full(ids.shape, NO_LIMIT, np.int32))


def load(path: str, num_rounds: int, num_clients: int) -> Cohort:
  """Reads ids [T, S] from a .npy file, or the array `ids` of an .npz.

  Raises:
    ValueError: for an unreadable file, a wrong shape, or too few rounds.
  """
  file = arrays.read(path, single='ids')
  if 'ids' not in file:
    raise ValueError(f'{path}: lacks the array ids; it has {", ".join(file)}')
  ids = file['ids']
  if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
    raise ValueError(
        f'{path}: client ids must be integers [rounds, cohort], got '
        f'{list(ids.shape)} of {ids.dtype}')
  if len(ids) < num_rounds:
    raise ValueError(f'{path}: has {len(ids)} rounds, {num_rounds} are asked for')
  return from_ids(ids[:num_rounds], num_clients)


def _check(num_clients, cohort):
  if not 1 <= cohort <= num_clients:
    raise ValueError(
        f'cohort must be between 1 and the number of clients ({num_clients}), '
        f'got {cohort}.')
