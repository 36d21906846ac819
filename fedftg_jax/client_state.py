"""Clients' slots on the host, for federations that are too large for a device.

A slot tree with an axis [N] of clients lies in host memory, or in files that
are mapped into it. For each chunk of rounds the rows of the clients that take
part become a table on the device; the rounds run on the table, and its rows are
written back. The device holds as many rows as a chunk has places, whatever N.
"""

import os
import pathlib

import jax
import numpy as np

from fedftg_jax.base import Cohort, PyTree

PLACES = ('device', 'host')


def allocate(
  slot: PyTree, num_clients: int, folder: str | os.PathLike[str] | None = None
) -> PyTree:
  """`num_clients` copies of one client's slot, as NumPy arrays.

  Args:
    slot: one client's, arrays without a client axis.
    num_clients: N.
    folder: where to map the arrays from files that are made there, a .npy for
      each leaf, so that they need not fit into memory; None for memory.

  Returns:
    A tree of arrays [N, ...].

  Raises:
    OSError: if the files cannot be made, or the disk has no room for them.
  """
  leaves, structure = jax.tree.flatten(jax.device_get(slot))

  def one(i, leaf):
    leaf = np.asarray(leaf)
    shape = num_clients, *leaf.shape
    if folder is None:
      rows = np.empty(shape, leaf.dtype)
    else:
      path = pathlib.Path(folder) / f'slot{i:03d}.npy'
      path.parent.mkdir(parents=True, exist_ok=True)
      rows = np.lib.format.open_memmap(path, 'w+', leaf.dtype, shape)
      try:  # a full disk is an error now, not a crash when it is written to
        with path.open('r+b') as file:
          os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
      except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    rows[:] = leaf
    return rows

  return structure.unflatten([one(i, leaf) for i, leaf in enumerate(leaves)])  # type: ignore[attr-defined]


def table_size(num_clients: int, num_rounds: int, cohort: int) -> int:
  """Rows of the table for chunks of so many rounds."""
  return min(num_clients, num_rounds * cohort)


def to_table(
  clients: PyTree, rows: Cohort, num_clients: int, size: int
) -> tuple[PyTree, Cohort, np.ndarray]:
  """The slots that some rounds touch, and the rounds pointed to them.

  Args:
    clients: every leaf [N, ...], on the host.
    rows: of the schedule, every leaf [T, S].
    num_clients: N.
    size: of the table; at least as many as there are different clients.

  Returns:
    The table, every leaf [size, ...] (the last rows may be nobody's); `rows`
    with `place` set; the clients in the table, ascending.
  """
  ids = np.unique(rows.client_id)
  ids = ids[ids < num_clients]
  place = np.searchsorted(ids, rows.client_id)
  place = np.where(rows.client_id < num_clients, place, size).astype(np.int32)
  padded = np.pad(ids, (0, size - len(ids)))
  table = jax.tree.map(lambda a: np.asarray(a[padded]), clients)
  return table, rows._replace(place=place), ids


def from_table(clients: PyTree, table: PyTree, ids: np.ndarray) -> None:
  """Writes the table's rows back to where they belong, in place."""

  def write(rows, new):
    rows[ids] = np.asarray(new)[: len(ids)]

  jax.tree.map(write, clients, table)
