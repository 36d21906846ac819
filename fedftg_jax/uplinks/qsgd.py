"""QSGD: stochastic rounding of every parameter.

Alistarh, Grubic, Li, Tomioka and Vojnovic, QSGD: Communication-Efficient SGD
via Gradient Quantization and Encoding, NeurIPS 2017, arXiv:1610.02132. With s
levels up to the norm of the vector v, and step = ||v|| / s,

  decoded v_i = step (floor(v_i / step) + b_i),   P(b_i = 1) = frac(v_i / step),

which is unbiased. Its error depends on v, and is twice that of rounding whose
dither is subtracted again (`uveqfed` on 'z').

Deviations: there is one norm for the whole vector, without buckets; s need not
be an integer, and is chosen to give the requested entropy; the reported length
is that of a range coder, beside that of Elias' code, which is the paper's.
"""

import jax
import optax

from fedftg_jax.uplinks import coded, entropy
from fedftg_jax.uplinks.lattices import LATTICES


def qsgd(rate: float = 2.0) -> optax.GradientTransformationExtraArgs:
  """Builds QSGD: stochastic rounding with an entropy coder.

  Args:
    rate: bits per parameter, measured as the entropy of the codes. A message
      also has a table and a step.

  Returns:
    The uplink.

  Raises:
    ValueError: for a rate out of range.
  """
  coded.check_rate(rate)
  integers = LATTICES['z']

  def rounded(scaled, dither):
    return integers.nearest(scaled + dither)

  def code(vector, key):
    key_step, key_dither = jax.random.split(key)
    blocks = vector[:, None]
    step = entropy.find_step(blocks, integers, rate, rounded, key_step)
    dither = integers.dither(key_dither, len(blocks))
    codes = rounded(entropy.divide(blocks, step), dither)
    return coded.Message(
      (step * codes)[:, 0],
      entropy.message_bits(codes, integers),
      entropy.elias_bits(codes, integers),
    )

  return coded.codec(code)
