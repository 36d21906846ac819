"""Tests of KD + LwoF: golden losses, phases, neutral elements."""

import functools
import pathlib

from absl.testing import absltest, parameterized
import chex
import jax
from jax import enable_x64
import jax.numpy as jnp
import numpy as np

from fedftg_jax import base, evaluation, federation, losses, solvers
from fedftg_jax.methods import fed_avg, kd_lwof
from fedftg_jax.models import classifiers
from tests import problems

KEY = jax.random.key(6)
_FILE = np.load(pathlib.Path(__file__).parent / 'golden' / 'personal.npz')
G = {k[3:]: _FILE[k] for k in _FILE.files if k.startswith('kd_')}
MODEL = problems.LINEAR
MLP = problems.from_flax(classifiers.MLP(problems.NUM_CLASSES, (6,)))
ARCHITECTURES = {'linear': problems.LINEAR, 'mlp': MLP, 'bn': problems.NORMED}
NUM = len(ARCHITECTURES)
EACH = list(ARCHITECTURES.values())
RATE = 0.2


def method(**options):
  return kd_lwof.kd_lwof(MODEL, ARCHITECTURES, **options)


def make(part, **kwargs):
  """Builds a federation whose clients take two steps on all of their data."""
  solve = solvers.local_sgd(RATE, batch_size=15, epochs=2)
  return problems.make(
    MODEL, base.chain(fed_avg.fed_avg(), part), solve=solve, **kwargs
  )


def unpacked(state, k):
  """Returns client k's own model."""
  flat = np.asarray(state.clients[0][1].flat[k])
  packing = kd_lwof._packing(ARCHITECTURES)
  return packing.unpack(k % NUM, flat)


@functools.cache
def after_one(options, num_steps):
  """Runs a round of client 1, in a federation of one architecture."""
  part = kd_lwof.kd_lwof(MODEL, {'linear': problems.LINEAR}, **dict(options))
  fed = make(part)
  row = problems.row([1], num_steps=[num_steps])
  return fed.round(fed.init(KEY), problems.DATA, row, KEY)[0]


def flat_of_one(options, num_steps=base.NO_LIMIT):
  """Returns its own model."""
  state = after_one(tuple(options.items()), num_steps)
  return np.asarray(state.clients[0][1].flat[1])


class LossTest(parameterized.TestCase):
  """The parts of the loss against golden arrays, in float64."""

  def loss(self, logits, alpha, beta):
    tau = float(G['hp'][0])
    ce = losses.cross_entropy(logits, jnp.asarray(G['y']))
    return kd_lwof.own_loss(
      ce, logits, G['zg'], G['zo'], None, alpha, beta, tau
    )

  def test_parts(self):
    with enable_x64(True):
      logits = jnp.asarray(G['zs'])
      _, alpha, beta = map(float, G['hp'])
      ce, received, old, total = G['parts']
      for weights, want in (
        ((0.0, 0.0), ce),
        ((1.0, 0.0), received),
        ((1.0, 1.0), received + old),
        ((alpha, beta), total),
      ):
        np.testing.assert_allclose(
          self.loss(logits, *weights), want, rtol=1e-12
        )
      grad = jax.grad(self.loss)(logits, alpha, beta)
      np.testing.assert_allclose(grad, G['grad'], atol=1e-13)

  def test_gradient_by_hand(self):
    """It is T (softmax(z_s / T) - softmax(z_t / T)) / B, and 0 for equal
    logits."""
    with enable_x64(True):
      tau, logits = float(G['hp'][0]), jnp.asarray(G['zs'])
      grad = jax.grad(self.loss)(logits, 1.0, 0.0)
      want = (
        tau
        * (jax.nn.softmax(logits / tau) - jax.nn.softmax(G['zg'] / tau))
        / len(logits)
      )
      np.testing.assert_allclose(grad, want, atol=1e-13)
      grad = jax.grad(self.loss)(jnp.asarray(G['zg']), 1.0, 0.0)
      np.testing.assert_allclose(grad, 0, atol=1e-15)

  def test_padding_counts_in_neither(self):
    mask = jnp.arange(6) < 4
    ce = losses.cross_entropy(G['zs'], G['y'], mask)
    got, want = (
      kd_lwof.own_loss(ce, G['zs'][:n], G['zg'][:n], G['zo'][:n], m, 0.5, 1, 2)
      for n, m in ((6, mask), (4, None))
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)


class PhasesTest(parameterized.TestCase):
  """Two clients' round against plain gradient descent.

  The descent follows the module's docstring.
  """

  def plain(self, start, own, k, phases, old, alpha, beta, gamma, tau):
    """Returns (w, u) after two steps each on all of client k's data."""
    data = problems.make_data()
    rows = data.index[k][: int(data.count[k])]
    x, y = data.x[rows], data.y[rows]
    apply = EACH[k % NUM].apply

    def kl(p, q):
      log_p, log_q = (jax.nn.log_softmax(z / tau) for z in (p, q))
      return tau**2 * jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1))

    def ce(z):
      return -jnp.mean(jax.nn.log_softmax(z)[jnp.arange(len(y)), y])

    z_received = MODEL.apply(start, x).logits
    z_old = apply(own, x).logits if old == 'own' else z_received

    def step_own(u, z_common):
      def loss(params):
        out = apply(u._replace(params=params), x, train=True)
        z = out.logits
        total = (1 - alpha) * ce(z) + alpha * kl(z_common, z)
        return total + beta * kl(z_old, z), out.stats

      grads, stats = jax.grad(loss, has_aux=True)(u.params)
      params = jax.tree.map(lambda p, g: p - RATE * g, u.params, grads)
      return base.Variables(params, stats)

    def step_common(w, z_own):
      def loss(params):
        z = MODEL.apply(w._replace(params=params), x, train=True).logits
        return (1 - gamma) * ce(z) + gamma * kl(z_own, z)

      grads = jax.grad(loss)(w.params)
      return w._replace(
        params=jax.tree.map(lambda p, g: p - RATE * g, w.params, grads)
      )

    w, u = start, own
    if phases == 'joint':
      for _ in range(2):
        z_w, z_u = MODEL.apply(w, x).logits, apply(u, x).logits
        w, u = step_common(w, z_u), step_own(u, z_w)
      return w, u
    for phase in phases.split('_'):
      teacher = apply(u, x).logits
      for _ in range(2):
        if phase == 'a':
          u = step_own(u, z_received)
        else:
          w = step_common(w, teacher)
    return w, u

  @parameterized.parameters(
    ('a_b', 'own'), ('b_a', 'received'), ('joint', 'own')
  )
  def test_round(self, phases, old):
    with enable_x64(True):
      weights = dict(alpha=0.3, beta=0.7, gamma=0.6, tau=1.5)
      part = kd_lwof.kd_lwof(
        MODEL, ARCHITECTURES, phases=phases, old=old, **weights
      )
      fed, data = make(part), problems.make_data()
      start = fed.init(KEY)
      seed = jax.random.wrap_key_data(start.clients[0][1].seed[0])
      after, info = fed.round(start, data, problems.row([1, 3, 4]), KEY)
      ends = []
      for k in (1, 3, 4):
        own = EACH[k % NUM].init(jax.random.fold_in(seed, k))
        w, u = self.plain(start.variables, own, k, phases, old, **weights)
        ends.append(w)
        chex.assert_trees_all_close(unpacked(after, k), u, atol=1e-12)
      mean = jax.tree.map(
        lambda *a: sum(n * b for n, b in zip((12, 5, 15), a)) / 32, *ends
      )
      chex.assert_trees_all_close(after.variables, mean, atol=1e-12)
      self.assertEqual(
        'kd_lwof/own_train_loss' in info.metrics, phases != 'joint'
      )

  @parameterized.parameters(
    ('kd_only', dict(beta=0.0)),
    ('lwof_only', dict(alpha=0.0)),
    ('ce_only', dict(alpha=0.0, beta=0.0)),
  )
  def test_terms(self, terms, same):
    """They are names for weights of 0."""
    want, got, whole = map(flat_of_one, (same, dict(terms=terms), {}))
    np.testing.assert_array_equal(got, want)
    self.assertFalse(np.array_equal(got, whole))

  def test_fewer_own_steps(self):
    """The own model takes one step instead of two, the common model still
    two."""
    one, full = map(flat_of_one, (dict(own_steps=1), {}))
    limited = flat_of_one({}, num_steps=1)
    np.testing.assert_allclose(one, limited, atol=1e-6)
    self.assertGreater(np.abs(one - full).max(), 1e-3)


class EngineTest(parameterized.TestCase):
  @parameterized.parameters('a_b', 'b_a')
  def test_without_teachers_the_common_model_is_fed_avg_s(self, phases):
    """It is the same bits, whatever the own models are."""
    part = method(phases=phases, alpha=0.0, beta=0.0, gamma=0.0)
    rows = problems.schedule([[0, 1, 4], [2, 3, -1]])
    models = []
    for fed in (make(part), make(base.Method())):
      state, _ = federation.run(
        fed, fed.init(KEY), problems.DATA, rows, KEY, every=2
      )
      models.append(state.variables)
    chex.assert_trees_all_equal(*models)

  def test_own_models(self):
    """Each client draws its own model at first use, of its architecture.

    Until then the drawn model is evaluated. Absent clients' models do not
    change a bit. A client that trains but does not arrive loses only the common
    model.
    """
    fed = make(method())
    start = fed.init(KEY)
    personal = jax.jit(
      lambda state, k: fed.personalise(state, problems.DATA, k, k, KEY)[0]
    )
    before = [personal(start, jnp.int32(k))['custom'] for k in range(5)]
    seed = jax.random.wrap_key_data(start.clients[0][1].seed[0])
    for k, model in enumerate(before):
      self.assertEqual(int(model.kind), k % NUM)
      name, unpack = model.kinds[k % NUM]
      self.assertEqual(name, list(ARCHITECTURES)[k % NUM])
      want = EACH[k % NUM].init(jax.random.fold_in(seed, k))
      chex.assert_trees_all_close(unpack(model.variables), want, atol=1e-6)
    cohort = problems.row([0, 3, 4])._replace(
      arrived=jnp.array([True, False, False, False, False]),
      worked=jnp.array([True, True, False, False, False]),
    )
    after, _ = fed.round(start, problems.DATA, cohort, KEY)
    slot = after.clients[0][1]
    np.testing.assert_array_equal(slot.seen, [True, False, False, True, False])
    for k in (1, 2, 4):
      np.testing.assert_array_equal(slot.flat[k], 0)
      chex.assert_trees_all_equal(
        personal(after, jnp.int32(k))['custom'].variables, before[k].variables
      )
    alone, _ = fed.round(start, problems.DATA, problems.row([0]), KEY)
    chex.assert_trees_all_close(after.variables, alone.variables, atol=1e-7)
    nobody, _ = fed.round(
      start, problems.DATA, cohort._replace(arrived=jnp.zeros(5, bool)), KEY
    )
    chex.assert_trees_all_equal(nobody.variables, start.variables)

  @parameterized.parameters(('device', 0), ('host', 1))
  def test_evaluation_by_architecture(self, place, chunk):
    fed = make(method(), client_state=place, client_chunk=chunk)
    state, metrics = federation.run(
      fed,
      fed.init(KEY),
      problems.DATA,
      problems.schedule([[0, 1, 4], [2, 3, 4]]),
      KEY,
    )
    size = 32 * (64 * 3 + 3)
    self.assertEqual(metrics['bits_up'].tolist(), [3 * size] * 2)
    self.assertEqual(metrics['bits_down'].tolist(), [3 * size] * 2)
    scores = evaluation.evaluate_clients(
      fed,
      state,
      problems.DATA,
      problems.DATA,
      KEY,
      personalise=True,
      by_class=True,
    )
    for first in ('', 'personalised_'):
      for i, name in enumerate(ARCHITECTURES):
        for score, values in scores[f'{first}custom_{name}'].items():
          whole = scores[first + 'custom'][score]
          for k in range(5):
            np.testing.assert_array_equal(
              values[k], whole[k] if k % NUM == i else np.nan
            )
    for k in range(5):
      rows = np.asarray(problems.DATA.index[k])[: int(problems.DATA.count[k])]
      logits = EACH[k % NUM].apply(unpacked(state, k), problems.DATA.x).logits
      np.testing.assert_allclose(
        scores['custom']['accuracy'][k],
        np.mean(
          np.argmax(logits, -1)[rows] == np.asarray(problems.DATA.y)[rows]
        ),
        rtol=1e-6,
      )


class ErrorsTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(alpha=1.1), 'alpha and gamma must be between 0 and 1, got 1.1'),
    (dict(gamma=-0.1), 'alpha and gamma must be between 0 and 1'),
    (dict(beta=-1.0), 'beta must be at least 0'),
    (dict(tau=0.0), 'tau must be above 0'),
    (dict(own_steps=-1), 'own_steps must be at least 0'),
    (dict(phases='ab'), "phases must be one of .*, got 'ab'"),
    (dict(terms='kd'), "terms must be one of .*, got 'kd'"),
    (dict(old='none'), "old must be one of .*, got 'none'"),
  )
  def test_options(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      method(**options)

  def test_no_architecture(self):
    with self.assertRaisesRegex(ValueError, 'must have at least one'):
      kd_lwof.kd_lwof(MODEL, {})


if __name__ == '__main__':
  absltest.main()
