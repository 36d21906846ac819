"""JAX without a simulator: a Python loop over clients, one jitted step.

It uses `lax.conv`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedftg_jax.contestants import ours, workloads

PACKAGES = ('jax',)


def prepare(workload):
  if workload.iterations:
    raise NotImplementedError('no server step')
  conv = None if workload.model == 'mlp' else 'lax'
  model = ours.make_model(workload, conv)
  x, y = map(jnp.asarray, workloads.examples(workload))
  current = jax.jit(model.init)(jax.random.key(0))
  rng = np.random.default_rng(0)

  @jax.jit
  def step(variables, x, y, rows):
    def loss(params):
      output = model.apply(
        variables._replace(params=params), x[rows], train=True
      )
      return jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(output.logits, y[rows])
      ), output.stats

    grads, stats = jax.grad(loss, has_aux=True)(variables.params)
    params = jax.tree.map(
      lambda p, g: p - workloads.LEARNING_RATE * g, variables.params, grads
    )
    return variables._replace(params=params, stats=stats)

  @jax.jit
  def add(total, variables):
    return jax.tree.map(lambda t, v: t + v / workload.cohort, total, variables)

  def round_():
    nonlocal current
    mean = jax.tree.map(jnp.zeros_like, current)
    for k in range(workload.cohort):
      variables = current
      order = rng.permutation(workload.num_examples)
      for rows in order.reshape(-1, workload.batch_size):
        variables = step(variables, x[k], y[k], rows)
      mean = add(mean, variables)
    current = jax.block_until_ready(mean)

  return round_
