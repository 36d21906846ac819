"""A large array that is read and written: the bytes that memory can move."""

import jax
import jax.numpy as jnp

PACKAGES = ('jax',)
_BYTES = 2**28  # of the array


def prepare(workload):
  del workload
  step = jax.jit(lambda a: a + 1, donate_argnums=0)
  array = jnp.zeros(_BYTES // 4)

  def round_():
    nonlocal array
    array = jax.block_until_ready(step(array))

  return round_


def cost(workload):
  """Returns floating-point operations and bytes moved."""
  del workload
  return {'gflop': _BYTES / 4 / 1e9, 'gbyte': 2 * _BYTES / 1e9}
