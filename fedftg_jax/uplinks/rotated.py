"""Rotated uniform quantisation: a random rotation, then equal steps.

Suresh, Yu, Kumar and McMahan, Distributed Mean Estimation with Limited
Communication, ICML 2017, arXiv:1611.00429: stochastic rounding to k levels
between the smallest and the largest entry, after a rotation that makes the
entries similar in size. With random signs d and Hadamard's matrix H,

  v = H diag(d) h / sqrt(n),   step = (max v - min v) / (k - 1).

It is unbiased, and the server rotates back. Every entry takes log2 k bits.

Deviation: instead of the whole vector, blocks of 4,096 entries are rotated,
each with its own smallest and largest entry (64 bits). This needs less padding
with zeros, which are sent, too.
"""

import math

import jax
import jax.numpy as jnp
import optax

from fedftg_jax.uplinks import coded, entropy

_BLOCK = 4096
_BLOCK_BITS = 64
_MOST_LEVELS = 2**20  # leaves float32 some bits for the fraction


def rotated(rate: float = 2.0) -> optax.GradientTransformationExtraArgs:
  """Builds rotated stochastic rounding to equal levels.

  There is no entropy coder.

  Args:
    rate: bits per parameter, at least 1: there are floor(2^rate) levels. The
      range of each block is sent in addition.

  Returns:
    The uplink.

  Raises:
    ValueError: for a rate out of range.
  """
  coded.check_rate(rate, 1)
  levels = min(int(2**rate), _MOST_LEVELS)

  def code(vector, key):
    key_signs, key_rounding = jax.random.split(key)
    size = min(_BLOCK, 2 ** math.ceil(math.log2(len(vector))))
    blocks = coded.in_blocks(vector, size)
    signs = jax.random.rademacher(key_signs, blocks.shape, blocks.dtype)
    turned = rotate(signs * blocks)
    low = jnp.min(turned, axis=1, keepdims=True)
    step = (jnp.max(turned, axis=1, keepdims=True) - low) / (levels - 1)
    uniform = jax.random.uniform(key_rounding, turned.shape, turned.dtype)
    scaled = entropy.divide(turned - low, step)
    below = jnp.floor(scaled)
    codes = jnp.clip(below + (uniform < scaled - below), 0, levels - 1)
    decoded = signs * rotate(low + step * codes)
    elias = entropy.gamma_bits(
      entropy.zigzag(codes.astype(jnp.int32) - levels // 2)
    )
    ranges = _BLOCK_BITS * len(blocks)
    return coded.Message(
      decoded.ravel()[: len(vector)],
      num_bits(blocks.size, levels) + ranges,
      jnp.sum(elias, dtype=jnp.uint32) + jnp.uint32(ranges),
    )

  return coded.codec(code)


def num_bits(size: int, levels: int) -> int:
  """Computes the length of `size` codes with `levels` possible values each."""
  return math.ceil(size * math.log2(levels))


def rotate(blocks: jax.Array) -> jax.Array:
  """Multiplies each row of [M, n] by Hadamard's matrix over sqrt(n).

  n must be a power of 2. Applied twice it is the identity.
  """
  size = blocks.shape[1]
  turned = blocks[..., None]  # [M, half, done]
  while turned.shape[1] > 1:
    pair = turned.reshape(len(blocks), turned.shape[1] // 2, 2, -1)
    some, others = pair[:, :, 0], pair[:, :, 1]
    turned = jnp.concatenate([some + others, some - others], axis=-1)
  return turned[:, 0] / math.sqrt(size)
