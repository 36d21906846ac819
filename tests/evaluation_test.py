"""Tests of scores: plain loops, identities, numbers computed by hand."""

import functools
from unittest import mock

from absl.testing import absltest, parameterized
import chex
from hypothesis import given, settings, strategies
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedftg_jax import base, evaluation, federation, recipes, stacking
from fedftg_jax.data import clients
from fedftg_jax.methods import fed_avg
from tests import problems

KEY = jax.random.key(3)
NET = problems.LINEAR
# A different split of other examples; the third client has none.
TEST = problems.make_data((4, 6, 0, 9, 3), seed=1)


def accuracy(model, variables, data, k):
  rows = np.asarray(data.index[k])[: int(data.count[k])]
  if not len(rows):
    return np.nan
  right = _right(model.apply, variables, data.x, data.y)
  return np.mean(np.asarray(right)[rows])


@functools.partial(jax.jit, static_argnums=0)
def _right(apply, variables, x, y):
  return jnp.argmax(apply(variables, x).logits, -1) == y


@functools.cache  # several tests use the same
def evaluated(method, chunk=1, num_devices=None):
  """Returns (federation, state, scores) after one round of clients 1 and 3."""
  mesh = num_devices and stacking.make_mesh(num_devices)
  method = recipes.build(method, recipes.Settings(NET, problems.NUM_CLASSES))
  fed = problems.make(NET, method, mesh=mesh)
  data, test = stacking.put((problems.DATA, TEST), mesh)
  state, _ = fed.round(
    stacking.put(fed.init(KEY), mesh), data, problems.row([1, 3]), KEY
  )
  scores = evaluation.evaluate_clients(
    fed, state, data, test, KEY, personalise=True, chunk=chunk, batch_size=4
  )
  return fed, state, scores


class GlobalTest(parameterized.TestCase):
  @parameterized.parameters(1, 7, 40)
  def test_per_class(self, batch_size):
    variables = NET.init(KEY)
    x, y = problems.DATA.x, problems.DATA.y
    got = evaluation.evaluate(NET, variables, x, y, batch_size)
    correct = np.asarray(_right(NET.apply, variables, x, y))
    y = np.asarray(y)
    np.testing.assert_allclose(
      got['per_class'], [np.mean(correct[y == c]) for c in range(3)], rtol=1e-5
    )
    share = np.bincount(y) / len(y)
    np.testing.assert_allclose(
      np.dot(share, got['per_class']), got['accuracy'], rtol=1e-5
    )

  @parameterized.parameters(1, 7, 40)
  def test_confusions_are_counts(self, batch_size):
    variables = NET.init(KEY)
    x, y = problems.DATA.x, problems.DATA.y
    got = evaluation.evaluate(NET, variables, x, y, batch_size)['confusion']
    want = np.zeros((3, 3), int)
    given = np.argmax(NET.apply(variables, x).logits, axis=-1)
    np.add.at(want, (np.asarray(y), given), 1)
    np.testing.assert_array_equal(got, want)

  def test_a_class_without_examples(self):
    y = jnp.minimum(problems.DATA.y, 1)
    got = evaluation.evaluate(NET, NET.init(KEY), problems.DATA.x, y)
    self.assertEqual(np.isnan(got['per_class']).tolist(), [False, False, True])


class BatchStatisticsTest(absltest.TestCase):
  """Batches of one class each would be normalised to nothing."""

  def test_sorted_test_sets_are_no_batches_of_a_class(self):
    net = problems.NORMED
    variables = net.init(KEY)
    rows = np.argsort(problems.DATA.y, kind='stable')
    x, y = problems.DATA.x[rows], np.asarray(problems.DATA.y)[rows]
    num = len(y)
    order = np.random.RandomState(0).permutation(num)
    size = num // 2
    want = np.zeros((num, 3))
    for first in range(0, num, size):
      some = order[first : first + size]
      pad = np.pad(x[some], ((0, size - len(some)), *((0, 0),) * 3))
      mask = jnp.arange(size) < len(some)
      logits = net.apply(variables, pad, mask=mask, train=True).logits
      want[some] = jax.nn.softmax(logits)[: len(some)]
    got = evaluation.predict(net, variables, x, size, batch_stats=True)
    np.testing.assert_allclose(got, want, atol=1e-5)
    scores = evaluation.evaluate(net, variables, x, y, size, batch_stats=True)
    np.testing.assert_allclose(
      scores['accuracy'], np.mean(want.argmax(1) == y), rtol=1e-5
    )


class ClientsTest(parameterized.TestCase):
  def test_broadcast_is_a_plain_loop(self):
    _, state, scores = evaluated('fed_avg')
    want = [accuracy(NET, state.variables, TEST, k) for k in range(5)]
    np.testing.assert_allclose(scores['broadcast']['accuracy'], want, rtol=1e-6)
    self.assertTrue(np.isnan(want[2]))
    # All clients' test examples together are the whole test set.
    whole = evaluation.evaluate(NET, state.variables, TEST.x, TEST.y)
    for name in ('accuracy', 'loss'):
      np.testing.assert_allclose(
        np.nansum(scores['broadcast'][name] * TEST.count) / 22,
        whole[name],
        rtol=1e-5,
      )

  def test_personalised_is_what_the_next_round_trains(self):
    self.check_personalised('scaffold')

  @pytest.mark.slow
  def test_personalised_of_moon_is_what_the_next_round_trains(self):
    self.check_personalised('moon')

  def check_personalised(self, method):
    """FedAvg of one client equals that client's model.

    The local models of other methods are seen in the reported mean of a round.
    """
    fed, state, scores = evaluated(method)
    personalise = jax.jit(fed.personalise)
    for k in range(5):
      _, info = fed.round(state, problems.DATA, problems.row([k]), KEY)
      _, after = personalise(
        state, problems.DATA, jnp.int32(k), jnp.int32(k), KEY
      )
      trained = after['personalised'].variables
      chex.assert_trees_all_close(trained, info.models['average'], atol=1e-5)
      np.testing.assert_allclose(
        scores['personalised']['accuracy'][k],
        accuracy(NET, trained, TEST, k),
        rtol=1e-6,
      )

  def test_personalised_is_plain_gradient_descent(self):
    """All examples of a client are in one batch, so their order does not
    matter."""
    solve = problems.solver(
      batch_size=20, epochs=3, weight_decay=0.0, clip_norm=None
    )
    fed = problems.make(NET, solve=solve)
    state = fed.init(KEY)._replace(round=jnp.int32(1))
    personalise = jax.jit(fed.personalise)
    for k in (1, 2):  # several examples, and one alone
      rows = problems.DATA.index[k][: problems.DATA.count[k]]
      x, y = problems.DATA.x[rows], problems.DATA.y[rows]

      @jax.jit
      @jax.grad
      def gradient(params, x=x, y=y):
        logits = NET.apply(state.variables._replace(params=params), x).logits
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(y)), y])

      params = state.variables.params
      for _ in range(3):
        params = jax.tree.map(
          lambda p, g: p - 0.1 * 0.9 * g, params, gradient(params)
        )
      before, after = personalise(
        state, problems.DATA, jnp.int32(k), jnp.int32(k), KEY
      )
      begin = before['broadcast'].variables
      trained = after['personalised'].variables
      chex.assert_trees_all_equal(begin, state.variables)
      chex.assert_trees_all_close(trained.params, params, atol=1e-5)

  @pytest.mark.slow
  def test_slots_on_the_host(self):
    """Clients are evaluated in blocks; the last block is not full."""
    method = recipes.build(
      'scaffold', recipes.Settings(NET, problems.NUM_CLASSES)
    )
    got = []
    for place in ('device', 'host'):
      fed = problems.make(NET, method, client_state=place)
      state, _ = federation.run(
        fed,
        fed.init(KEY),
        problems.DATA,
        problems.schedule([[1, 3], [0, 3]]),
        KEY,
      )
      with mock.patch.object(evaluation, '_HOST_BLOCK', 2):
        got.append(
          evaluation.evaluate_clients(
            fed, state, problems.DATA, TEST, KEY, personalise=True
          )
        )
    chex.assert_trees_all_close(*got, atol=1e-6)
    some = np.array([4, 0, 3])
    with mock.patch.object(evaluation, '_HOST_BLOCK', 2):
      few = evaluation.evaluate_clients(
        fed, state, problems.DATA, TEST, KEY, ids=some, personalise=True
      )
    chex.assert_trees_all_close(
      few, jax.tree.map(lambda a: a[some], got[0]), atol=1e-6
    )

  def test_some_clients(self):
    fed, state, scores = evaluated('scaffold')
    some = np.array([4, 0, 3])
    got = evaluation.evaluate_clients(
      fed,
      state,
      problems.DATA,
      TEST,
      KEY,
      ids=some,
      personalise=True,
      batch_size=4,
    )
    chex.assert_trees_all_close(
      got, jax.tree.map(lambda a: a[some], scores), atol=1e-6
    )

  def test_chunks_and_devices_agree(self):
    self.check_chunk(2, 2)

  @parameterized.parameters((2, None), (0, None))
  @pytest.mark.slow  # below `parameters`: applies to all cases
  def test_other_chunks_agree(self, chunk, num_devices):
    self.check_chunk(chunk, num_devices)

  def check_chunk(self, chunk, num_devices):
    _, _, one = evaluated('fed_avg')
    _, _, other = evaluated('fed_avg', chunk, num_devices)
    chex.assert_trees_all_close(one, other, atol=1e-5)

  def test_nothing_is_trained_unless_asked_for(self):
    fed, state, scores = evaluated('fed_avg')
    got = evaluation.evaluate_clients(
      fed, state, problems.DATA, TEST, KEY, batch_size=4
    )
    chex.assert_trees_all_equal(got, {'broadcast': scores['broadcast']})

  def test_a_client_without_training_examples_keeps_the_model(self):
    parts = [np.arange(30), np.zeros(0, int)]
    data = clients.from_partition(problems.DATA.x, problems.DATA.y, parts)
    fed = problems.make(sizes=parts)
    state = fed.init(KEY)
    before, after = fed.personalise(
      state, data, jnp.int32(1), jnp.int32(1), KEY
    )
    chex.assert_trees_all_equal(
      before['broadcast'].variables, after['personalised'].variables
    )


class PersonalTest(absltest.TestCase):
  """A part in which each client keeps the mean of the models that it trained.

  It also keeps a model with constant output, of another architecture.
  """

  def part(self):
    def upload(view, local, objective, key):
      last, times = view.own
      times += 1
      mean = jax.tree.map(
        lambda m, new: m + (new - m) / times, last, local.variables
      )
      return (mean, times), ()

    def always_1(variables, x, mask=None, train=False):
      del train, mask
      logits = jax.nn.one_hot(jnp.ones(len(x), int), problems.NUM_CLASSES)
      return base.Output(logits * variables.params, (), ())

    def personal(view):
      mean, times = view.own
      return {
        'mean': base.Personal(NET.apply, mean),
        'always_1': base.Personal(
          always_1, base.Variables(times.astype(float), ())
        ),
      }

    return base.Method(
      init=lambda key, variables: ((), (variables, jnp.int32(0))),
      upload=upload,
      personal=personal,
    )

  def test_by_name_before_and_after(self):
    fed = problems.make(NET, base.chain(fed_avg.fed_avg(), self.part()))
    state, _ = fed.round(
      fed.init(KEY), problems.DATA, problems.row([1, 3]), KEY
    )
    got = evaluation.evaluate_clients(
      fed,
      state,
      problems.DATA,
      TEST,
      KEY,
      personalise=True,
      by_class=True,
      chunk=2,
      batch_size=4,
    )
    self.assertEqual(
      set(got),
      {
        'broadcast',
        'mean',
        'always_1',
        'personalised',
        'personalised_mean',
        'personalised_always_1',
      },
    )
    (_, (mean, times)), _ = state.clients
    np.testing.assert_array_equal(times, [0, 1, 0, 1, 0])
    classes = np.arange(problems.NUM_CLASSES)
    for k in range(5):
      of_k = jax.tree.map(lambda a: a[k], mean)
      np.testing.assert_allclose(
        got['mean']['accuracy'][k], accuracy(NET, of_k, TEST, k), rtol=1e-6
      )
      whole = evaluation.evaluate(NET, of_k, TEST.x, TEST.y)
      np.testing.assert_array_equal(
        got['mean']['per_class'][k], whole['per_class']
      )
      np.testing.assert_array_equal(
        got['personalised_always_1']['per_class'][k], classes == 1
      )
      # All its logits are 0 before the client's first round.
      np.testing.assert_array_equal(
        got['always_1']['per_class'][k], classes == min(times[k], 1)
      )
      _, after = fed.personalise(
        state, problems.DATA, jnp.int32(k), jnp.int32(k), KEY
      )
      new = after['personalised'].variables
      want = jax.tree.map(
        lambda m, n, t=times[k]: m + (n - m) / (t + 1), of_k, new
      )
      chex.assert_trees_all_close(
        after['personalised_mean'].variables, want, atol=1e-6
      )

  def test_two_of_one_name(self):
    fed = problems.make(
      NET, base.chain(fed_avg.fed_avg(), self.part(), self.part())
    )
    with self.assertRaisesRegex(ValueError, "personal model 'always_1'"):
      jax.eval_shape(
        fed.personalise,
        fed.init(KEY),
        problems.DATA,
        jnp.int32(0),
        jnp.int32(0),
        KEY,
      )

  def test_in_and_out_of_distribution(self):
    per_class = np.array([[0.5, 1.0, 0.0], [0.2, np.nan, 0.4], [1, 1, 1]])
    counts = np.array([[2, 2, 0], [1, 2, 3], [0, 0, 0]])
    got = evaluation.by_distribution(per_class, counts)
    # Shares: (.5, .5, 0) and (1/6, -, 1/2).
    second = (0.2 / 6 + 0.4 / 2) / (1 / 6 + 1 / 2)
    np.testing.assert_allclose(got['in'], [0.75, second, np.nan])
    second = (0.2 * 5 / 6 + 0.4 / 2) / (5 / 6 + 1 / 2)
    np.testing.assert_allclose(
      got['out'], [(0.5 * 0.5 + 0.5 * 1) / 2, second, np.nan]
    )


class FairnessTest(absltest.TestCase):
  def test_weighted_by_examples(self):
    values, sizes = np.array([0.5, np.nan, 1.0]), np.array([1, 7, 3])
    got = evaluation.fairness(values, sizes)
    self.assertAlmostEqual(got['weighted_mean'], 0.875)
    self.assertAlmostEqual(
      got['weighted_variance'], 0.375**2 / 4 + 0.125**2 * 3 / 4
    )

  def test_by_hand(self):
    got = evaluation.fairness(np.array([0.2, np.nan, 0.6, 0.4]))
    for name, want in (
      ('clients', 3),
      ('mean', 0.4),
      ('worst', 0.2),
      ('best', 0.6),
      ('variance', 0.08 / 3),
      ('jain', 1.44 / (3 * 0.56)),
    ):
      self.assertAlmostEqual(got[name], want, msg=name)

  def test_tails_are_a_tenth_rounded_up(self):
    values = np.arange(20) / 20
    got = evaluation.fairness(values)
    self.assertAlmostEqual(got['worst'], 0.025)
    self.assertAlmostEqual(got['best'], 0.925)
    self.assertAlmostEqual(
      evaluation.fairness(np.arange(21) / 20)['worst'], 0.05
    )

  def test_nobody_and_nothing(self):
    self.assertEqual(evaluation.fairness(np.array([np.nan])), {'clients': 0})
    self.assertEqual(evaluation.fairness(np.zeros(3))['jain'], 1)
    self.assertAlmostEqual(
      evaluation.fairness(np.array([0.0, 0.0, 0.0, 0.7]))['jain'], 1 / 4
    )

  @settings(max_examples=50, deadline=None)
  @given(
    strategies.lists(strategies.integers(0, 100), min_size=1, max_size=30),
    strategies.randoms(),
  )
  def test_properties(self, percent, random):
    values = np.array(percent) / 100
    got = evaluation.fairness(values)
    self.assertBetween(got['jain'], 1 / len(values) - 1e-9, 1 + 1e-9)
    self.assertLessEqual(got['worst'], got['mean'] + 1e-9)
    self.assertLessEqual(got['mean'], got['best'] + 1e-9)
    random.shuffle(percent)
    self.assertEqual(got, evaluation.fairness(np.array(percent) / 100))


if __name__ == '__main__':
  absltest.main()
