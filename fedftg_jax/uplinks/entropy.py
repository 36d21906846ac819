"""Counts the bits of lattice codes while they are made, without coding them.

A message is a step (one float32), a table of how often each code occurs, and
the codes, which a range coder shortens to their entropy. `coders` has the coder
itself; its output is as long as is counted here, but for 1 % and 64 bits.

Codes have no bound. Up to `EXACT` in absolute value each has an entry of its
own in the table; above, an entry stands for 1/64 of an octave, and which of its
codes is meant is sent as it is. Where a lattice says what a code is modulo m,
the coder leaves out the codes that cannot be.
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
SCALAR_BITS = 32  # of the step
_SEARCHED = 2**16  # parameters on which a step is looked for, at most
_ITERATIONS = 16
# Logarithms of steps: the smallest of the largest entry's size, whose code then
# is exact in float32; the largest of the entries' root mean square.
_SMALLEST, _LARGEST = -22.0, 12.0


def bins(codes: base.Array) -> tuple[jax.Array, jax.Array]:
  """The entry of the table that each code belongs to, and how many bits say
  which of the entry's codes it is."""
  size = jnp.abs(codes)
  spare = jnp.maximum(_floor_log2(size) - WITHIN_BITS, 0)
  spare = jnp.where(size < EXACT, 0, spare)
  octave = spare + WITHIN_BITS - EXACT_BITS
  wide = EXACT + WITHIN * octave + (size >> spare) - WITHIN
  entry = jnp.where(size < EXACT, size, wide)
  return jnp.sign(codes) * entry, spare


def counts(codes: base.Array, lattice: Lattice) -> jax.Array:
  """How often each entry of each table occurs: [tables, 2 LAST + 1] int32."""
  entries, _ = bins(codes)
  tables = jnp.broadcast_to(jnp.array(lattice.table), entries.shape)
  empty = jnp.zeros((max(lattice.table) + 1, 2 * LAST + 1), jnp.int32)
  return empty.at[tables, entries + LAST].add(1)


def allowed(modulus: int) -> np.ndarray:
  """By residue the share of an entry's codes that have it, [modulus, 2 LAST +
  1]. An entry for several codes has equally many of each residue."""
  entries = np.arange(-LAST, LAST + 1)
  residues = np.arange(modulus)[:, None]
  alone = np.where(entries % modulus == residues, 1.0, 0.0)
  return np.where(np.abs(entries) < EXACT, alone, 1 / modulus)


def code_bits(codes: jax.Array, lattice: Lattice) -> jax.Array:
  """The length of codes [M, n] under a range coder, without table and step.

  With p the table's frequencies, a code of entry i and `spare` further bits
  takes -log2(p_i) + spare bits. Where its residue r modulo m is known, the
  coder renormalises p to what is possible, which saves -log2 P(r).
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
  """The length of the tables: where each begins, how long it is, and its
  counts, in Elias' gamma code."""
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
  """The length of a whole message, [] uint32."""
  codes_alone = jnp.ceil(code_bits(codes, lattice)).astype(jnp.uint32)
  return codes_alone + table_bits(codes, lattice) + jnp.uint32(SCALAR_BITS)


def elias_bits(codes: jax.Array, lattice: Lattice) -> jax.Array:
  """The length of a message in Elias' gamma code, which needs no table.

  Elias, Universal Codeword Sets and Representations of the Integers, IEEE
  Transactions on Information Theory 21(2), 1975; of `reduced` codes, 0, -1, 1,
  -2 ... as 1, 2, 3, 4 ...
  """
  lengths = gamma_bits(zigzag(reduced(codes, lattice)))
  return jnp.sum(lengths, dtype=jnp.uint32) + jnp.uint32(SCALAR_BITS)


def reduced(codes: base.Array, lattice: Lattice) -> jax.Array:
  """Codes without what is known of them: (code - residue) / modulus."""
  each = [
    jnp.floor_divide(codes[..., j] - lattice.residue(codes, j), modulus)
    for j, modulus in enumerate(lattice.modulus)
  ]
  return jnp.stack(each, axis=-1)


def zigzag(values: jax.Array) -> jax.Array:
  """0, -1, 1, -2 ... as 1, 2, 3, 4 ..."""
  return jnp.where(values < 0, -2 * values, 2 * values + 1)


def gamma_bits(values: jax.Array) -> jax.Array:
  """The length of each value from 1 on in Elias' gamma code."""
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

  Bisection of its logarithm. The dither is another one than that of the
  message, so that the step does not depend on the latter, and with it the error
  not on what is coded. Of more than 65,536 entries so many are drawn.

  Args:
    blocks: [M, n] what is coded.
    lattice: whose scale is looked for.
    rate: bits per entry, of the codes alone.
    code: codes [M, n] of blocks and dither, at step 1.
    key: of the draws.

  Returns:
    The step, a scalar; 0 for blocks of zeros. Where even the smallest one takes
    fewer bits, as where most entries are 0, the smallest.
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
  """`blocks` in steps; zeros where the step is 0."""
  return blocks / jnp.where(step == 0, 1, step)
