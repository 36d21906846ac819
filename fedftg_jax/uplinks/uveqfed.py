"""UVeQFed: subtractive dithered lattice quantisation.

Shlezinger, Chen, Eldar, Poor and Cui, UVeQFed: Universal Vector Quantization
for Federated Learning, IEEE Transactions on Signal Processing 69, 2021,
arXiv:2006.03262. The vector h is cut into blocks h_i, each with as many entries
as the lattice has dimensions. With step s and a dither z_i, uniform on the
lattice's cell and known to client and server,

  q_i = Q(h_i / s + z_i)         (Q: the nearest point of the lattice)
  decoded h_i = s (q_i - z_i).

The error is then uniform on the cell, whatever h is, and has mean 0, so it
averages out over clients. s is the paper's zeta ||h|| times the lattice's
scale.

The paper's text could not be read beyond its abstract. Deviations from the
released code: s is found by bisection so that the codes' entropy is the
requested number of bits per parameter, while it chooses zeta = (2 + rate / 5) /
sqrt(number of blocks) and a cell of volume 2^(-rate n), and reports the
resulting rate; there are the lattices D4 and E8; its dither is smaller than the
cell and its code book is bounded, which is not the case here.
"""

import jax
import optax

from fedftg_jax.uplinks import coded, entropy
from fedftg_jax.uplinks.lattices import LATTICES, Lattice


def uveqfed(
  rate: float = 2.0, lattice: str = 'a2'
) -> optax.GradientTransformationExtraArgs:
  """Builds UVeQFed: subtractive dithered quantisation with an entropy coder.

  Args:
    rate: bits per parameter, measured as the entropy of the codes. A message
      also has a table and a step.
    lattice: a name in `LATTICES`: 'z', 'a2' (the paper's), 'd4' or 'e8'.

  Returns:
    The uplink.

  Raises:
    ValueError: for a rate out of range, or an unknown lattice.
  """
  coded.check_rate(rate)
  if lattice not in LATTICES:
    raise ValueError(
      f'the lattice must be one of {tuple(LATTICES)}, got {lattice!r}.'
    )
  cell = LATTICES[lattice]

  def code(vector, key):
    key_step, key_dither = jax.random.split(key)
    blocks = coded.in_blocks(vector, cell.dim)
    step = entropy.find_step(blocks, cell, rate, cell_codes, key_step)
    dither = cell.dither(key_dither, len(blocks))
    codes = cell_codes(entropy.divide(blocks, step), dither)
    decoded = decode(codes, dither, step, cell).ravel()[: len(vector)]
    return coded.Message(
      decoded,
      entropy.message_bits(codes, cell),
      entropy.elias_bits(codes, cell),
    )

  def cell_codes(scaled, dither):
    return encode(scaled, dither, cell)

  return coded.codec(code)


def encode(scaled: jax.Array, dither: jax.Array, lattice: Lattice) -> jax.Array:
  """Codes blocks [M, n], divided by the step, with their dither [M, n]."""
  return lattice.nearest(scaled + dither)


def decode(
  codes: jax.Array, dither: jax.Array, step: jax.Array, lattice: Lattice
) -> jax.Array:
  """Decodes codes to blocks [M, n]."""
  return step * (lattice.points(codes) - dither)
