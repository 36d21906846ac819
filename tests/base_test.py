"""Tests of chains, recipes and evaluation."""

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedftg_jax import base, evaluation, losses, recipes
from fedftg_jax.methods import fed_avg, fed_nova, fed_prox, scaffold
from tests import problems

KEY = jax.random.key(0)


def part(number):
  """Makes a method in which every hook leaves a trace of `number`."""
  return base.Method(
    init=lambda key, variables: (number, -number),
    broadcast=lambda shared: shared * 10,
    send=lambda variables, shared, slot, key: variables * 10 + shared,
    common=lambda variables, shared, round_, key: variables + shared,
    start=lambda view, key: view.variables * 10 - view.own + view.common,
    train=lambda inner, objective, view, key: (
      inner(objective + number, view)._replace(step_size=view.variables),
      view.own + view.shared,
    ),
    message_bits=lambda message: message + number,
    penalty=lambda variables, output, batch, view, key: view.shared + view.own,
    decay=lambda view: view.own * 2.0,
    upload=lambda view, local, objective, key: (view.own - 1, view.shared),
    summed=lambda sent: sent.message * 5,
    stacked=lambda sent: sent.message * 7,
    update=lambda variables, shared, received, key: (
      variables * 10 + received.summed,
      shared + 1,
      base.Info(
        {f'seen{number}': received.stacked + received.common},
        {f'model{number}': variables},
      ),
    ),
  )


class ChainTest(absltest.TestCase):
  def test_slots_are_tuples_and_order_is_kept(self):
    method = base.chain(part(1), part(2))
    shared, own = method.init(KEY, 0)
    self.assertEqual((shared, own), ((1, 2), (-1, -2)))
    self.assertEqual(method.broadcast(shared), (10, 20))
    self.assertEqual(method.send(7, shared, 0, KEY), 712)
    common = method.common(7, (10, 20), 0, KEY)
    self.assertEqual(common, (17, 27))
    view = base.View(7, 7, (10, 20), common, own, None, 0, 1.0, 0, 0)
    self.assertEqual(method.start(view, KEY), (70 + 1 + 17) * 10 + 2 + 27)
    self.assertEqual(method.message_bits((5, 6)), 5 + 1 + 6 + 2)
    self.assertEqual(method.penalty(0, None, None, view, KEY), 10 - 1 + 20 - 2)
    self.assertEqual(method.decay(view), -6.0)
    self.assertEqual(method.upload(view, None, None, KEY), ((-2, -3), (10, 20)))
    sent = base.Sent(*[None] * 5)._replace(message=(1, 2))
    self.assertEqual(method.summed(sent), (5, 10))
    self.assertEqual(method.stacked(sent), (7, 14))
    received = base.Received(*[None] * 8)._replace(
      summed=(3, 4), stacked=(5, 6), common=(70, 80)
    )
    variables, shared, info = method.update(1, shared, received, KEY)
    self.assertEqual((variables, shared), (134, (2, 3)))
    self.assertEqual(info.metrics, {'seen1': 75, 'seen2': 86})
    self.assertEqual(info.models, {'model1': 1, 'model2': 13})

  def test_training_nests(self):
    """The first part is outermost, and each part has its slot.

    This holds in chains of chains, too. Parts that are not reached, because an
    outer part trains by itself, keep their slots.
    """
    chained = base.chain(part(1), base.chain(part(2), part(3)), part(4))
    ignores = base.Method(
      train=lambda inner, objective, view, key: (
        base.Local('mine', 0, 0, {}),
        view.own + 1,
      )
    )
    own, shared = (1, (2, 3), 4), (10, (20, 30), 40)
    view = base.View(7, 7, shared, ((), ((), ()), ()), own, None, 0, 1.0, 0, 0)
    seen = []

    def solver(objective, view):
      seen.append((objective, view))
      return base.Local('trained', 0, 0, {})

    local, own_then = chained.train(solver, 100, view, KEY)
    self.assertEqual(seen, [(100 + 1 + 2 + 3 + 4, view)])
    self.assertEqual(local, base.Local('trained', 0, 7, {}))
    self.assertEqual(own_then, (11, (22, 33), 44))
    method = base.chain(part(1), base.chain(part(2), ignores), part(4))
    local, own_then = method.train(solver, 100, view, KEY)
    self.assertEqual(local, base.Local('mine', 0, 7, {}))
    self.assertEqual(own_then, (11, (22, 4), 4))
    self.assertLen(seen, 1)

  def test_names_overwrite_nothing(self):
    method = base.chain(part(1), part(1))
    received = base.Received(*[None] * 8)._replace(
      summed=(3, 4), stacked=(5, 6), common=(7, 8)
    )
    with self.assertRaisesRegex(
      ValueError, "two parts give the metric 'seen1'"
    ):
      method.update(1, (1, 2), received, KEY)

  def test_parts_get_different_keys(self):
    drawn = []
    spy = base.Method(
      init=lambda key, v: (drawn.append(jax.random.uniform(key)), ())
    )
    base.chain(spy, spy).init(KEY, 0)
    self.assertNotEqual(float(drawn[0]), float(drawn[1]))

  def test_defaults_do_nothing(self):
    method = base.Method()
    view = base.View(0, 0, (), (), 'own', None, 0, 1.0, 0, 0)
    self.assertEqual(
      method.train(lambda *a: a, 'objective', view, KEY),
      (('objective', view), 'own'),
    )
    self.assertEqual(method.upload(view, None, None, KEY), ('own', ()))
    self.assertEqual((method.summed(None), method.stacked(None)), ((), ()))
    self.assertEqual(
      method.update('w', 's', None, KEY), ('w', 's', base.Info())
    )
    self.assertEqual(method.penalty(0, None, None, view, KEY), 0)

  def test_empty(self):
    with self.assertRaisesRegex(ValueError, 'at least one'):
      base.chain()

  def test_hooks_that_do_not_take_their_arguments(self):
    part = base.Method(penalty=lambda variables, output, batch, view: 0.0)
    want = (
      r"a method's penalty must take \(variables, output, batch, view, key\): "
    )
    with self.assertRaisesRegex(ValueError, want):
      base.chain(fed_avg.fed_avg(), part)

  def test_exactly_one_part_aggregates(self):
    with self.assertRaisesRegex(ValueError, 'more than one part that agg'):
      base.chain(fed_avg.fed_avg(), fed_nova.fed_nova())
    alone = base.chain(fed_prox.fed_prox(), scaffold.scaffold())
    self.assertFalse(alone.aggregates)
    self.assertTrue(base.chain(alone, fed_avg.fed_avg()).aggregates)
    with self.assertRaisesRegex(ValueError, r'begin with one that does'):
      problems.make(method=alone)


class RecipesTest(parameterized.TestCase):
  @parameterized.parameters(
    ('fed_avg', ['fed_avg']),
    ('fed_ftg', ['fed_avg', 'fed_ftg']),
    ('fed_ftg+fed_avg', ['fed_avg', 'fed_ftg']),
    ('fed_ftg+fed_nova', ['fed_nova', 'fed_ftg']),
    ('fed_ftg+scaffold+moon', ['moon', 'fed_avg', 'scaffold', 'fed_ftg']),
  )
  def test_order(self, name, want):
    self.assertEqual(recipes.parse(name), want)

  @parameterized.parameters(
    (
      'fedavg',
      r"no method 'fedavg' .did you mean fed_avg\?.: must be one of ditto, ",
    ),
    ('fed_avg+fed_avg', 'fed_avg is named twice'),
    ('', 'no method'),
  )
  def test_errors(self, name, message):
    with self.assertRaisesRegex(ValueError, message):
      recipes.parse(name)

  def test_two_aggregators(self):
    with self.assertRaisesRegex(
      ValueError, 'only one part can aggregate, got fed_avg and fed_nova'
    ):
      recipes.parse('fed_avg+fed_nova')

  def test_generates(self):
    self.assertTrue(recipes.generates('moon+fed_df'))
    self.assertFalse(recipes.generates('fed_df_public'))

  def test_server_optimizer(self):
    self.assertIsNone(recipes.server_optimizer('sgd', 1.0))
    for name in recipes.SERVER_OPTIMIZERS:
      self.assertIsInstance(
        recipes.server_optimizer(name, 0.5), optax.GradientTransformation
      )
    self.assertIsNone(recipes.server_optimizer('sgd'))
    with self.assertRaisesRegex(ValueError, "got 'lion'"):
      recipes.server_optimizer('lion', 1.0)
    with self.assertRaisesRegex(ValueError, 'be 0 with yogi, got 1e-12'):
      recipes.server_optimizer('yogi', eps_root=1e-12)

  def test_weighting(self):
    self.assertEqual(recipes.weighting('fed_ftg'), 'examples')
    self.assertEqual(recipes.weighting('moon+fed_ftg'), 'examples')
    self.assertEqual(recipes.weighting('scaffold+fed_ftg'), 'uniform')


class EvaluationTest(parameterized.TestCase):
  @parameterized.parameters(1, 7, 40, 100)
  def test_batches(self, batch_size):
    variables = problems.LINEAR.init(KEY)
    x, y = problems.DATA.x, problems.DATA.y
    got = evaluation.evaluate(problems.LINEAR, variables, x, y, batch_size)
    logits = problems.LINEAR.apply(variables, x).logits
    np.testing.assert_allclose(
      got['loss'], losses.cross_entropy(logits, y), rtol=1e-5
    )
    np.testing.assert_allclose(
      got['accuracy'], np.mean(np.argmax(logits, -1) == y), rtol=1e-6
    )


class LossesTest(absltest.TestCase):
  def test_masked_mean(self):
    values = jnp.array([1.0, 2.0, 9.0])
    mask = jnp.array([True, True, False])
    self.assertEqual(losses.masked_mean(values, mask), 1.5)
    self.assertEqual(losses.masked_mean(values, mask & False), 0)

  def test_kl_of_equal_predictions_is_zero(self):
    logits = jax.random.normal(KEY, (4, 3))
    np.testing.assert_allclose(
      losses.kl_divergence(logits, logits + 5.0), 0, atol=1e-6
    )


if __name__ == '__main__':
  absltest.main()
