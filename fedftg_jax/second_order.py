"""Curvature of the loss: Hessian-vector products, top eigenvalue, traces.

The second-order analysis of FedAlign (Mendieta et al., CVPR 2022,
arXiv:2111.14213), whose code has PyHessian's power iteration and Hutchinson's
estimate of the trace. With d_k a vector of traces, one for each tensor of
client k's model, it says how unlike curvature is across clients:

  H_N = mean_ij (||d_i|| - ||d_j||)^2,   H_D = mean_ij cos(d_i, d_j)

over all ordered pairs, those of a client with itself among them. (The paper
writes of the Hessian's diagonal; its code has these much shorter vectors.)

Deviation: a given number of probes and the standard error that comes of it,
where the code stops as soon as its estimate seems settled.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from fedftg_jax import losses
from fedftg_jax.base import Data, Model, PyTree, Variables
from fedftg_jax.data import clients

Product = Callable[[PyTree], PyTree]  # v -> H v


class Top(NamedTuple):
  """The eigenvalue of largest magnitude."""

  value: jax.Array  # []
  vector: PyTree  # of norm 1, like the parameters
  iterations: jax.Array  # [] int32, products that it took


class Traces(NamedTuple):
  """Hutchinson's estimates."""

  per_tensor: PyTree  # [] of each tensor's block
  total: jax.Array  # []
  error: jax.Array  # [] standard error of `total`


def hessian_product(
  model: Model, variables: Variables, data: Data, batch_size: int = 100
) -> Product:
  """Makes the product with the Hessian of the mean cross-entropy.

  Forward over reverse, batch by batch; BatchNorm normalises by the kept
  statistics.

  Args:
    model: the classifier.
    variables: where; the Hessian is that in the parameters.
    data: one client's, or examples that `index` lists.
    batch_size: examples at once.

  Returns:
    A function of a tree like the parameters.
  """

  def slope(batch, params):
    def loss(params):
      output = model.apply(
        variables._replace(params=params), batch.x, mask=batch.mask
      )
      return losses.cross_entropy(output.logits, batch.y, batch.mask)

    return jax.grad(loss)(params)

  def product(vector):
    def of_batch(batch):
      along = functools.partial(slope, batch)
      return jax.jvp(along, (variables.params,), (vector,))[1]

    size = min(batch_size, len(data.index))
    return clients.mean_over_examples(of_batch, data, size)

  return product


def top_eigenvalue(
  product: Product,
  like: PyTree,
  key: jax.Array,
  *,
  iterations: int = 100,
  tolerance: float = 1e-3,
) -> Top:
  """Finds the eigenvalue of largest magnitude by the power iteration.

  Args:
    product: v -> H v, H symmetric.
    like: a tree like v.
    key: draws where it begins.
    iterations: products at most.
    tolerance: it ends where the Rayleigh quotient changes by less, relative to
      itself.

  Returns:
    The quotient at the last vector, which is never above that magnitude.
  """

  def unit(v):
    return optax.tree.scale(1 / jnp.maximum(optax.tree.norm(v), 1e-30), v)

  def step(carry):
    top, _ = carry
    after = product(top.vector)
    value = optax.tree.vdot(top.vector, after)
    return Top(value, unit(after), top.iterations + 1), top.value

  def goes_on(carry):
    top, before = carry
    moved = jnp.abs(top.value - before) > tolerance * (jnp.abs(before) + 1e-6)
    return (top.iterations < iterations) & (moved | (top.iterations < 2))

  start = unit(optax.tree.random_like(key, like, jax.random.normal))
  zero = jnp.zeros((), jnp.result_type(float))
  top, _ = jax.lax.while_loop(
    goes_on, step, (Top(zero, start, jnp.int32(0)), zero)
  )
  return top


def traces(
  product: Product, like: PyTree, key: jax.Array, probes: int = 100
) -> Traces:
  """Estimates the trace of each tensor's block, and of all, by Hutchinson.

  Args:
    product: v -> H v.
    like: a tree like v.
    key: draws the probes.
    probes: vectors of random signs, each a product.

  Returns:
    Means over the probes of sum(v_j * (H v)_j).
  """

  def of_probe(key):
    v = optax.tree.random_like(key, like, jax.random.rademacher)
    return jax.tree.map(lambda a, b: jnp.sum(a * b), v, product(v))

  found = jax.lax.map(of_probe, jax.random.split(key, probes))
  total = sum(jax.tree.leaves(found))  # [P]
  return Traces(
    jax.tree.map(jnp.mean, found),
    jnp.mean(total),
    jnp.std(total, ddof=min(1, probes - 1)) / probes**0.5,
  )


def across_clients(vectors: jax.Array) -> dict[str, jax.Array]:
  """H_N and H_D of the clients' vectors of traces [K, J].

  H_N is twice the variance of the norms, H_D the squared norm of the mean
  direction; a vector of zeros has none.
  """
  chex.assert_rank(vectors, 2)
  norms = jnp.linalg.norm(vectors, axis=1, keepdims=True)
  directions = vectors / jnp.where(norms > 0, norms, 1)
  return {
    'H_N': 2 * jnp.var(norms),
    'H_D': jnp.sum(jnp.mean(directions, axis=0) ** 2),
  }
