"""One SGD step of all clients of a workload, in one program of ours.

It is what a round repeats, without the choice of the batches and without the
mean. `cost` has what the compiler counts for it.
"""

import functools

import jax
import jax.numpy as jnp

from fedftg_jax import losses
from fedftg_jax.contestants import ours, workloads

PACKAGES = ('jax',)


def prepare(workload, **options):
  compiled, start, x, y = _compiled(workload, **options)
  stacked = jax.tree.map(jnp.copy, start)  # a step overwrites it

  def round_():
    nonlocal stacked
    stacked = jax.block_until_ready(compiled(stacked, x, y))

  return round_


def cost(workload, **options):
  """Returns floating-point operations and bytes moved, as XLA counts them."""
  found = _compiled(workload, **options)[0].cost_analysis()
  return {'gflop': found['flops'] / 1e9, 'gbyte': found['bytes accessed'] / 1e9}


def program(workload, conv=None):
  """Makes the jitted step and the function that makes its arguments."""
  if workload.iterations:
    raise NotImplementedError('no server step')
  model = ours.make_model(workload, conv)

  def step(variables, x, y):
    def loss(params):
      output = model.apply(variables._replace(params=params), x, train=True)
      return losses.cross_entropy(output.logits, y), output.stats

    grads, stats = jax.grad(loss, has_aux=True)(variables.params)
    params = jax.tree.map(
      lambda p, g: p - workloads.LEARNING_RATE * g, variables.params, grads
    )
    return variables._replace(params=params, stats=stats)

  def start():
    variables = model.init(jax.random.key(0))
    stacked = jax.tree.map(
      lambda leaf: jnp.stack([leaf] * workload.cohort), variables
    )
    x, y = (
      jnp.asarray(a[:, : workload.batch_size])
      for a in workloads.examples(workload)
    )
    return stacked, x, y

  return jax.jit(jax.vmap(step), donate_argnums=0), start


@functools.cache  # for both functions
def _compiled(workload, conv=None):
  step, start = program(workload, conv)
  arguments = jax.jit(start)()
  return step.lower(*arguments).compile(), *arguments
