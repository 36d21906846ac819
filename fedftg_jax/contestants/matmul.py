"""A large matrix product: the arithmetic that the device can do at most."""

import jax
import jax.numpy as jnp

PACKAGES = ('jax',)
_REPEAT = 10  # products in a round, so that starting them does not count


def prepare(workload):
  size = _size()
  dtype = jnp.bfloat16 if workload.bfloat16 else jnp.float32
  a = jax.random.normal(jax.random.key(0), (size, size), dtype)

  @jax.jit
  def products(a):
    def one(_, b):
      return (a @ b) / size**0.5

    return jax.lax.fori_loop(0, _REPEAT, one, a)

  return lambda: jax.block_until_ready(products(a))


def cost(workload):
  """Returns floating-point operations and bytes moved at least."""
  size, width = _size(), 2 if workload.bfloat16 else 4
  return {
    'gflop': _REPEAT * 2 * size**3 / 1e9,
    'gbyte': _REPEAT * 3 * width * size**2 / 1e9,
  }


def _size():
  return 1024 if jax.default_backend() == 'cpu' else 8192
