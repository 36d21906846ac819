"""Keeps clients' slots on the host, for federations too large for a device.

A slot tree with an axis [N] of clients is in host memory, or in files. For each
chunk of rounds the rows of the participating clients are copied into a table on
the device; the rounds run on the table, and its rows are written back. The
device holds only as many rows as a chunk has places in its cohorts, whatever N
is.

A slot that starts as zeros takes no memory, and no room on the disk, until it
is written: arrays are allocated lazily, and files are sparse. Rows of files are
read and written by system calls and not through the mapping, so that a full
disk is an error and not a crash of the process (SIGBUS).
"""

from collections.abc import Iterator
import contextlib
import os
import pathlib

import jax
import numpy as np

from fedftg_jax.base import Cohort, PyTree

PLACES = ('device', 'host')
_BLOCK = 2**24  # number of bytes that are written at once


def allocate(
  slot: PyTree, num_clients: int, folder: str | os.PathLike[str] | None = None
) -> PyTree:
  """Allocates `num_clients` copies of one client's slot, as NumPy arrays.

  Args:
    slot: one client's slot, arrays without a client axis.
    num_clients: N.
    folder: where to create files that are memory-mapped, one .npy for each
      leaf, so that the arrays need not fit into memory; None for memory. The
      files of leaves that are zero are sparse.

  Returns:
    A tree of arrays [N, ...].

  Raises:
    OSError: if the files cannot be created, or the disk has no room for them.
  """
  leaves, structure = jax.tree.flatten(jax.device_get(slot))

  def one(i, leaf):
    leaf = np.asarray(leaf)
    shape = num_clients, *leaf.shape
    is_zero = not np.frombuffer(leaf.tobytes(), np.uint8).any()  # bit for bit
    if folder is None:
      rows = (np.zeros if is_zero else np.empty)(shape, leaf.dtype)
      if not is_zero:
        rows[:] = leaf
      return rows
    path = pathlib.Path(folder) / f'slot{i:03d}.npy'
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.lib.format.open_memmap(path, 'w+', leaf.dtype, shape)
    if not is_zero:
      num = max(_BLOCK // leaf.nbytes, 1)
      block = np.broadcast_to(leaf, (min(num, num_clients), *leaf.shape)).copy()
      for first in range(0, num_clients, num):
        ids = np.arange(first, min(first + num, num_clients))
        _write(rows, ids, block[: len(ids)])
    return rows

  return structure.unflatten([one(i, leaf) for i, leaf in enumerate(leaves)])  # type: ignore[attr-defined]


def read(clients: PyTree, ids: np.ndarray) -> PyTree:
  """Copies rows of every leaf.

  Args:
    clients: every leaf [N, ...], from `allocate`.
    ids: [K] clients, in any order.

  Returns:
    NumPy arrays [K, ...].
  """
  return jax.tree.map(lambda rows: _read(rows, ids), clients)


def write(clients: PyTree, ids: np.ndarray, values: PyTree) -> None:
  """Replaces rows of every leaf, in place.

  Args:
    clients: every leaf [N, ...], from `allocate`.
    ids: [K] different clients.
    values: every leaf [K, ...].

  Raises:
    OSError: if the disk has no room for them.
  """
  jax.tree.map(lambda rows, new: _write(rows, ids, new), clients, values)


def _read(rows, ids):
  if not isinstance(rows, np.memmap):
    return np.asarray(rows[ids])
  found = np.empty((len(ids), *rows.shape[1:]), rows.dtype)
  with _opened(rows, 'rb') as file:
    for offset, some in _runs(rows, ids, found):
      file.seek(offset)
      file.readinto(some)
  return found


def _write(rows, ids, values):
  values = np.ascontiguousarray(values, rows.dtype)
  if not isinstance(rows, np.memmap):
    rows[ids] = values
    return
  with _opened(rows, 'r+b') as file:
    for offset, some in _runs(rows, ids, values):
      file.seek(offset)
      file.write(some)


@contextlib.contextmanager
def _opened(rows, mode):
  """Opens the file of a mapped array; errors name it."""
  try:
    with open(rows.filename, mode) as file:
      yield file
  except OSError as error:
    raise OSError(error.errno, error.strerror, str(rows.filename)) from error


def _runs(rows, ids, values) -> Iterator[tuple[int, np.ndarray]]:
  """Yields the place in the file and the bytes of each run of adjacent rows."""
  if not values.size:
    return
  size = values[0].nbytes
  cuts = np.flatnonzero(np.diff(ids) != 1) + 1
  for first, last in zip([0, *cuts.tolist()], [*cuts.tolist(), len(ids)]):
    some = values[first:last].reshape(-1).view(np.uint8)
    yield rows.offset + int(ids[first]) * size, some


def table_size(num_clients: int, num_rounds: int, cohort: int) -> int:
  """Returns the number of rows of the table for chunks of `num_rounds`."""
  return min(num_clients, num_rounds * cohort)


def to_table(
  clients: PyTree, rows: Cohort, num_clients: int, size: int
) -> tuple[PyTree, Cohort, np.ndarray]:
  """Collects the slots that some rounds touch, and points the rounds to them.

  Args:
    clients: every leaf [N, ...], on the host.
    rows: rows of the schedule, every leaf [T, S].
    num_clients: N.
    size: number of rows of the table, at least the number of different clients.

  Returns:
    The table, every leaf [size, ...] (unused rows are at its end); `rows` with
    `place` set; the ids of the clients in the table, ascending.
  """
  ids = np.unique(rows.client_id)
  ids = ids[ids < num_clients]
  place = np.searchsorted(ids, rows.client_id)
  place = np.where(rows.client_id < num_clients, place, size).astype(np.int32)
  table = read(clients, ids)
  if len(ids) < size:
    unused = (size - len(ids),)
    table = jax.tree.map(
      lambda a, first: np.concatenate(
        [a, np.broadcast_to(first, unused + first.shape[1:])]
      ),
      table,
      read(clients, np.zeros(1, int)),
    )
  return table, rows._replace(place=place), ids


def from_table(clients: PyTree, table: PyTree, ids: np.ndarray) -> None:
  """Writes the table's rows back to the clients' slots, in place."""
  write(clients, ids, jax.tree.map(lambda a: np.asarray(a)[: len(ids)], table))
