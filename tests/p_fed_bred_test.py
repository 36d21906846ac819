"""Tests of pFedMe and pFedBreD: golden trajectories, identities, priors.

`golden/personal.npz` (`pb_*`): three clients with quadratic losses, computed in
NumPy; full batches, all clients in each round.
"""

import pathlib

from absl.testing import absltest, parameterized
import chex
import jax
from jax import enable_x64
import jax.numpy as jnp
import numpy as np
import optax

from fedftg_jax import base, evaluation, federation, solvers
from fedftg_jax.data import clients
from fedftg_jax.methods import batch_norm, fed_avg, p_fed_bred
from tests import problems

KEY = jax.random.key(3)
_FILE = np.load(pathlib.Path(__file__).parent / 'golden' / 'personal.npz')
G = {k[3:]: _FILE[k] for k in _FILE.files if k.startswith('pb_')}
LR, LR_P, LAM, ETA, MAML, *_ = map(float, G['hp'])
R, P, T = map(int, G['hp'][5:])
SIZES = G['n'].astype(int)
PROX = dict(lam=LAM, lr_p=LR_P, prox_steps=P)
BRED = dict(**PROX, eta=ETA, maml_rate=MAML)


def on_losses(loss, method, steps=R, rounds=T, server=None):
  """Runs a method on losses (k, w) in float64.

  Returns all w [T + 1, d], all slots of the method, and the personal models of
  the last state.
  """
  model = base.Model(
    lambda key: base.Variables(jnp.asarray(G['w0']), {}),
    lambda v, x, mask=None, train=False: base.Output(  # its loss is 0
      jnp.zeros((len(x), 1)), (), {}
    ),
  )
  losses = base.Method(
    penalty=lambda v, output, batch, view, key: loss(view.client_id, v.params)
  )
  fed = federation.federation(
    model,
    base.chain(fed_avg.fed_avg(server), losses, method(model)),
    solvers.local_sgd(LR, batch_size=int(SIZES.max()), steps=steps),
    len(SIZES),
  )
  data = clients.from_partition(
    np.zeros((SIZES.sum(), 1)),
    np.zeros(SIZES.sum(), int),
    np.split(np.arange(SIZES.sum()), np.cumsum(SIZES)[:-1]),
  )
  state = fed.init(KEY)
  found = [(state.variables.params, state.clients[0][2])]
  final, _ = federation.run(
    fed,
    jax.tree.map(jnp.copy, state),
    data,
    problems.schedule([[0, 1, 2]] * rounds, 3),
    KEY,
    every=1,
    callback=lambda t, state, info: found.append(
      jax.device_get((state.variables.params, state.clients[0][2]))
    ),
  )
  personal = [
    fed.personalise(final, data, jnp.int32(k), jnp.int32(k), KEY)
    for k in range(3)
  ]
  return np.array([w for w, _ in found]), [own for _, own in found], personal


def quadratic(k, w):
  away = w - jnp.asarray(G['a'])[k]
  return away @ jnp.asarray(G['A'])[k] @ away / 2


def bred(**options):
  return lambda model: p_fed_bred.p_fed_bred(model, **{**BRED, **options})


def me(**options):
  return lambda model: p_fed_bred.p_fed_me(model, **{**PROX, **options})


def reference(kind, eta=ETA, beta=1.0):
  """Runs the spec's algorithm on the quadratics.

  Returns w [T + 1, d], theta [T + 1, K, d], last [K, d].
  """
  w, share = G['w0'], SIZES / SIZES.sum()
  theta, last = np.array([w] * 3), np.array([w] * 3)
  all_w, all_theta = [w], [theta.copy()]
  for _ in range(T):
    ends = []
    for k in range(3):
      slope = lambda v, k=k: G['A'][k] @ (v - G['a'][k])
      wk, v = w, w
      for _ in range(R):
        v = v if kind == 'warm' else wk
        mean = wk
        if kind == 'lg':
          v = mean = wk - eta * slope(wk)
        if kind == 'mh':
          v = wk = wk - MAML * slope(wk - MAML * slope(wk))
        if kind in ('meg', 'mh'):
          mean = wk - eta * (last[k] - theta[k])
        for _ in range(P):
          v = v - LR_P * (slope(v) + LAM * (v - mean))
        theta[k] = v
        wk = wk - LR * LAM * (mean - v)
      last[k] = wk
      ends.append(wk)
    w = (1 - beta) * w + beta * share @ ends
    all_w.append(w)
    all_theta.append(theta.copy())
  return np.array(all_w), np.array(all_theta), last


class TrajectoryTest(parameterized.TestCase):
  def test_fed_avg(self):
    """Tests the solver that the methods take apart."""
    with enable_x64(True):
      w, _, _ = on_losses(quadratic, lambda model: base.Method())
    np.testing.assert_allclose(w, G['fedavg_w'], atol=1e-12)

  @parameterized.parameters(('pfedme', me()), ('lg', bred(kind='lg')))
  def test_golden(self, name, method):
    with enable_x64(True):
      w, slots, _ = on_losses(quadratic, method)
    np.testing.assert_allclose(w, G[f'{name}_w'], atol=1e-12)
    theta = [slot.theta.params for slot in slots]
    np.testing.assert_allclose(theta, G[f'{name}_theta'], atol=1e-12)

  @parameterized.parameters(
    ('warm', 'pfedme_w'), ('lg', 'lg_w'), ('none', 'lg_eta0_w')
  )
  def test_reference(self, kind, golden):
    """Tests the reference that is used for kinds without golden arrays."""
    np.testing.assert_allclose(reference(kind)[0], G[golden], atol=1e-12)

  @parameterized.parameters(('lg', 1.0), ('meg', 1.0), ('mh', 1.0), ('mh', 2.0))
  def test_bred(self, kind, beta):
    with enable_x64(True):
      w, slots, personal = on_losses(
        quadratic, bred(kind=kind), server=optax.sgd(beta)
      )
    want_w, want_theta, want_last = reference(kind, beta=beta)
    np.testing.assert_allclose(w, want_w, atol=1e-12)
    theta = [slot.theta.params for slot in slots]
    np.testing.assert_allclose(theta, want_theta, atol=1e-12)
    last = slots[-1].last
    if kind == 'lg':
      self.assertEqual(last, ())
    else:
      np.testing.assert_allclose(last, want_last, atol=1e-12)
    for k, (before, after) in enumerate(personal):
      self.assertEqual(set(before), {'broadcast', 'theta'})
      self.assertEqual(set(after), {'personalised', 'personalised_theta'})
      np.testing.assert_array_equal(
        before['theta'].variables.params, theta[-1][k]
      )
      gap = np.subtract(
        after['personalised'].variables.params,
        after['personalised_theta'].variables.params,
      )
      self.assertGreater(np.abs(gap).max(), 1e-3)

  def test_eta_of_zero_and_no_warm_start(self):
    """Both are the same method, which differs from the warm one."""
    with enable_x64(True):
      cold, _, _ = on_losses(quadratic, me(warm=False))
    np.testing.assert_allclose(cold, G['lg_eta0_w'], atol=1e-12)
    gap = np.abs(cold - G['pfedme_w']).max()
    self.assertBetween(gap, 2.9e-2, 3.1e-2)


class IdentityTest(parameterized.TestCase):
  """Identities A1, A2 and A5 of the spec."""

  def test_exact_prox(self):
    """With many steps theta is the prox, and w moves by its envelope's
    gradient."""
    with enable_x64(True):
      _, slots, _ = on_losses(quadratic, me(prox_steps=2000), steps=1, rounds=1)
    theta = slots[1].theta.params
    np.testing.assert_allclose(theta, G['prox_exact'], atol=1e-8)
    exact = LAM * (G['w0'] - theta)
    np.testing.assert_allclose(exact, G['envgrad_closed'], atol=1e-6)
    np.testing.assert_allclose(G['envgrad_exact'], exact, atol=1e-6)

  @parameterized.parameters((15.0, 1e-12), (1e7, 1e-7))
  def test_one_step_is_fed_avg(self, lam, tolerance):
    """With lr_p = 1 / lambda and one step, lambda (mu - theta) is the gradient.

    For a large lambda that is the exact prox.
    """
    with enable_x64(True):
      w, _, _ = on_losses(
        quadratic, me(lam=lam, lr_p=1 / lam, prox_steps=1, warm=False)
      )
    np.testing.assert_allclose(w, G['fedavg_w'], atol=tolerance)
    np.testing.assert_allclose(w, G['exactprox_laminf_w'], atol=1e-7)

  def test_linear_loss(self):
    c = np.array([[1.0, -2.0, 0.5, 3.0], [0.0, 1.0, 1.0, 1.0], [2.0] * 4])
    linear = lambda k, w: jnp.asarray(c)[k] @ w
    with enable_x64(True):
      thetas, ends = [], []
      for method in (me(), bred(kind='lg')):
        w, slots, _ = on_losses(linear, method, steps=1, rounds=1)
        thetas.append(slots[1].theta.params)
        ends.append(w[1])
    factor = 1 - (1 - LR_P * LAM) ** P
    np.testing.assert_allclose(
      LAM * (G['w0'] - thetas[0]), factor * c, atol=1e-12
    )
    np.testing.assert_allclose(thetas[1] - thetas[0], -ETA * c, atol=1e-12)
    np.testing.assert_allclose(ends[0], ends[1], atol=1e-12)
    mean = SIZES / SIZES.sum() @ c
    np.testing.assert_allclose(ends[0], G['w0'] - LR * factor * mean)


def rounds(method, model=problems.LINEAR, ids=([0, 1, 4], [1, 3, -1]), **rows):
  """Returns the state and the metrics after rounds on images."""
  fed = problems.make(model, base.chain(fed_avg.fed_avg(), method))
  schedule = problems.schedule(ids)._replace(**rows)
  return fed, *federation.run(
    fed, fed.init(KEY), problems.DATA, schedule, KEY, every=2
  )


class EngineTest(parameterized.TestCase):
  def test_eta_of_zero(self):
    """lg, meg and pFedMe without a warm start are one method, bit for bit."""
    model = problems.LINEAR
    options = dict(lam=4.0, lr_p=0.1, prox_steps=2)
    states = [
      rounds(p_fed_bred.p_fed_me(model, **options, warm=False))[1],
      *(
        rounds(p_fed_bred.p_fed_bred(model, kind, **options, eta=0.0))[1]
        for kind in ('lg', 'meg')
      ),
    ]
    thetas = [state.clients[0][1].theta for state in states]
    chex.assert_trees_all_equal(*(state.variables for state in states))
    chex.assert_trees_all_equal(*thetas)

  def test_who_does_not_work_keeps_its_slot(self):
    """This includes a client without steps because of a limit.

    A client that trains but does not arrive gets a new slot.
    """
    fed = problems.make(
      problems.LINEAR,
      base.chain(
        fed_avg.fed_avg(), p_fed_bred.p_fed_bred(problems.LINEAR, 'meg')
      ),
    )
    start, _ = fed.round(
      fed.init(KEY), problems.DATA, problems.row([0, 1, 2, 3, 4]), KEY
    )
    cohort = problems.row([0, 1, 2, 3], num_steps=[9, 0, 9, 9])
    cohort = cohort._replace(
      arrived=jnp.array([True, True, False, False, False]),
      worked=jnp.array([True, True, True, False, False]),
    )
    after, _ = fed.round(start, problems.DATA, cohort, KEY)
    for old, new in zip(
      jax.tree.leaves(start.clients), jax.tree.leaves(after.clients)
    ):
      same = [np.array_equal(a, b) for a, b in zip(old, new)]
      self.assertEqual(same, [False, True, False, True, True])

  def test_a_solver_without_rules(self):
    method = base.chain(fed_avg.fed_avg(), p_fed_bred.p_fed_me(problems.LINEAR))
    fed = problems.make(method=method, solve=solvers.frozen)
    with self.assertRaisesRegex(ValueError, 'such as solvers.local_sgd'):
      fed.round(fed.init(KEY), problems.DATA, problems.row([1]), KEY)

  def test_batch_norm(self):
    """theta is evaluated with the statistics of its own training."""
    model = problems.NORMED
    fed, state, _ = rounds(
      base.chain(p_fed_bred.p_fed_me(model), batch_norm.local_stats()), model
    )
    slot, (stats, _) = state.clients[0][1]
    chex.assert_trees_all_equal(slot.theta.stats, stats)
    scores = evaluation.evaluate_clients(
      fed, state, problems.DATA, problems.DATA, KEY, batch_size=5
    )
    rows = np.asarray(problems.DATA.index[1])[:12]
    theta = jax.tree.map(lambda a: a[1], slot.theta)
    logits = model.apply(theta, problems.DATA.x[rows]).logits
    np.testing.assert_allclose(
      scores['theta']['accuracy'][1],
      np.mean(np.argmax(logits, -1) == problems.DATA.y[rows]),
      rtol=1e-6,
    )

  def test_train_loss_is_that_of_the_model_before_the_step(self):
    """In the first step of the first round it is that of the initial model."""
    whole = dict(batch_size=15, epochs=1)
    want = problems.make(solve=problems.solver(**whole))
    for kind in ('lg', 'meg', 'mh'):
      fed = problems.make(
        method=base.chain(
          fed_avg.fed_avg(), p_fed_bred.p_fed_bred(problems.LINEAR, kind)
        ),
        solve=problems.solver(**whole),
      )
      losses = [
        f.round(f.init(KEY), problems.DATA, problems.row([1, 3]), KEY)[
          1
        ].metrics['train_loss']
        for f in (fed, want)
      ]
      np.testing.assert_allclose(*losses, rtol=1e-6)


class PriorTest(parameterized.TestCase):
  def hyperbolic(self):
    """Makes a family whose curvature is not constant.

    g* = sum cosh, and natural parameters are sinh(mean).
    """
    total = lambda tree, f: sum(jnp.sum(f(a)) for a in jax.tree.leaves(tree))
    return p_fed_bred.Prior(
      lambda mean: total(mean, jnp.cosh),
      lambda natural: total(
        natural, lambda s: s * jnp.arcsinh(s) - jnp.sqrt(1 + s**2)
      ),
    )

  def trees(self):
    draw = lambda seed: {
      'kernel': jax.random.normal(jax.random.key(seed), (4, 3)),
      'bias': jax.random.normal(jax.random.key(seed + 9), (3,)),
    }
    return draw(0), draw(1)

  @parameterized.parameters('spherical', 'diagonal', 'hyperbolic')
  def test_conjugates(self, family):
    """The two gradients are inverse to each other.

    D is 0 at the mean and positive elsewhere, and its slope is the difference
    of the natural parameters.
    """
    with enable_x64(True):
      prior = (
        self.hyperbolic()
        if family == 'hyperbolic'
        else p_fed_bred.prior(family)
      )
      theta, mean = self.trees()
      chex.assert_trees_all_close(
        prior.mean(prior.natural(theta)), theta, atol=1e-12
      )
      self.assertEqual(float(prior.divergence(theta, theta)), 0)
      self.assertGreater(float(prior.divergence(theta, mean)), 0.1)
      chex.assert_trees_all_close(
        jax.grad(prior.divergence)(theta, mean),
        optax.tree.sub(prior.natural(theta), prior.natural(mean)),
        atol=1e-12,
      )
      # The divergence's gradient in its mean, theta fixed.
      chex.assert_trees_all_close(
        prior.pull(mean, theta),
        jax.grad(prior.divergence, 1)(theta, mean),
        atol=1e-12,
      )

  def test_diagonal_by_hand(self):
    """12 weights have 4 inputs, 3 biases have 1: the mean is 51 / 15."""
    theta, mean = self.trees()
    squares = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), theta, mean)
    want = (4 * squares['kernel'] + squares['bias']) / 2 / (51 / 15)
    got = p_fed_bred.prior('diagonal').divergence(theta, mean)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    p = p_fed_bred.precisions(theta)
    self.assertAlmostEqual((3 * p[0] + 12 * p[1]) / 15, 1)

  def test_diagonal_in_training(self):
    """One step on a linear loss: theta and w by hand, array by array."""
    model = problems.LINEAR
    options = dict(lam=2.0, lr_p=0.1, prox_steps=3, eta=0.5)
    with enable_x64(True):
      solve = solvers.local_sgd(0.3, batch_size=12, steps=1)
      zero = base.Method(  # cross-entropy away, a linear loss in its place
        train=lambda inner, objective, view, key: (
          inner(
            objective._replace(
              loss=lambda v, batch, key: (
                sum(jnp.sum(a) for a in jax.tree.leaves(v.params)),
                base.LossAux(v.stats, jnp.float64(0)),
              )
            ),
            view,
          ),
          view.own,
        )
      )
      fed = problems.make(
        model,
        base.chain(
          fed_avg.fed_avg(),
          zero,
          p_fed_bred.p_fed_bred(model, 'lg', family='diagonal', **options),
        ),
        solve=solve,
      )
      start = fed.init(KEY)
      after, _ = fed.round(start, problems.make_data(), problems.row([1]), KEY)
      theta = jax.tree.map(lambda a: a[1], after.clients[0][2].theta.params)
      leaves, structure = jax.tree.flatten(start.variables.params)
      want_theta, want_w = [], []
      for w, p in zip(leaves, p_fed_bred.precisions(start.variables.params)):
        mean = w - 0.5 / p  # grad g(grad g*(w) - eta 1)
        v = mean
        for _ in range(3):
          v = v - 0.1 * (1 + 2.0 * p * (v - mean))
        want_theta.append(v)
        want_w.append(w - 0.3 * 2.0 * p * (mean - v))
      chex.assert_trees_all_close(
        theta, jax.tree.unflatten(structure, want_theta), atol=1e-10
      )
      chex.assert_trees_all_close(
        after.variables.params,
        jax.tree.unflatten(structure, want_w),
        atol=1e-10,
      )


class ErrorsTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(lam=0.0), 'lam and lr_p must be above 0'),
    (dict(lr_p=0.0), 'lam and lr_p must be above 0'),
    (dict(prox_steps=0), 'prox_steps at least 1'),
    (dict(lam=15.0, lr_p=0.2), r'lr_p \* lam must be at most 2.*got 0.2 \* 15'),
  )
  def test_of_both(self, options, message):
    for make in (p_fed_bred.p_fed_me, p_fed_bred.p_fed_bred):
      with self.assertRaisesRegex(ValueError, message):
        make(problems.LINEAR, **options)

  @parameterized.parameters(
    (dict(kind='mg'), "kind must be one of .'lg', 'meg', 'mh'., got 'mg'"),
    (dict(eta=-1.0), 'eta and maml_rate must be at least 0'),
    (dict(family='poisson'), "family must be one of .*got 'poisson'"),
    (
      dict(family='diagonal', lam=20.0, lr_p=0.099),
      r'lr_p \* lam \* 1.0\d \(its largest p_l\) must be at most 2',
    ),
  )
  def test_of_p_fed_bred(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      p_fed_bred.p_fed_bred(problems.LINEAR, **options)

  def test_a_factor_of_two_is_allowed(self):
    p_fed_bred.p_fed_me(problems.LINEAR, lam=20.0, lr_p=0.1)


if __name__ == '__main__':
  absltest.main()
