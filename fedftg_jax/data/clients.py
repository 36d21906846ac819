"""Clients as rows of flat arrays of examples."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fedftg_jax.base import Batch, Data, PyTree, Rows
from fedftg_jax.data.parts import Parts


def from_partition(
  x: np.ndarray,
  y: np.ndarray,
  parts: Sequence[np.ndarray],
  public: np.ndarray | tuple[()] = (),
) -> Data:
  """Puts the examples on the device once, with the rows of the clients.

  Args:
    x: [M, H, W, channels] images, uint8 or float.
    y: [M] labels.
    parts: one array of rows of `x` per client, of unequal lengths.
    public: [P, H, W, channels] unlabelled images of the server, if any.

  Returns:
    The data; an example costs 4 bytes besides, and no image is copied.

  Raises:
    ValueError: for invalid labels, or parts that overlap or are out of range.
  """
  parts = Parts.of(parts)
  rows, num = parts.rows, len(y)
  if len(x) != len(y) or not np.issubdtype(np.asarray(y).dtype, np.integer):
    raise ValueError(f'y must be one integer for each of the {len(x)} images.')
  if len(y) and np.min(y) < 0:
    raise ValueError(f'y must be at least 0, got {np.min(y)}.')
  if len(rows) and not 0 <= rows.min() <= rows.max() < num:
    raise ValueError(f'parts must hold rows from 0 to {num - 1}.')
  if parts.num_different(num) < len(rows):
    raise ValueError('parts give an example to more than one client.')
  index = Rows(
    jnp.asarray(np.append(rows, 0), jnp.int32),
    jnp.asarray(np.append(0, np.cumsum(parts.sizes)), jnp.int32),
    max(1, int(parts.sizes.max())),
  )
  return Data(
    jnp.asarray(x),
    jnp.asarray(y, jnp.int32),
    index,
    jnp.asarray(parts.sizes, jnp.int32),
    jax.tree.map(jnp.asarray, public),
  )


def batch(data: Data, positions: jax.Array, mask: jax.Array) -> Batch:
  """Gathers the examples at `positions` [B] of one client's rows."""
  rows = data.index[positions]
  return Batch(data.x[rows], data.y[rows], mask)


def mean_over_examples(
  function: Callable[[Batch], PyTree], data: Data, batch_size: int
) -> PyTree:
  """Averages a function over all examples of one client, in batches.

  Args:
    function: returns a mean over the valid examples of a batch.
    data: one client's data.
    batch_size: examples in a batch; the last batch is padded and masked.

  Returns:
    The mean; zero for a client without examples.
  """
  cap = data.index.shape[0]

  def part(first):
    positions = first + jnp.arange(batch_size)
    mask = positions < data.count
    return function(
      batch(data, jnp.minimum(positions, cap - 1), mask)
    ), jnp.sum(mask)

  def add(total, first):
    value, num = part(first)
    share = num / jnp.maximum(data.count, 1)
    return jax.tree.map(
      lambda t, v: t + (share * v).astype(t.dtype), total, value
    ), ()

  zero = jax.tree.map(
    lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(part, jnp.int32(0))[0]
  )
  return jax.lax.scan(add, zero, jnp.arange(0, cap, batch_size))[0]


def label_counts(data: Data, num_classes: int) -> jax.Array:
  """Counts one client's examples of each class, [C] int32."""
  valid = jnp.arange(data.index.shape[0]) < data.count
  return jnp.zeros(num_classes, jnp.int32).at[data.y[data.index]].add(valid)
