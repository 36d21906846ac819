"""Curvature of the loss: Hessian-vector products, top eigenvalue, traces.

This is the second-order analysis of FedAlign (Mendieta et al., CVPR 2022,
arXiv:2111.14213), whose code uses PyHessian's power iteration and Hutchinson's
estimate of the trace. Let d_k be a vector of traces, one for each tensor of
client k's model. Two numbers measure how much the curvature differs between
clients:

  H_N = mean_ij (||d_i|| - ||d_j||)^2,   H_D = mean_ij cos(d_i, d_j)

over all ordered pairs, including those of a client with itself. (The paper
speaks of the diagonal of the Hessian; its code uses these much shorter
vectors.)

Deviation: the number of probes is given, and the standard error is reported,
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
  vector: PyTree  # its eigenvector, of norm 1, in the parameters' structure
  iterations: jax.Array  # [] int32, number of products computed


class Traces(NamedTuple):
  """Hutchinson's estimates of traces of the Hessian."""

  per_tensor: PyTree  # [] trace of each tensor's block
  total: jax.Array  # []
  error: jax.Array  # [] standard error of `total`


def hessian_product(
  model: Model, variables: Variables, data: Data, batch_size: int = 100
) -> Product:
  """Makes a function that multiplies by the mean cross-entropy's Hessian.

  It differentiates forward over reverse, batch by batch. BatchNorm normalises
  by the running statistics.

  Args:
    model: the classifier.
    variables: the point at which the Hessian in the parameters is taken.
    data: one client's data, or the examples that `index` lists.
    batch_size: examples in a batch.

  Returns:
    A function v -> H v of trees in the structure of the parameters.
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
  """Finds the eigenvalue of largest magnitude by power iteration.

  Args:
    product: v -> H v, with H symmetric.
    like: a tree in the structure of v.
    key: draws the start vector.
    iterations: largest number of products.
    tolerance: iteration stops once the Rayleigh quotient changes by less than
      this, relative to itself.

  Returns:
    The Rayleigh quotient at the last vector. Its magnitude is never above that
    of the eigenvalue.
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
  """Estimates the trace of each tensor's block and of the whole by Hutchinson.

  Args:
    product: v -> H v.
    like: a tree in the structure of v.
    key: draws the probes.
    probes: number of random sign vectors; each takes one product.

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
  """Computes H_N and H_D from the clients' vectors of traces [K, J].

  H_N is twice the variance of the norms, and H_D is the squared norm of the
  mean direction. A vector of zeros counts with a direction of zero.
  """
  chex.assert_rank(vectors, 2)
  norms = jnp.linalg.norm(vectors, axis=1, keepdims=True)
  directions = vectors / jnp.where(norms > 0, norms, 1)
  return {
    'H_N': 2 * jnp.var(norms),
    'H_D': jnp.sum(jnp.mean(directions, axis=0) ** 2),
  }
