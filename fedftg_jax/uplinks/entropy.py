"""Counts the bits of lattice codes as they are made, without coding them.

A message has a step (one float32), a table of how often each code occurs, and
the codes, which a range coder compresses to their entropy. The coder itself is
in `coders`; its output has the length counted here, up to 1 % and 64 bits.

Codes are unbounded. A code below `EXACT` in absolute value has its own entry in
the table. Above, an entry stands for 1/64 of an octave, and the position of the
code within its entry is sent uncompressed. If a lattice determines a code
modulo m, the coder leaves out the codes that are impossible.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fedftg_jax import base
from fedftg_jax.uplinks.lattices import Lattice

EXACT_BITS, WITHIN_BITS = 8, 6
EXACT, WITHIN = 2**EXACT_BITS, 2**WITHIN_BITS
LAST = EXACT + WITHIN * (31 - EXACT_BITS)  # bins are -LAST to LAST
SCALAR_BITS = 32  # size of the step
_SEARCHED = 2**16  # largest number of parameters used to find a step
_ITERATIONS = 16
# Logarithms of the smallest and the largest step. The smallest is relative to
# the largest entry, whose code is then exact in float32; the largest is
# relative to the entries' root mean square.
_SMALLEST, _LARGEST = -22.0, 12.0


def bins(codes: base.Array) -> tuple[jax.Array, jax.Array]:
  """Finds the table entry of each code.

  Returns:
    The entries, and how many bits tell which of the entry's codes it is.
  """
  size = jnp.abs(codes)
  spare = jnp.maximum(_floor_log2(size) - WITHIN_BITS, 0)
  spare = jnp.where(size < EXACT, 0, spare)
  octave = spare + WITHIN_BITS - EXACT_BITS
  wide = EXACT + WITHIN * octave + (size >> spare) - WITHIN
  entry = jnp.where(size < EXACT, size, wide)
  return jnp.sign(codes) * entry, spare


def counts(codes: base.Array, lattice: Lattice) -> jax.Array:
  """Counts how often each entry occurs, [tables, 2 LAST + 1] int32."""
  entries, _ = bins(codes)
  tables = jnp.broadcast_to(jnp.array(lattice.table), entries.shape)
  empty = jnp.zeros((max(lattice.table) + 1, 2 * LAST + 1), jnp.int32)
  return empty.at[tables, entries + LAST].add(1)


def allowed(modulus: int) -> np.ndarray:
  """Computes, by residue, the share of an entry's codes that have it.

  An entry for several codes has equally many of each residue.

  Returns:
    [modulus, 2 LAST + 1].
  """
  entries = np.arange(-LAST, LAST + 1)
  residues = np.arange(modulus)[:, None]
  alone = np.where(entries % modulus == residues, 1.0, 0.0)
  return np.where(np.abs(entries) < EXACT, alone, 1 / modulus)


def code_bits(codes: jax.Array, lattice: Lattice) -> jax.Array:
  """Computes the length of codes [M, n] under a range coder.

  The table and the step are not included. With p the table's frequencies, a
  code of entry i with `spare` further bits takes -log2(p_i) + spare bits. If
  its residue r modulo m is known, the coder renormalises p to the possible
  codes, which saves -log2 P(r).
  """
  found = counts(codes, lattice).astype(jnp.result_type(float))
  _, spare = bins(codes)
  per_table = jnp.sum(found, axis=1)
  share = found / per_table[:, None]
  bits = -jnp.sum(found * jnp.log2(jnp.where(found > 0, share, 1)))
  bits += jnp.sum(spare).astype(bits.dtype)
  for j, (modulus, table) in enumerate(zip(lattice.modulus, lattice.table)):
    if modulus > 1:
      mass = jnp.array(allowed(modulus)) @ share[table]
      known = lattice.residue(codes, j) == jnp.arange(modulus)[:, None]
      times = jnp.sum(known, axis=1)
      bits += jnp.sum(times * jnp.log2(jnp.where(times > 0, mass, 1)))
  return bits


def table_bits(codes: jax.Array, lattice: Lattice) -> jax.Array:
  """Computes the length of the tables in Elias' gamma code.

  A table consists of its first entry, its length and its counts.
  """
  found = counts(codes, lattice)
  used = found > 0
  first, last = (
    jnp.argmax(used, axis=1),
    2 * LAST - jnp.argmax(used[:, ::-1], axis=1),
  )
  place = jnp.arange(2 * LAST + 1)
  inside = (place >= first[:, None]) & (place <= last[:, None])
  lengths = (
    jnp.where(inside, gamma_bits(found + 1), 0),
    gamma_bits(zigzag(first - LAST)),
    gamma_bits(last - first + 1),
  )
  whole = [jnp.sum(a, dtype=jnp.uint32) for a in lengths]
  return jnp.sum(jnp.stack(whole))


def message_bits(codes: jax.Array, lattice: Lattice) -> jax.Array:
  """Computes the length of a whole message, [] uint32."""
  codes_alone = jnp.ceil(code_bits(codes, lattice)).astype(jnp.uint32)
  return codes_alone + table_bits(codes, lattice) + jnp.uint32(SCALAR_BITS)


def elias_bits(codes: jax.Array, lattice: Lattice) -> jax.Array:
  """Computes the length of a message in Elias' gamma code, without a table.

  Elias, Universal Codeword Sets and Representations of the Integers, IEEE
  Transactions on Information Theory 21(2), 1975. It codes the `reduced` codes,
  with 0, -1, 1, -2 ... as 1, 2, 3, 4 ...
  """
  lengths = gamma_bits(zigzag(reduced(codes, lattice)))
  return jnp.sum(lengths, dtype=jnp.uint32) + jnp.uint32(SCALAR_BITS)


def reduced(codes: base.Array, lattice: Lattice) -> jax.Array:
  """Removes what is known of codes: (code - residue) / modulus."""
  each = [
    jnp.floor_divide(codes[..., j] - lattice.residue(codes, j), modulus)
    for j, modulus in enumerate(lattice.modulus)
  ]
  return jnp.stack(each, axis=-1)


def zigzag(values: jax.Array) -> jax.Array:
  """Maps 0, -1, 1, -2 ... to 1, 2, 3, 4 ..."""
  return jnp.where(values < 0, -2 * values, 2 * values + 1)


def gamma_bits(values: jax.Array) -> jax.Array:
  """Computes the length of each value (at least 1) in Elias' gamma code."""
  return 2 * _floor_log2(values) + 1


def _floor_log2(values):
  return 31 - jax.lax.clz(jnp.maximum(values, 1).astype(jnp.int32))


def find_step(
  blocks: jax.Array,
  lattice: Lattice,
  rate: float,
  code: Callable[[jax.Array, jax.Array], jax.Array],
  key: jax.Array,
) -> jax.Array:
  """Finds the step at which codes take `rate` bits per entry.

  It bisects the logarithm of the step. The dither is not that of the message,
  so the step does not depend on the message's dither, and the error does not
  depend on what is coded. If there are more than 65,536 entries, that many are
  sampled.

  Args:
    blocks: [M, n] what is coded.
    lattice: the lattice to be scaled.
    rate: bits per entry, of the codes alone.
    code: computes the codes [M, n] of blocks and dither, at step 1.
    key: for the random draws.

  Returns:
    The step, a scalar; 0 for blocks of zeros. If even the smallest step takes
    fewer bits, as when most entries are 0, it is the smallest step.
  """
  key_rows, key_dither = jax.random.split(key)
  size = jnp.sqrt(jnp.mean(jnp.square(blocks)))
  blocks = divide(blocks, size)
  largest = jnp.maximum(jnp.max(jnp.abs(blocks)), 1)
  num = _SEARCHED // lattice.dim
  if len(blocks) > num:
    blocks = blocks[jax.random.randint(key_rows, (num,), 0, len(blocks))]
  dither = lattice.dither(key_dither, len(blocks))

  def halve(_, bounds):
    low, high = bounds
    middle = (low + high) / 2
    codes = code(blocks / jnp.exp2(middle), dither)
    many = code_bits(codes, lattice) > rate * codes.size
    return jnp.where(many, middle, low), jnp.where(many, high, middle)

  low, high = jnp.log2(largest) + _SMALLEST, jnp.full_like(largest, _LARGEST)
  _, high = jax.lax.fori_loop(0, _ITERATIONS, halve, (low, high))
  return size * jnp.exp2(high)


def divide(blocks: jax.Array, step: jax.Array) -> jax.Array:
  """Divides `blocks` by the step; zeros if the step is 0."""
  return blocks / jnp.where(step == 0, 1, step)
