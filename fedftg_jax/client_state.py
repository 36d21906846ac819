"""Keeps clients' slots on the host, for federations too large for a device.

A slot tree with an axis [N] of clients is in host memory, or in memory-mapped
files. For each chunk of rounds the rows of the participating clients are copied
into a table on the device; the rounds run on the table, and its rows are
written back. The device holds only as many rows as a chunk has places in its
cohorts, whatever N is.
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
  """Allocates `num_clients` copies of one client's slot, as NumPy arrays.

  Args:
    slot: one client's slot, arrays without a client axis.
    num_clients: N.
    folder: where to create files that are memory-mapped, one .npy for each
      leaf, so that the arrays need not fit into memory; None for memory.

  Returns:
    A tree of arrays [N, ...].

  Raises:
    OSError: if the files cannot be created, or the disk has no room for them.
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
      try:  # a full disk is an error now rather than a crash at a later write
        with path.open('r+b') as file:
          os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
      except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    rows[:] = leaf
    return rows

  return structure.unflatten([one(i, leaf) for i, leaf in enumerate(leaves)])  # type: ignore[attr-defined]


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
  padded = np.pad(ids, (0, size - len(ids)))
  table = jax.tree.map(lambda a: np.asarray(a[padded]), clients)
  return table, rows._replace(place=place), ids


def from_table(clients: PyTree, table: PyTree, ids: np.ndarray) -> None:
  """Writes the table's rows back to the clients' slots, in place."""

  def write(rows, new):
    rows[ids] = np.asarray(new)[: len(ids)]

  jax.tree.map(write, clients, table)
