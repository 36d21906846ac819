"""The rows of each client in one flat array, for any number of clients."""

from collections.abc import Iterable, Iterator, Sequence
import functools
import hashlib

import numpy as np

_BLOCK = 2**16  # clients whose rows are hashed at once


class Parts(Sequence):
  """The rows that each client holds, as a sequence of N arrays.

  It reads like a list of arrays, but a million clients are two arrays instead
  of a million. It must not be changed after it is made.

  Attributes:
    rows: [M] the rows of client 0, then those of client 1, and so on.
    sizes: [N] number of rows of each client.
    starts: [N] where the rows of each client begin in `rows`.
  """

  def __init__(self, rows: np.ndarray, sizes: np.ndarray):
    """Makes the parts from flat arrays.

    Args:
      rows: [M] integers.
      sizes: [N] integers of at least 0, with sum M.
    """
    self.rows = np.asarray(rows)
    self.sizes = np.asarray(sizes, np.int64)
    self.starts = np.cumsum(self.sizes) - self.sizes

  @classmethod
  def of(cls, parts: Iterable[np.ndarray]) -> 'Parts':
    """Makes the parts from one array per client; `Parts` stay as they are."""
    if isinstance(parts, cls):
      return parts
    arrays = [np.asarray(part) for part in parts]
    rows = np.concatenate([part.astype(np.int64) for part in arrays])
    return cls(rows, np.array([len(part) for part in arrays]))

  @classmethod
  def by_owner(
    cls, owners: np.ndarray, num_clients: int, rows: np.ndarray | None = None
  ) -> 'Parts':
    """Makes the parts from the owner of each row.

    Args:
      owners: [M] clients in [0, N).
      num_clients: N.
      rows: [M] the rows; None for 0 to M - 1. A client's rows keep this order.
    """
    order = np.argsort(owners, kind='stable')
    return cls(
      order if rows is None else rows[order],
      np.bincount(owners, minlength=num_clients),
    )

  def __len__(self) -> int:
    return len(self.sizes)

  def __getitem__(self, client):
    if isinstance(client, slice):
      return [self[k] for k in range(*client.indices(len(self)))]
    start = self.starts[client]
    return self.rows[start : start + self.sizes[client]]

  def __iter__(self) -> Iterator[np.ndarray]:
    for start, size in zip(self.starts.tolist(), self.sizes.tolist()):
      yield self.rows[start : start + size]

  def owners(self) -> np.ndarray:
    """Returns the client of each entry of `rows`, [M]."""
    return np.repeat(np.arange(len(self)), self.sizes)

  def places(self) -> np.ndarray:
    """Returns the place of each entry of `rows` within its client's, [M]."""
    return np.arange(len(self.rows)) - np.repeat(self.starts, self.sizes)

  def rows_of(self, clients: np.ndarray) -> np.ndarray:
    """Returns the rows of some clients, one client's after another's."""
    sizes = self.sizes[clients]
    begin = np.cumsum(sizes) - sizes
    move = np.repeat(self.starts[clients] - begin, sizes)
    return self.rows[np.arange(len(move)) + move]

  def num_different(self, num_examples: int) -> int:
    """Counts the different rows, which must lie in [0, `num_examples`)."""
    held = np.zeros(num_examples, bool)
    held[self.rows] = True
    return int(held.sum())

  @functools.cached_property
  def digest(self) -> 'hashlib._Hash':
    """The SHA-256 state after the number of rows and the rows of each client.

    All numbers are hashed as 64-bit integers. Copy it before an update.
    """
    digest = hashlib.sha256()
    for first in range(0, len(self), _BLOCK):
      some = slice(first, first + _BLOCK)
      sizes, starts = self.sizes[some], self.starts[some]
      begin, end = starts[0], starts[-1] + sizes[-1]
      digest.update(
        np.insert(
          self.rows[begin:end].astype(np.int64), starts - begin, sizes
        ).tobytes()
      )
    return digest
