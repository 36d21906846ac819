"""Tests of codecs: lattices, dither, counted and written bits, rounds."""

import functools
import itertools
import json
import math
import pathlib

from absl.testing import absltest, parameterized
import chex
import jax
from jax import enable_x64
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import linalg, stats

from fedftg_jax import base, federation, keys, recipes, uplinks
from fedftg_jax.methods import fed_avg
from fedftg_jax.programs import train
from fedftg_jax.runs import writer
from fedftg_jax.uplinks import coded, coders, entropy, uveqfed
from fedftg_jax.uplinks import rotated as rotated_lib
from fedftg_jax.uplinks import top_k as top_k_lib
from fedftg_jax.uplinks.lattices import LATTICES
from tests import methods_test, problems, programs

KEY = jax.random.key(3)
GOLDEN = np.load(pathlib.Path(__file__).parent / 'golden' / 'uplinks.npz')
# The lattices of the specification, in the order of the golden file.
NAMES = ('z', 'a2', 'd4', 'e8')
CODECS = ('uveqfed', 'qsgd', 'top_k', 'rotated')
# The number of parameters of `problems.LINEAR`.
WORDS = 64 * problems.NUM_CLASSES + problems.NUM_CLASSES


def golden(name, what):
  return GOLDEN[f'lat_{name.upper()}_{what}']


def coordinates(name, codes):
  """Converts codes to coordinates in the golden file's basis."""
  points = np.asarray(LATTICES[name].points(codes))
  return np.linalg.solve(golden(name, 'gen'), points.T).T


@functools.cache
def vectors(name):
  """Returns all short vectors of a lattice that can bound its cell."""
  if name == 'e8':
    sides = itertools.product((-0.5, 0.5), repeat=8)
    half = [v for v in sides if sum(v) % 2 == 0]
    whole = [
      np.eye(8)[i] * a + np.eye(8)[j] * b
      for i, j in itertools.combinations(range(8), 2)
      for a, b in itertools.product((-1, 1), repeat=2)
    ]
    return np.array([*half, *whole])
  basis = np.array(LATTICES[name].basis)
  steps = itertools.product(range(-2, 3), repeat=len(basis))
  found = np.array([np.array(step) @ basis for step in steps])
  return found[(found**2).sum(1) > 0]


def of(name, *changes):
  """Builds a codec by name, compiled: (vector, key, state) -> (decoded,
  state)."""
  codec = uplinks.build(name, *changes)

  @jax.jit
  def code(vector, key, state=None):
    state = codec.init(vector) if state is None else state
    return codec.update(vector, state, key=key)

  return code


@functools.cache
def compiled(name, rate=2.0, lattice='a2'):
  return of(name, rate, lattice)


def gaussian(num, seed=0, scale=1.0):
  return scale * jax.random.normal(jax.random.key(seed), (num,))


@functools.partial(jax.jit, static_argnums=0)
def coded_and_counted(name, x):
  """Returns the codes of a vector, and the length of their message, twice."""
  lattice = LATTICES[name]
  x = coded.in_blocks(x, lattice.dim)
  codes = lattice.nearest(x + lattice.dither(KEY, len(x)))
  return (
    codes,
    entropy.message_bits(codes, lattice),
    entropy.elias_bits(codes, lattice),
  )


def heavy_tailed(num, seed=0):
  """Draws entries of very different size, as updates have."""
  return jnp.asarray(
    np.random.RandomState(seed).standard_t(2.5, num).astype(np.float32)
  )


class LatticeTest(parameterized.TestCase):
  @parameterized.parameters(*NAMES)
  def test_golden_points(self, name):
    with enable_x64(True):
      codes = LATTICES[name].nearest(jnp.asarray(golden(name, 'x')))
      points = np.asarray(LATTICES[name].points(codes))
      np.testing.assert_allclose(points, golden(name, 'q'), rtol=0, atol=1e-12)
      found = coordinates(name, codes)
    np.testing.assert_array_equal(np.round(found), golden(name, 'coord'))
    np.testing.assert_allclose(found, np.round(found), rtol=0, atol=1e-9)

  @parameterized.parameters(*NAMES)
  def test_no_point_is_nearer(self, name):
    """An error is in the cell: no short vector is nearer to it than 0."""
    lattice, near = LATTICES[name], vectors(name)
    x = np.random.RandomState(1).normal(0, 3, (2000, lattice.dim))
    with enable_x64(True):
      error = x - np.asarray(lattice.points(lattice.nearest(jnp.asarray(x))))
    over = error @ near.T - (near**2).sum(1) / 2
    self.assertLess(over.max(), 1e-9)

  def test_golden_constants(self):
    for i, name in enumerate(NAMES):
      lattice = LATTICES[name]
      self.assertAlmostEqual(lattice.second_moment, GOLDEN['nsm'][i], places=12)
      self.assertAlmostEqual(
        lattice.volume, GOLDEN['cell_volume'][i], places=12
      )

  @parameterized.parameters(*NAMES)
  def test_what_is_known_of_codes(self, name):
    lattice = LATTICES[name]
    x = 5 * jax.random.normal(KEY, (500, lattice.dim))
    codes = np.asarray(lattice.nearest(x))
    known = np.asarray(lattice.residues(codes))
    np.testing.assert_array_equal(
      (codes - known) % np.array(lattice.modulus), 0
    )
    # The number of classes is the factor by which the codes are sparser than
    # integers along the axes.
    share = lattice.volume / np.prod(lattice.unit)
    self.assertAlmostEqual(np.prod(lattice.modulus), share, places=9)

  @parameterized.parameters(*NAMES)
  def test_dither_fills_the_cell(self, name):
    """Its variance is that of the whole cell, and no point is nearer."""
    lattice = LATTICES[name]
    with enable_x64(True):
      dither = np.asarray(lattice.dither(KEY, 100_000))
    np.testing.assert_allclose((dither**2).mean(), lattice.variance, rtol=0.005)
    near = vectors(name)
    over = dither[:20_000] @ near.T - (near**2).sum(1) / 2
    self.assertBetween(over.max(), -0.02, 1e-9)

  def test_dither_reaches_the_tips_of_the_hexagon(self):
    """The tips above and below a quarter of the row distance are 1/12 of its
    area."""
    dither = np.asarray(LATTICES['a2'].dither(KEY, 100_000))
    tips = np.mean(np.abs(dither[:, 1]) > math.sqrt(3) / 4)
    self.assertAlmostEqual(tips, 1 / 12, delta=0.003)


class ErrorTest(parameterized.TestCase):
  """The error of subtractive dither does not depend on what is coded."""

  NUM = 200_000
  INPUTS = {
    'zero': lambda shape: jnp.zeros(shape),
    'constant': lambda shape: jnp.full(shape, 0.37),
    'small': lambda shape: 0.3 * jax.random.normal(jax.random.key(9), shape),
    'large': lambda shape: 3 * jax.random.normal(jax.random.key(9), shape),
  }

  def errors(self, name):
    """Returns the errors [NUM, n] by input, each with a dither of its own."""
    lattice = LATTICES[name]

    @jax.jit
    def error(x, key):
      dither = lattice.dither(key, self.NUM)
      codes = uveqfed.encode(x, dither, lattice)
      return uveqfed.decode(codes, dither, 1.0, lattice) - x

    shape = self.NUM, lattice.dim
    return {
      kind: np.asarray(error(make(shape), jax.random.fold_in(KEY, i)))
      for i, (kind, make) in enumerate(self.INPUTS.items())
    }

  @parameterized.parameters(*NAMES)
  def test_moments_and_independence(self, name):
    lattice, errors = LATTICES[name], self.errors(name)
    variance = lattice.variance
    for kind, error in errors.items():
      np.testing.assert_allclose(
        (error**2).mean(), variance, rtol=0.005, err_msg=kind
      )
      bias = np.abs(error.mean(0)).max()
      self.assertLess(bias, 4 * math.sqrt(variance / self.NUM), kind)
      covariance = error.T @ error / self.NUM
      np.testing.assert_allclose(
        covariance, variance * np.eye(lattice.dim), atol=0.02 * variance
      )
    first = errors.pop('zero')
    for kind, error in errors.items():
      for i in (0, lattice.dim - 1):
        found = stats.ks_2samp(first[:, i], error[:, i])
        self.assertGreater(found.pvalue, 0.01, kind)

  def test_half_of_the_dither_is_seen(self):
    """The released code's scalar path has the bias and error derived for it.

    The test above would not let it pass.
    """
    grid = (jnp.arange(20_000) + 0.5) / 20_000 - 0.5
    for u, bias, mse in GOLDEN['halfdither_u_bias_mse']:
      dither = grid[:, None] / 2
      codes = uveqfed.encode(jnp.float32(u), dither, LATTICES['z'])
      error = uveqfed.decode(codes, dither, 1.0, LATTICES['z']) - u
      self.assertAlmostEqual(float(jnp.mean(error)), bias, delta=2e-4)
      self.assertAlmostEqual(float(jnp.mean(error**2)), mse, delta=2e-4)

  @parameterized.parameters('z', 'a2')
  def test_golden_end_to_end(self, name):
    lattice = LATTICES[name]
    coord, hhat, z, meta = (
      GOLDEN[f'uv_{name.upper()}_{what}']
      for what in ('coord', 'hhat', 'z', 'meta')
    )
    _, _, zeta, norm, scale, energy, *_, rate = meta
    h = GOLDEN['uv_h']
    with enable_x64(True):
      blocks = coded.in_blocks(jnp.asarray(h), lattice.dim)
      step = zeta * norm * scale
      dither = jnp.asarray(z) / scale
      codes = uveqfed.encode(blocks / step, dither, lattice)
      decoded = uveqfed.decode(codes, dither, step, lattice)
      np.testing.assert_array_equal(np.round(coordinates(name, codes)), coord)
      np.testing.assert_allclose(decoded.ravel()[: len(h)], hhat, atol=1e-12)

      # Theorem 1, over draws of the dither, including the padding.
      def drawn(key):
        dither = lattice.dither(key, len(blocks))
        codes = uveqfed.encode(blocks / step, dither, lattice)
        error = uveqfed.decode(codes, dither, step, lattice) - blocks
        return jnp.sum(error**2)

      found = jnp.mean(jax.vmap(drawn)(jax.random.split(KEY, 2000)))
      self.assertAlmostEqual(
        blocks.size * step**2 * lattice.variance, energy, places=12
      )
      np.testing.assert_allclose(found, energy, rtol=0.02)
    _, counts = np.unique(np.asarray(codes), axis=0, return_counts=True)
    share = counts / counts.sum()
    joint = -(share * np.log2(share)).sum() * len(codes) / len(h)
    self.assertAlmostEqual(joint, rate, delta=0.03)

  def test_gain_of_the_hexagonal_lattice(self):
    """Compares with integers on a Gaussian in decibels, both at 2 bits.

    The bits are those of a coder. The errors themselves are compared, too.
    """
    h = gaussian(400_000)

    def error(name):
      lattice = LATTICES[name]
      blocks = coded.in_blocks(h, lattice.dim)
      dither = lattice.dither(KEY, len(blocks))
      bits = jax.jit(
        lambda step: entropy.code_bits(
          uveqfed.encode(blocks / step, dither, lattice), lattice
        )
      )
      low, high = -2.0, 2.0
      for _ in range(14):
        middle = (low + high) / 2
        many = float(bits(2**middle)) > 2 * len(h)
        low, high = (middle, high) if many else (low, middle)
      return lattice.variance * 4**high

    scalar, hexagonal = error('z'), error('a2')
    self.assertAlmostEqual(scalar, 0.1084, delta=0.001)
    self.assertAlmostEqual(hexagonal, 0.1035, delta=0.001)
    self.assertAlmostEqual(10 * math.log10(scalar / hexagonal), 0.2, delta=0.03)

  @parameterized.parameters('uveqfed', 'qsgd', 'rotated')
  def test_errors_average_out(self, name):
    """Over clients with different keys the error falls as 1 / K.

    With the same key, if nothing but the dither is random, it does not fall.
    """
    code, h = compiled(name), gaussian(4096)
    keys_ = jax.random.split(KEY, 64)
    decoded = np.asarray(jax.vmap(lambda key: code(h, key)[0])(keys_))
    errors = (decoded - np.asarray(h)).reshape(4, 16, -1)

    def energy(num):  # of the mean of `num` errors
      means = errors.reshape(-1, num, errors.shape[-1]).mean(1)
      return np.mean(means**2)

    slope = np.polyfit(
      np.log([1, 4, 16]), np.log([energy(k) for k in (1, 4, 16)]), 1
    )[0]
    self.assertAlmostEqual(slope, -1, delta=0.05)
    again = np.asarray(code(h, keys_[0])[0])
    np.testing.assert_array_equal(again, decoded[0])

  @parameterized.parameters(*NAMES)
  def test_no_input_overloads_the_lattice(self, name):
    """The error of an entry a thousand times larger is no larger than
    others."""
    lattice = LATTICES[name]
    h = gaussian(4096).at[7].set(1000.0)
    decoded, state = compiled('uveqfed', 4.0, name)(h, KEY)
    error = np.asarray(decoded - h)
    radius = {'z': 0.5, 'a2': 3**-0.5, 'd4': 1.0, 'e8': 1.0}[name]
    step = math.sqrt(np.mean(error**2) / lattice.variance)
    self.assertLess(np.abs(error).max(), 1.05 * radius * step)
    self.assertLess(state.columns['rate'], 4.5)


class EntropyTest(parameterized.TestCase):
  def test_by_hand(self):
    """The codes 0, 0, 1, -1 take 1.5 bits each.

    The table begins at -1 (3 bits), has length 3 (3 bits) and counts 1, 2, 1 (3
    bits each). In Elias' code they take 1, 1, 3, 2 bits.
    """
    codes = jnp.array([[0], [0], [1], [-1]])
    lattice = LATTICES['z']
    self.assertEqual(entropy.code_bits(codes, lattice), 6)
    self.assertEqual(entropy.table_bits(codes, lattice), 3 + 3 + 9)
    self.assertEqual(entropy.message_bits(codes, lattice), 6 + 15 + 32)
    self.assertEqual(entropy.elias_bits(codes, lattice), 8 + 32)

  def test_what_is_known_is_not_paid_for(self):
    """In D4 the parity of the last code is known.

    For integers whose halves are even, this saves one bit per block.
    """
    codes = jnp.array(
      [[a, b, c, (a + b + c) % 2] for a, b, c in np.ndindex(2, 2, 2)]
    )
    bits = entropy.code_bits(codes, LATTICES['d4'])
    self.assertAlmostEqual(float(bits), 8 * 3, places=4)

  def test_bins(self):
    """Every code belongs to one entry, which has as many codes as its bits
    say."""
    codes = np.arange(-70_000, 70_000)
    entries, spare = map(np.asarray, entropy.bins(jnp.asarray(codes)))
    self.assertTrue((np.diff(entries) >= 0).all())
    _, places, counts = np.unique(
      entries[np.abs(codes) < 2**16], return_index=True, return_counts=True
    )
    inside = spare[np.abs(codes) < 2**16]
    np.testing.assert_array_equal(counts, 2 ** inside[places])
    largest, _ = entropy.bins(jnp.array([2**31 - 1, 1 - 2**31]))
    np.testing.assert_array_less(np.abs(largest), entropy.LAST + 1)

  @parameterized.product(name=NAMES, scale=(0.001, 0.3, 2.0, 300.0))
  def test_counted_bits_are_those_of_the_coders(self, name, scale):
    self.check_coders(name, scale * heavy_tailed(9000))

  @parameterized.parameters(*NAMES)
  def test_short_messages(self, name):
    self.check_coders(name, heavy_tailed(150))

  def check_coders(self, name, x):
    lattice = LATTICES[name]
    codes, counted, elias = map(np.asarray, coded_and_counted(name, x))
    counted = int(counted)
    words = coders.range_encode(codes, 0.1, lattice)
    self.assertAlmostEqual(32 * len(words), counted, delta=0.01 * counted + 64)
    got, step = coders.range_decode(words, len(codes), lattice)
    np.testing.assert_array_equal(got, codes)
    self.assertEqual(step, np.float32(0.1))
    bits = coders.elias_encode(codes, 0.1, lattice)
    self.assertLen(bits, elias)
    got, step = coders.elias_decode(bits, len(codes), lattice)
    np.testing.assert_array_equal(got, codes)
    self.assertEqual(step, np.float32(0.1))

  def test_gamma_code(self):
    bits = coders.gamma_encode(np.array([1, 2, 3, 4, 9]))
    self.assertEqual(''.join(map(str, bits)), '1010011001000001001')
    got = coders.gamma_decode(iter(bits.tolist()), 5)
    self.assertEqual(got.tolist(), [1, 2, 3, 4, 9])

  @parameterized.product(name=NAMES, rate=(1.0, 2.0, 4.0))
  def test_the_asked_rate(self, name, rate):
    """The codes of a message have the rate, and the message little more.

    There are more parameters than the search uses.
    """
    h = heavy_tailed(100_001)
    _, state = compiled('uveqfed', rate, name)(h, KEY)
    table = 3000 * rate / len(h)
    self.assertBetween(state.columns['rate'], 0.99 * rate, 1.01 * rate + table)
    self.assertAlmostEqual(
      float(state.columns['rate']), int(state.bits) / len(h), places=5
    )


class CodecTest(parameterized.TestCase):
  @parameterized.parameters(*CODECS)
  def test_zeros(self, name):
    decoded, state = compiled(name)(jnp.zeros(300), KEY)
    np.testing.assert_array_equal(decoded, 0)
    self.assertLess(state.bits, 3.7 * 300)  # `rotated` pads 300 to 512

  @parameterized.parameters(*CODECS)
  def test_trees_and_scales(self, name):
    """The structure is kept; a factor of 2 passes through."""
    tree = {'a': gaussian(12).reshape(3, 4), 'b': [gaussian(5, 1), gaussian(1)]}
    once, state = compiled(name, 4.0)(tree, KEY)
    twice, _ = compiled(name, 4.0)(optax.tree.scale(2.0, tree), KEY)
    chex.assert_trees_all_equal_shapes_and_dtypes(once, tree)
    chex.assert_trees_all_equal(optax.tree.scale(2.0, once), twice)
    chex.assert_shape(state.bits, ())

  @parameterized.parameters(*CODECS)
  def test_a_high_rate_is_no_codec(self, name):
    h = heavy_tailed(3000)
    decoded, _ = compiled(name, 32.0)(h, KEY)
    # A rotation adds up the rounding errors of a block in its first entry.
    tolerance = (2e-6 if name == 'rotated' else 1e-6) * jnp.max(jnp.abs(h))
    np.testing.assert_allclose(decoded, h, rtol=0, atol=float(tolerance))

  @parameterized.parameters('uveqfed', 'qsgd', 'rotated')
  def test_unbiased(self, name):
    h = gaussian(64)
    codec = uplinks.build(name, 2.0, 'a2')
    drawn = jax.jit(
      jax.vmap(lambda key: codec.update(h, codec.init(h), key=key)[0])
    )(jax.random.split(KEY, 1000))
    spread = jnp.std(drawn, axis=0) / math.sqrt(len(drawn))
    self.assertLess(float(jnp.max(jnp.abs(jnp.mean(drawn, 0) - h) / spread)), 5)

  def test_twice_the_error_where_dither_stays(self):
    """QSGD is `uveqfed` on integers without subtracting the dither."""
    h = gaussian(100_000)
    (subtractive, _), (plain, _) = (
      compiled(*args)(h, KEY) for args in (('uveqfed', 4.0, 'z'), ('qsgd', 4.0))
    )
    ratio = jnp.sum((plain - h) ** 2) / jnp.sum((subtractive - h) ** 2)
    np.testing.assert_allclose(ratio, 2, rtol=0.01)

  def test_top_k_keeps_the_largest_and_the_rest(self):
    """What is sent and what remains add up, over rounds."""
    code = compiled('top_k')
    h = heavy_tailed(3000)
    num = top_k_lib.num_kept(3000, 2.0)
    sent, state = code(h, KEY)
    order = np.argsort(-np.abs(np.asarray(h)))
    want = np.zeros(3000, np.float32)
    want[order[:num]] = np.asarray(h)[order[:num]]
    np.testing.assert_array_equal(sent, want)
    np.testing.assert_array_equal(state.residual, h - sent)
    again, after = code(h, KEY, state)
    np.testing.assert_allclose(again + after.residual, h + state.residual)

  def test_top_k_fills_its_bits(self):
    for size, rate in ((195, 2.0), (3000, 0.5), (100_000, 4.0)):
      num = top_k_lib.num_kept(size, rate)
      self.assertLessEqual(top_k_lib.num_bits(size, num), rate * size)
      self.assertGreater(top_k_lib.num_bits(size, num + 1), rate * size)
    self.assertEqual(top_k_lib.num_kept(100, 32.0), 100)
    self.assertEqual(top_k_lib.num_kept(100, 0.01), 1)
    # By hand: 25 of 100 take 25 words, and 100 H(1/4) = 81.13 bits.
    self.assertEqual(top_k_lib.num_bits(100, 25), 25 * 32 + 82)

  def test_top_k_in_the_coder(self):
    sent, state = compiled('top_k')(heavy_tailed(20_000), KEY)
    mask = np.asarray(sent != 0)
    words = coders.sparse_encode(np.asarray(sent), mask)
    self.assertAlmostEqual(
      32 * len(words), int(state.bits), delta=0.01 * int(state.bits) + 64
    )
    got = coders.sparse_decode(words, 20_000, mask.sum())
    np.testing.assert_array_equal(got, sent)
    places = np.flatnonzero(mask) + 1
    gaps = coders.gamma_encode(np.diff(places, prepend=0))
    elias = len(gaps) + 32 * len(places)
    self.assertEqual(state.columns['rate_elias'], np.float32(elias / 20_000))

  def test_rotation(self):
    """It is Hadamard's matrix in Sylvester's order, and orthogonal."""
    x = gaussian(32).reshape(2, 16)
    want = np.asarray(x) @ linalg.hadamard(16) / 4
    np.testing.assert_allclose(rotated_lib.rotate(x), want, atol=1e-6)
    np.testing.assert_allclose(
      rotated_lib.rotate(rotated_lib.rotate(x)), x, atol=1e-6
    )

  def test_rotated_in_the_coder(self):
    levels, shape = 5, (3, 4096)
    codes = np.random.RandomState(0).randint(levels, size=shape)
    ranges = np.random.RandomState(1).normal(size=(3, 2)).astype(np.float32)
    words = coders.levels_encode(codes, ranges, levels)
    counted = rotated_lib.num_bits(codes.size, levels) + 3 * 64
    self.assertAlmostEqual(32 * len(words), counted, delta=0.01 * counted + 64)
    got, got_ranges = coders.levels_decode(words, shape, levels)
    np.testing.assert_array_equal(got, codes)
    np.testing.assert_array_equal(got_ranges, ranges)
    # Two blocks of 4,096, 2 bits each, and their ranges.
    _, state = compiled('rotated')(gaussian(5000), KEY)
    self.assertEqual(state.bits, 2 * 4096 * 2 + 2 * 64)

  @parameterized.parameters(
    ('uveqfed', 0.0, 'a2', 'above 0 and at most 32'),
    ('qsgd', -1.0, 'a2', 'above 0 and at most 32'),
    ('top_k', 33.0, 'a2', 'above 0 and at most 32'),
    ('top_k', float('nan'), 'a2', 'above 0 and at most 32'),
    ('rotated', 0.9, 'a2', 'at least 1 and at most 32'),
    ('uveqfed', 2.0, 'e7', "lattice must be one of .*, got 'e7'"),
    ('zip', 2.0, 'a2', "uplink must be one of .*, got 'zip'"),
  )
  def test_errors(self, name, rate, lattice, message):
    with self.assertRaisesRegex(ValueError, message):
      uplinks.build(name, rate, lattice)


def codec_of(name, rate=2.0):
  """Returns equal codecs as one object, so federations are compiled once."""
  return _codec_of(name, rate)


_codec_of = functools.cache(lambda name, rate: uplinks.build(name, rate, 'a2'))


class RoundTest(parameterized.TestCase):
  @parameterized.parameters(*CODECS)
  def test_a_round(self, name):
    """The server receives the codec's result for the client's change and key.

    Bits and columns are the codec's, too. An absent client keeps its state.
    """
    plain, fed = problems.make(), problems.make(uplink=codec_of(name))
    state = fed.init(KEY)
    cohort = problems.row([2])
    change = optax.tree.sub(
      plain.round(plain.init(KEY), problems.DATA, cohort, KEY)[0].variables,
      state.variables,
    )
    after, info = fed.round(state, problems.DATA, cohort, KEY)
    key = keys.client_keys(KEY, jnp.int32(0), jnp.int32(2)).encode
    decoded, own = compiled(name)(change.params, key)
    got = optax.tree.sub(after.variables, state.variables)
    chex.assert_trees_all_close(got.params, decoded, atol=1e-6)
    self.assertEqual(
      info.metrics['bits_up'].tolist(), [int(own.bits), *[0] * 4]
    )
    for column, value in own.columns.items():
      self.assertAlmostEqual(info.metrics[f'uplink/{column}'], value, places=5)
    error = optax.tree.sub(decoded, change.params)
    np.testing.assert_allclose(
      info.metrics['uplink/distortion'],
      optax.tree.norm(error, squared=True)
      / optax.tree.norm(change.params, squared=True),
      rtol=1e-3,
    )
    absent = lambda state: jax.tree.map(lambda a: a[3], state.clients)
    chex.assert_trees_all_equal(absent(after), absent(state))

  def test_bits_by_hand(self):
    """Uses codecs whose messages have a length that is known beforehand."""
    cohort = problems.row([0, 1, 4], arrived=[True, False, True])
    _, info = self.after('rotated', cohort)
    rotated = 2 * 256 + 64  # 195 parameters, padded to a power of 2
    self.assertEqual(
      info.metrics['bits_up'].tolist(), [rotated, 0, rotated, 0, 0]
    )
    _, info = self.after('top_k', cohort)
    # 10 values and a mask of 195 H(10 / 195) bits; 11 would be more than 390.
    mask = -10 * math.log2(10 / 195) - 185 * math.log2(185 / 195)
    bits = 10 * 32 + math.ceil(mask)
    self.assertEqual(info.metrics['bits_up'].tolist(), [bits, 0, bits, 0, 0])

  def after(self, name, cohort, **settings):
    fed = problems.make(uplink=codec_of(name), **settings)
    return fed.round(fed.init(KEY), problems.DATA, cohort, KEY)

  @parameterized.parameters(*CODECS)
  def test_chunks(self, name):
    cohort = problems.row([0, 1, 2, 4])
    (all_, info), (each, info_each) = (
      self.after(name, cohort, client_chunk=chunk) for chunk in (0, 1)
    )
    chex.assert_trees_all_close(all_.variables, each.variables, atol=1e-6)
    np.testing.assert_array_equal(
      info.metrics['bits_up'], info_each.metrics['bits_up']
    )

  @parameterized.parameters(*CODECS)
  def test_a_high_rate_is_fed_avg(self, name):
    cohort = problems.row([0, 1, 2, 4])
    plain = problems.make()
    want, _ = plain.round(plain.init(KEY), problems.DATA, cohort, KEY)
    fed = problems.make(uplink=codec_of(name, 32.0))
    got, _ = fed.round(fed.init(KEY), problems.DATA, cohort, KEY)
    chex.assert_trees_all_close(got.variables, want.variables, atol=1e-6)

  def test_nobody_arrives(self):
    cohort = problems.row([0, 1], arrived=False)
    state, info = self.after('top_k', cohort)
    for name in ('distortion', 'rate', 'rate_elias'):
      self.assertTrue(np.isnan(info.metrics[f'uplink/{name}']))
    chex.assert_trees_all_equal(
      state.clients[1].residual,
      jax.tree.map(jnp.zeros_like, state.clients[1].residual),
    )

  def test_no_model_is_sent(self):
    silent = base.Method(sends_model=False)
    method = base.chain(fed_avg.fed_avg(), silent)
    with self.assertRaisesRegex(ValueError, 'this method send no model'):
      federation.federation(
        problems.LINEAR, method, problems.SOLVER, 5, uplink=codec_of('qsgd')
      )
    federation.federation(problems.LINEAR, method, problems.SOLVER, 5)

  def check_method(self, name):
    """With a lossless codec, the round equals the round without a codec."""
    row = methods_test.ROWS[name]
    model, method, plain = methods_test.build(row)
    data = problems.make_data()._replace(public=methods_test.PUBLIC)
    fed = problems.make(
      model,
      method,
      weighting=recipes.weighting(row.method),
      uplink=codec_of('uveqfed', 32.0),
    )
    cohort = jax.tree.map(
      lambda a: jnp.asarray(a[0]), problems.schedule([[0, 1, 2, 4]])
    )
    want, _ = plain.round(plain.init(KEY), data, cohort, KEY)
    got, info = fed.round(fed.init(KEY), data, cohort, KEY)
    chex.assert_trees_all_close(
      (got.variables, got.clients[0]),
      (want.variables, want.clients[0]),
      atol=2e-4,
    )
    self.assertLess(info.metrics['uplink/distortion'], 1e-10)

  def test_scaffold(self):
    self.check_method('scaffold')

  @parameterized.parameters(
    *(
      name
      for name in methods_test.ROWS
      if name not in ('fed_avg', 'scaffold', 'fed_dm')  # fed_dm sends no model
    )
  )
  @pytest.mark.slow
  def test_other_methods(self, name):
    self.check_method(name)


class ProgramTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.args = programs.small(programs.write_data(self.folder))

  def train(self, name, *changes, **settings):
    place = f'--workdir={self.folder / name}'
    return programs.call(train, *self.args, *changes, place, **settings)

  def test_columns_and_page(self):
    status, _, err = self.train('a', '--uplink=uveqfed', '--uplink_rate=3')
    self.assertEqual(status, 0, err)
    lines = (self.folder / 'a' / 'metrics.jsonl').read_text().splitlines()
    row = json.loads(lines[-1])
    self.assertBetween(row['uplink/rate'], 2.9, 3.1)
    self.assertGreater(row['uplink/rate_elias'], row['uplink/rate'])
    self.assertBetween(row['uplink/distortion'], 0.005, 0.03)
    words = 64 * 200 + 200 + 200 * 200 + 200 + 200 * 3 + 3
    sent = 8 * row['bytes_up'] / (3 * 2 * words)  # 3 rounds of 2 clients
    self.assertBetween(sent, 2.9, 3.1)
    header = (self.folder / 'a' / 'metrics.csv').read_text().splitlines()[0]
    self.assertIn('uplink/rate_elias', header)
    config = json.loads((self.folder / 'a' / 'config.json').read_text())
    self.assertEqual(config['config']['uplink_lattice'], 'a2')
    page = (self.folder / 'a' / 'report.html').read_text()
    self.assertIn('uplink/distortion', page)

  def test_a_residual_outlasts_a_stop(self):
    options = '--uplink=top_k', '--checkpoint_every=1', '--eval_every=1'
    status, _, err = self.train('whole', *options)
    self.assertEqual(status, 0, err)
    add = writer.RunWriter.add

    def stop(run, done, *args):
      if done == 3:
        raise RuntimeError('power cut')
      add(run, done, *args)

    with absltest.mock.patch.object(writer.RunWriter, 'add', stop):
      with self.assertRaisesRegex(RuntimeError, 'power cut'):
        self.train('cut', *options)
    status, out, _ = self.train('cut', *options)
    self.assertEqual(status, 0)
    self.assertIn('going on after round 2', out)
    for name in ('metrics.jsonl', 'params.npz'):
      self.assertEqual(
        (self.folder / 'cut' / name).read_bytes(),
        (self.folder / 'whole' / name).read_bytes(),
      )

  @parameterized.parameters(
    (['--uplink=qsgd', '--uplink_rate=0'], '--uplink_rate=0.0: the rate must'),
    (
      ['--uplink=rotated', '--uplink_rate=.5'],
      'must be at least 1 and at most',
    ),
    (['--uplink=uveqfed', '--uplink_lattice=e7'], '--uplink_lattice=e7: .*a2'),
    (['--uplink=zip'], '--uplink=zip: .*uveqfed'),
  )
  def test_errors(self, changes, message):
    status, _, err = self.train('a', *changes)
    self.assertEqual(status, 2)
    self.assertRegex(err, f'^error: .*{message}')
    self.assertEqual(err.count('\n'), 1)

  def test_a_method_that_sends_no_model(self):
    def build(name, settings, *further, **options):
      del name, settings, options
      return base.chain(
        fed_avg.fed_avg(), base.Method(sends_model=False), *further
      )

    programs.forget()
    with absltest.mock.patch.object(recipes, 'build', build):
      status, _, err = self.train('a', '--uplink=qsgd')
    programs.forget()
    self.assertEqual(status, 2)
    self.assertRegex(err, '^error: --uplink=qsgd: .*this method send no model')
    self.assertEqual(err.count('\n'), 1)


if __name__ == '__main__':
  absltest.main()
