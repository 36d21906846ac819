"""Top-k: only the largest entries are sent; the rest is kept for later.

Stich, Cordonnier and Jaggi, Sparsified SGD with Memory, NeurIPS 2018,
arXiv:1809.07599. With e_k what client k has not sent yet,

  v = w_k - w + e_k,   sent: the k entries of v of largest magnitude,
  e_k <- v minus what is sent.

k is the largest number that fits the requested bits, which both sides know: the
value of an entry takes 32 bits, and the positions of the entries take P H(k /
P), the entropy of a mask. What a client sends but does not arrive is lost,
since e_k no longer has it.
"""

import math

import jax
import jax.numpy as jnp
import optax

from fedftg_jax.uplinks import coded, entropy

_VALUE_BITS = 32


def top_k(rate: float = 2.0) -> optax.GradientTransformationExtraArgs:
  """Builds top-k sparsification with error feedback.

  Args:
    rate: bits per parameter, of the whole message.

  Returns:
    The uplink; it keeps a residual of the model's size on every client.

  Raises:
    ValueError: for a rate out of range.
  """
  coded.check_rate(rate)

  def code(vector, key):
    del key
    num = num_kept(len(vector), rate)
    _, places = jax.lax.top_k(jnp.abs(vector), num)
    mask = jnp.zeros(len(vector), bool).at[places].set(True)
    places = jnp.sort(places)
    gaps = jnp.diff(places, prepend=-1)
    elias = jnp.sum(entropy.gamma_bits(gaps), dtype=jnp.uint32)
    return coded.Message(
      jnp.where(mask, vector, 0),
      num_bits(len(vector), num),
      elias + jnp.uint32(_VALUE_BITS * num),
    )

  return coded.codec(code, error_feedback=True)


def num_bits(size: int, num: int) -> int:
  """Computes the length of a message with `num` of `size` entries."""
  share = num / size
  mask = sum(-p * math.log2(p) for p in (share, 1 - share) if p > 0)
  return _VALUE_BITS * num + math.ceil(size * mask)


def num_kept(size: int, rate: float) -> int:
  """Computes how many entries fit a message of `rate` bits per entry.

  It is the largest number, but at least 1, of the `size` entries.
  """
  low, high = 1, size
  while low < high:
    middle = (low + high + 1) // 2
    fits = num_bits(size, middle) <= rate * size
    low, high = (middle, high) if fits else (low, middle - 1)
  return low
