"""Tests of private sums: clip, noise, masks and accounting."""

import pathlib

from absl.testing import absltest, parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedftg_jax import base, federation, privacy, recipes, stacking
from fedftg_jax.methods import private_fed_avg
from tests import problems

KEY = jax.random.key(11)
MODEL = problems.LINEAR
WORDS = 64 * 3 + 3
GOLDEN = np.load(pathlib.Path(__file__).parent / 'golden' / 'privacy.npz')


def make(cohort=3, num_clients=5, **options):
  """Builds a federation with a private sum and equal weights."""
  more = {k: options.pop(k) for k in ('mesh', 'client_chunk') if k in options}
  method = base.chain(private_fed_avg.private_fed_avg(MODEL, cohort, **options))
  return problems.make(MODEL, method, weighting='uniform', **more)


def changes(state, ids):
  """Returns what each client's training adds to the parameters."""
  plain = problems.make(MODEL, weighting='uniform')
  found = []
  for k in ids:
    new, _ = plain.round(state, problems.DATA, problems.row([k]), KEY)
    found.append(optax.tree.sub(new.variables.params, state.variables.params))
  return found


def begin(fed):
  state = fed.init(KEY)
  plain = problems.make(MODEL, weighting='uniform').init(KEY)
  return state._replace(variables=plain.variables), plain


class ClipTest(parameterized.TestCase):
  def test_without_a_bound_it_is_the_uniform_mean(self):
    fed = make()
    state, plain = begin(fed)
    got, info = fed.round(state, problems.DATA, problems.row([0, 1, 4]), KEY)
    want, _ = problems.make(MODEL, weighting='uniform').round(
      plain, problems.DATA, problems.row([0, 1, 4]), KEY
    )
    chex.assert_trees_all_close(
      got.variables.params, want.variables.params, atol=1e-6
    )
    self.assertNotIn('dp/clip', info.metrics)

  def test_large_changes_are_shortened_and_small_ones_kept(self):
    state, plain = begin(make())
    ids = [0, 1, 4]
    each = changes(plain, ids)
    norms = [float(optax.tree.norm(d)) for d in each]
    bound = float(np.median(norms))  # two are within it
    got, info = make(clip=bound).round(
      state._replace(
        shared=(state.shared[0]._replace(clip=jnp.asarray(bound)),)
      ),
      problems.DATA,
      problems.row(ids),
      KEY,
    )
    total = optax.tree.scale(0.0, each[0])
    for change, norm in zip(each, norms):
      short = optax.tree.scale(min(1, bound / norm), change)
      self.assertLessEqual(float(optax.tree.norm(short)), bound * (1 + 1e-6))
      total = optax.tree.add(total, short)
    want = jax.tree.map(lambda w, d: w + d / 3, state.variables.params, total)
    chex.assert_trees_all_close(got.variables.params, want, atol=1e-6)
    self.assertAlmostEqual(float(info.metrics['dp/clipped']), 1 / 3, places=6)

  def test_adaptive_clip(self):
    """There is no noise; it starts with all and with no client below the
    clip."""
    for clip, share in ((1e3, 1.0), (1e-6, 0.0)):
      fed = make(clip=clip, quantile=0.5)
      state, _ = fed.round(
        fed.init(KEY), problems.DATA, problems.row([0, 1, 4]), KEY
      )
      np.testing.assert_allclose(
        state.shared[0].clip, clip * np.exp(-0.2 * (share - 0.5)), rtol=1e-6
      )


class NoiseTest(parameterized.TestCase):
  @parameterized.parameters((0.0, 1.5), (0.5, 1.5))
  def test_deviation(self, quantile, noise):
    cohort, clip = 40, 2.0
    method = private_fed_avg.private_fed_avg(
      MODEL, cohort, clip=clip, noise=noise, quantile=quantile
    )
    start = base.Variables(jnp.zeros(100_000), {})
    shared, _ = method.init(KEY, start)
    received = base.Received(
      start,
      start,
      (jnp.zeros(100_000), jnp.zeros(())),
      (),
      jnp.zeros(3, bool),
      jnp.int32(0),
      100,
      (),
      jnp.array([2, 5, -1]),
    )
    new, _, _ = method.update(start, shared, received, KEY)
    want = noise
    if quantile:
      want = (noise**-2 - (2 * cohort / 20) ** -2) ** -0.5
    np.testing.assert_allclose(
      np.std(new.params), want * clip / cohort, rtol=0.01
    )
    self.assertLess(abs(np.mean(new.params)), 0.02 * want * clip / cohort)

  def test_denominator_is_fixed_and_noise_comes_without_anybody(self):
    fed = make(cohort=2, clip=1e3, noise=1e-9)
    state, plain = begin(fed)
    rows = base.Cohort(
      np.array([[0, 1, 4], [5, 5, 5]]), np.array([[1, 1, 1], [0, 0, 0]]), 99
    )
    got, metrics = federation.run(
      fed, jax.tree.map(jnp.copy, state), problems.DATA, rows, KEY, every=1
    )
    total = sum(
      np.asarray(d['head']['linear']['bias']) for d in changes(plain, [0, 1, 4])
    )
    begun = state.variables.params['head']['linear']['bias']
    np.testing.assert_allclose(
      got.variables.params['head']['linear']['bias'],
      begun + total / 2,
      atol=1e-5,
    )
    self.assertEqual(got.round, 2)
    np.testing.assert_array_equal(metrics['num_arrived'], [3, 0])
    loud = make(cohort=2, clip=1.0, noise=1.0)
    state, _ = begin(loud)
    nobody = jax.tree.map(
      lambda a: a[0],
      federation.check_schedule(
        base.Cohort(np.array([[5, 5, 5, 5, 5]]), False, 0), 5
      ),
    )
    new, _ = loud.round(state, problems.DATA, nobody, KEY)
    moved = optax.tree.sub(new.variables.params, state.variables.params)
    np.testing.assert_allclose(
      optax.tree.norm(moved), 0.5 * np.sqrt(WORDS), rtol=0.2
    )


class SecureTest(parameterized.TestCase):
  def test_golden(self):
    """Masked values of another implementation add up to its sum."""
    sent = jnp.asarray(GOLDEN['sa_sent'].astype(np.uint32))
    got = private_fed_avg.decode(jnp.sum(sent, axis=0))
    np.testing.assert_allclose(got, GOLDEN['sa_sum'], atol=2.5 / 2**16)
    own = private_fed_avg.encode(jnp.asarray(GOLDEN['sa_u']))
    chex.assert_trees_all_equal(jnp.sum(own, axis=0), jnp.sum(sent, axis=0))
    without = private_fed_avg.decode(jnp.sum(sent[:-1], axis=0))
    self.assertGreater(np.abs(without).max(), 100)

  def test_masks_cancel_and_hide(self):
    ids = jnp.array([7, 2, 9, -1])
    zero = {'a': jnp.zeros(500, jnp.uint32), 'b': jnp.zeros(3, jnp.uint32)}
    seed = jnp.array([1, 2], jnp.uint32)
    of = lambda k: private_fed_avg.masks(zero, seed, 4, k, ids)
    each = [of(k) for k in ids[:3]]
    total = jax.tree.map(lambda *a: sum(a), *each)
    chex.assert_trees_all_equal(total, zero)
    for mask in each:  # each is uniform over all 32 bits
      self.assertAlmostEqual(np.mean(mask['a'] / 2.0**32), 0.5, delta=0.07)
    other = private_fed_avg.masks(zero, seed, 5, ids[0], ids)
    self.assertFalse(np.any(other['a'] == each[0]['a']))

  @parameterized.parameters(
    dict(arrived=[True] * 3),
    dict(arrived=[True, False, True], client_chunk=1),
    dict(arrived=[True, False, False], client_chunk=2),
    dict(arrived=[False, True, True], mesh=2),
  )
  def test_the_sum_is_exact(self, arrived, mesh=None, client_chunk=0):
    """It equals the sum without masks bit for bit, and that of single
    clients."""
    ids = [0, 1, 4]
    options = dict(
      clip=0.5,
      secure=True,
      client_chunk=client_chunk,
      mesh=mesh and stacking.make_mesh(mesh),
    )
    fed = make(**options)
    state, plain = begin(fed)
    row = problems.row(ids, arrived=arrived)
    if mesh:
      state, row, data = stacking.put((state, row, problems.DATA), fed.mesh)
    else:
      data = problems.DATA
    got, info = fed.round(state, data, row, KEY)
    with absltest.mock.patch.object(
      private_fed_avg,
      'masks',
      lambda tree, *args: jax.tree.map(jnp.zeros_like, tree),
    ):
      open_sum, _ = make(**options).round(state, data, row, KEY)
    chex.assert_trees_all_equal(got.variables, open_sum.variables)
    codes = []
    for k, came in zip(ids, arrived):
      (change,) = changes(plain, [k])
      norm = optax.tree.norm(change)
      short = optax.tree.scale(jnp.minimum(1, 0.5 / norm), change)
      if came:
        codes.append(private_fed_avg.encode(short))
    total = private_fed_avg.decode(jax.tree.map(lambda *a: sum(a), *codes))
    want = jax.tree.map(
      lambda w, d: w + d / sum(arrived), plain.variables.params, total
    )
    # Rounded to 2^-16; a change in the middle may be rounded the other way.
    chex.assert_trees_all_close(got.variables.params, want, atol=2**-15)
    np.testing.assert_array_equal(
      np.asarray(info.metrics['bits_up'])[:3],
      np.array(arrived) * 32 * (WORDS + 1),
    )

  def test_a_lost_client_would_destroy_the_sum(self):
    """What is subtracted is what remained, and it is far from 0."""
    seed = jnp.array([3, 4], jnp.uint32)
    ids, arrived = jnp.array([0, 1, 4]), jnp.array([True, False, True])
    codes = {'a': jnp.arange(6, dtype=jnp.uint32)}
    sent = [
      jax.tree.map(
        jnp.add, codes, private_fed_avg.masks(codes, seed, 0, k, ids)
      )
      for k, came in zip(ids, arrived)
      if came
    ]
    total = jax.tree.map(lambda *a: sum(a), *sent)
    received = base.Received(
      *[None] * 2, total, (), arrived, jnp.int32(0), 5, (), ids
    )
    left = private_fed_avg.unmasked(received, seed)
    np.testing.assert_array_equal(total['a'] - left['a'], 2 * codes['a'])
    self.assertTrue(np.all(left['a'] != 0))


class AccountTest(absltest.TestCase):
  def test_epsilon(self):
    sigma, rounds, delta, rho, zcdp = GOLDEN['dp_zcdp_example']
    self.assertAlmostEqual(rho, rounds / (2 * sigma**2))
    self.assertAlmostEqual(zcdp, rho + 2 * np.sqrt(rho * np.log(1 / delta)))
    tight = privacy.epsilon(int(rounds), 1.0, float(sigma), float(delta))
    self.assertLess(tight, zcdp)
    self.assertAlmostEqual(tight, 4.3772, places=3)
    few, many = (privacy.epsilon(t, 0.1, 1.0, 1e-5) for t in (2, 20))
    self.assertLess(few, many)

  def test_errors(self):
    for arguments in ((1, 0.0, 1.0, 0.1), (1, 0.5, 0.0, 0.1), (1, 0.5, 1, 1.0)):
      with self.assertRaisesRegex(ValueError, 'rate above 0 and at most 1'):
        privacy.epsilon(*arguments)


class RefusalTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(noise=1.0), 'need a clip above 0'),
    (dict(clip=1.0, quantile=1.0), 'quantile must be below 1'),
    (dict(clip=1.0, quantile=0.5, noise=0.3), 'below cohort / 10 = 0.3'),
    (dict(clip=-1.0), 'clip must be at least 0'),
  )
  def test_values(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      private_fed_avg.private_fed_avg(MODEL, 3, **options)

  def test_more_clients_than_add_up(self):
    method = private_fed_avg.private_fed_avg(MODEL, 3, secure=True)
    received = base.Received(
      *[None] * 2, ({}, 0), (), jnp.ones(8192, bool), jnp.int32(0), 9000, ()
    )
    with self.assertRaisesRegex(ValueError, 'can add up at most 8191 clients'):
      method.update(None, None, received, KEY)

  def test_batch_norm(self):
    with self.assertRaisesRegex(ValueError, 'without protection'):
      private_fed_avg.private_fed_avg(problems.NORMED, 3, clip=1.0)

  def test_parts_that_tell_more_than_a_sum(self):
    """Every part that needs more from the clients says so in its recipe."""
    models = {  # with BatchNorm
      'fed_align': problems.STAGED,
      'fed_zdac': problems.NORMED,
      'fed_zdas': problems.NORMED,
    }
    for name, recipe in recipes.RECIPES.items():
      settings = recipes.Settings(
        models.get(name, MODEL),
        problems.NUM_CLASSES,
        generator=problems.GENERATOR,
        cohort=3,
        build_model=lambda name: MODEL,
        image_shape=problems.IMAGE_SHAPE,
      )
      default = base.Method._field_defaults
      method = recipe.build(settings)
      more = any(
        getattr(method, hook) is not default[hook]
        for hook in ('summed', 'stacked')
      )
      self.assertEqual(bool(recipe.reveals), more, name)
      private = settings._replace(privacy={'clip': 1.0})
      if recipe.reveals:
        with self.assertRaisesRegex(
          ValueError, f'cannot protect {name}, which'
        ):
          recipes.build(name, private)
      elif name not in models:
        recipes.build(name, private)


if __name__ == '__main__':
  absltest.main()
