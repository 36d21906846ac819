"""Operations on trees with a client axis: weighted sums, gather, scatter.

For plain arithmetic on trees use `optax.tree`.
"""

import jax
import jax.numpy as jnp


def stack(tree, n: int):
  """Stacks `n` copies of every leaf on a new leading axis."""
  return jax.tree.map(lambda a: jnp.broadcast_to(a, (n,) + jnp.shape(a)), tree)


def weighted_sum(tree, weight: jax.Array):
  """Computes sum_k weight_k leaf_k over the leading axis; `weight` is [S]."""
  return jax.tree.map(
    lambda a: jnp.tensordot(weight.astype(a.dtype), a, 1), tree
  )


def gather(tree, ids: jax.Array):
  """Gathers rows `ids` of every leaf; an id past the end gives the last row."""
  return jax.tree.map(lambda a: a.at[ids].get(mode='clip'), tree)


def scatter(tree, ids: jax.Array, rows):
  """Replaces rows `ids` of every leaf; ids past the end are dropped."""
  return jax.tree.map(lambda a, r: a.at[ids].set(r, mode='drop'), tree, rows)


def where(condition: jax.Array, new, old):
  """Selects `new` if the scalar `condition` holds, else `old`, leaf by leaf."""
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def num_bits(tree) -> int:
  """Counts the bits of all leaves (arrays or ShapeDtypeStructs)."""
  return sum(8 * a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))
