"""Tests of FedFTG: plain loops, identities, masks, label sampling."""

import functools

from absl.testing import absltest, parameterized
import chex
import hypothesis
from hypothesis import strategies as st
import jax
from jax import enable_x64
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedftg_jax import base, distillation, federation, losses, recipes
from fedftg_jax.methods import (
  diagnostics,
  fed_avg,
  fed_df,
  fed_ftg,
  remembering,
)
from tests import problems

KEY = jax.random.key(3)
GENERATOR = problems.GENERATOR
CLASSES = problems.NUM_CLASSES
SMALL = dict(iterations=2, student_steps=2, batch_size=6)
COUNTS = jnp.array([[4, 0, 2], [1, 3, 0], [2, 2, 0]])


@functools.partial(jax.jit, static_argnums=(0, 1))
def teachers(model=problems.LINEAR, num=3):
  """Makes models with weights and running statistics of their own."""
  taught = jax.vmap(model.init)(jax.random.split(KEY, num))
  return taught._replace(
    stats=jax.tree.map(
      lambda a: a + 0.3 * jnp.arange(num)[:, None], taught.stats
    )
  )


@functools.partial(jax.jit, static_argnames=('model', 'settings'))
def fine_tune(
  student,
  made,
  taught,
  counts,
  arrived,
  z,
  labels,
  model=problems.LINEAR,
  settings=(),
):
  return fed_ftg.fine_tune(
    model,
    GENERATOR,
    student,
    made,
    taught,
    counts,
    z,
    labels,
    arrived=arrived,
    **{
      'generator_optimizer': optax.adam(0.01),
      'student_steps': 2,
      'student_optimizer': distillation.sgd(0.1, 1e-3),
      **dict(settings),
    },
  )


draw = jax.jit(fed_ftg.draw, static_argnums=(2, 3, 4, 5))


def inputs(model=problems.LINEAR, num=3, batch_size=6, **settings):
  z, labels = draw(KEY, COUNTS[:num].sum(0), 4, 2, batch_size)
  return dict(
    student=model.init(jax.random.key(1)),
    made=GENERATOR.init(KEY),
    taught=teachers(model, num),
    counts=COUNTS[:num],
    arrived=jnp.ones(num, bool),
    z=z,
    labels=labels,
    model=model,
    settings=tuple(settings.items()),
  )


class FineTuneTest(parameterized.TestCase):
  def test_float32_against_float64(self):
    """The generator uses SGD, because Adam amplifies rounding errors of
    float32."""
    given = inputs(generator_optimizer=optax.sgd(0.01))
    single = jax.tree.map(np.asarray, fine_tune(**given)[:2])
    given = {
      k: jax.tree.map(np.asarray, v) if k not in ('model', 'settings') else v
      for k, v in given.items()
    }
    with enable_x64(True):
      wide = {
        k: jax.tree.map(
          lambda a: jnp.asarray(a, float if a.dtype == np.float32 else None), v
        )
        if k not in ('model', 'settings')
        else v
        for k, v in given.items()
      }
      double = jax.tree.map(np.asarray, fine_tune(**wide)[:2])
    self.assertEqual(jax.tree.leaves(double)[0].dtype, np.float64)
    chex.assert_trees_all_close(
      single, jax.tree.map(lambda a: a.astype(np.float32), double), atol=1e-5
    )

  def test_batch_of_one(self):
    chex.assert_tree_all_finite(fine_tune(**inputs(batch_size=1)))


class PlainLoopTest(parameterized.TestCase):
  """Compares a whole server step with Python loops that follow the spec.

  BatchNorm models have statistics of their own, one teacher is absent, and
  there are two iterations of two generator passes and two student steps, in
  float64.
  """

  def reference(self, model, options, student, made, taught, counts, z, labels):
    alpha = np.asarray(counts, float) / (counts.sum(0) + 1e-6)
    if options.teacher_weight == 'uniform':
      alpha = np.full(counts.shape, 1 / len(taught))
    adam = optax.adam(options.generator_lr)
    opt_state = jax.jit(adam.init)(made.params)

    def loss(params, stats, noise, y, some, student, share):
      x, stats = GENERATOR.apply(
        base.Variables(params, stats), noise, y, train=True
      )
      s = model.apply(student, x).logits
      value = options.lambda_dis * share * losses.diversity(noise, x)
      for k in some:
        logits = model.apply(taught[k], x).logits
        p, weight = jax.nn.softmax(logits), jnp.asarray(alpha[k])[y]
        gap = jnp.abs(s - jax.lax.stop_gradient(logits)).mean(-1)
        if options.md == 'kl':
          gap = (p * (jnp.log(p) - jax.nn.log_softmax(s))).sum(-1)
        nll = -jnp.log(p)[jnp.arange(len(y)), y]
        fidelity = (nll * weight).mean()
        if options.cls_weight == 'mean':
          fidelity = nll.mean() * weight.mean()
        value += options.lambda_cls * fidelity
        if options.hard_samples:
          value -= (gap * weight).mean()
      return value, stats

    everybody = tuple(range(len(taught)))
    turns = (
      [everybody] if options.gen_step == 'joint' else [(k,) for k in everybody]
    )

    @jax.jit
    def one_pass(made, opt_state, student, noise, y):
      for some in turns:
        grads, stats = jax.grad(loss, has_aux=True)(
          *made, noise, y, some, student, len(some) / len(taught)
        )
        updates, opt_state = adam.update(grads, opt_state)
        made = base.Variables(optax.apply_updates(made.params, updates), stats)
      return made, opt_state

    @jax.jit
    def target(made, noise, y):
      x, _ = GENERATOR.apply(made, noise, y)
      weight = [jnp.asarray(a)[y][:, None] for a in alpha]
      logits = [model.apply(t, x).logits for t in taught]
      if options.ensemble == 'prob':
        return x, sum(a * jax.nn.softmax(v) for a, v in zip(weight, logits))
      return x, sum(weight) * jax.nn.softmax(
        sum(a * v for a, v in zip(weight, logits))
      )

    @jax.jit
    def student_step(student, x, q):
      def value(params):
        out = model.apply(
          student._replace(params=params), x, train=options.student_bn != 'keep'
        )
        ce = -(q * jax.nn.log_softmax(out.logits)).sum(-1).mean()
        over = 1 if options.student_reduction == 'batchmean' else q.shape[1]
        return ce / over, out.stats

      grads, stats = jax.grad(value, has_aux=True)(student.params)
      if options.student_clip:
        norm = jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
        share = jnp.minimum(1, options.student_clip / norm)
        grads = jax.tree.map(lambda g: share * g, grads)
      params = jax.tree.map(
        lambda p, g: p - options.student_lr * (g + options.weight_decay * p),
        student.params,
        grads,
      )
      return base.Variables(
        params, stats if options.student_bn == 'overwrite' else student.stats
      )

    for noise, y in zip(z, labels):
      for _ in range(options.generator_steps):
        made, opt_state = one_pass(made, opt_state, student, noise, y)
      x, q = target(made, noise, y)
      for _ in range(options.student_steps):
        student = student_step(student, x, q)
    return student, made

  @parameterized.named_parameters(
    *((name, name) for name in recipes.FTG_PRESETS),
    # What no preset has, at once. The clip is reached in one of the student's
    # four steps.
    (
      'others',
      'official',
      dict(
        md='kl',
        student_bn='batch',
        student_clip=0.1,
        lambda_cls=0.5,
        lambda_dis=0.25,
        teacher_weight='uniform',
        label_sampling='uniform',
        student_lr=0.2,
        generator_lr=0.02,
      ),
    ),
  )
  def test_update(self, preset, changes=None):
    with enable_x64(True):
      model = problems.NORMED
      small = dict(
        iterations=2,
        generator_steps=2,
        student_steps=2,
        batch_size=6,
        **(changes or {}),
      )
      options = recipes.ftg_options(preset, **small)
      part = recipes.RECIPES['fed_ftg'].build(
        recipes.Settings(model, CLASSES, generator=GENERATOR),
        preset=preset,
        **small,
      )
      student, sent = (model.init(jax.random.key(i)) for i in (1, 7))
      taught, arrived = teachers(model), jnp.array([True, False, True])
      here = [jax.tree.map(lambda a, k=k: a[k], taught) for k in (0, 2)]
      counts, of_all = COUNTS.at[1].set(0), COUNTS[::2]
      shared, _ = jax.jit(part.init)(KEY, student)
      made = shared
      if options.memory:
        made, past = shared.inner, jnp.array([3.0, 0.2, 1.0])
        shared = shared._replace(past=past)
        here.append(sent)
        of_all = jnp.concatenate([of_all, jnp.array([[3, 0, 1]])])
      received = base.Received(
        sent, None, (), (taught, counts), arrived, jnp.int32(1), 5, ()
      )
      tuned, after, _ = jax.jit(lambda v, s: part.update(v, s, received, KEY))(
        student, shared
      )
      draw_labels = recipes.PARTS['labels'][options.labels]
      drawn = (
        jnp.ones_like(of_all) if options.label_sampling == 'uniform' else of_all
      ).sum(0)
      key_noise, key_labels = jax.random.split(KEY)
      z = jax.random.normal(key_noise, (2, 6, 4))
      labels = draw_labels(key_labels, drawn, 12).reshape(2, 6)
      want = self.reference(
        model, options, student, made, here, of_all, z, labels
      )
      made = after.inner if options.memory else after
      # Adam's first steps divide a gradient by its own size. Where it is zero
      # up to rounding, the two results differ by more.
      chex.assert_trees_all_close((tuned, made), want, atol=1e-8)
      if options.memory:
        np.testing.assert_allclose(
          after.past, options.memory * (past + counts.sum(0))
        )


class RememberingTest(absltest.TestCase):
  def received(self):
    counts = COUNTS.at[2].set(0)
    return base.Received(
      problems.LINEAR.init(jax.random.key(7)),
      None,
      (),
      (teachers(), counts),
      jnp.array([True, True, False]),
      jnp.int32(1),
      5,
      (),
    )

  def test_one_more_teacher(self):
    """It is the last teacher, with the rounded counts of earlier rounds."""
    seen = []
    part = base.Method(
      init=lambda key, variables: (5, ()),
      update=lambda variables, shared, received, key: (
        seen.append(received),
        (variables, shared + 1, base.Info()),
      )[1],
    )
    method = remembering.remembering(part, CLASSES, 0.5)
    shared, _ = method.init(KEY, ())
    np.testing.assert_array_equal(shared.past, [0, 0, 0])
    received = self.received()
    _, after, _ = method.update((), shared, received, KEY)
    self.assertEqual(after.inner, 6)
    np.testing.assert_allclose(after.past, [2.5, 1.5, 1.0])
    np.testing.assert_array_equal(seen[0].arrived, [True, True, False, False])
    method.update(
      (), after._replace(past=jnp.array([3.0, 0.2, 1.0])), received, KEY
    )
    models, counts = seen[1].stacked
    np.testing.assert_array_equal(counts, [*received.stacked[1], [3, 0, 1]])
    np.testing.assert_array_equal(seen[1].arrived, [True, True, False, True])
    chex.assert_trees_all_equal(
      jax.tree.map(lambda a: a[3], models), received.broadcast
    )
    chex.assert_trees_all_equal(
      jax.tree.map(lambda a: a[:3], models), received.stacked[0]
    )

  def test_fed_df(self):
    """FedDF with a memory learns from one more teacher, computed by hand."""
    options = fed_df.Options(generator_steps=1, student_steps=1, batch_size=6)
    plain = fed_df.fed_df(problems.LINEAR, GENERATOR, CLASSES, options)
    method = recipes.RECIPES['fed_df'].build(
      recipes.Settings(problems.LINEAR, CLASSES, generator=GENERATOR),
      **{**options._asdict(), 'ensemble': 'prob'},
      memory=0.5,
    )
    received, student = self.received(), problems.LINEAR.init(jax.random.key(1))
    shared, _ = jax.jit(method.init)(KEY, student)
    shared = shared._replace(past=jnp.array([3.0, 0.2, 1.0]))
    models, counts = received.stacked
    joined = received._replace(
      stacked=(
        jax.tree.map(
          lambda a, b: jnp.concatenate([a, b[None]]), models, received.broadcast
        ),
        jnp.concatenate([counts, jnp.array([[3, 0, 1]])]),
      ),
      arrived=jnp.array([True, True, False, True]),
    )
    got = jax.jit(lambda: method.update(student, shared, received, KEY))()
    want = jax.jit(lambda: plain.update(student, shared.inner, joined, KEY))()
    chex.assert_trees_all_close((got[0], got[1].inner), want[:2], atol=1e-6)

  def test_errors(self):
    for decay in (1.0, -0.1):
      with self.assertRaisesRegex(ValueError, 'at least 0 and below 1, got'):
        remembering.remembering(base.Method(), CLASSES, decay)


class PiecesTest(parameterized.TestCase):
  def test_terms_by_hand(self):
    rng = np.random.RandomState(0)
    s, t = rng.randn(2, 5, 3)
    p, q = (np.exp(v) / np.exp(v).sum(-1, keepdims=True) for v in (s, t))
    ce, alpha = rng.rand(2, 5)
    with enable_x64(True):
      for got, want in (
        (fed_ftg.l1(s, t), np.abs(s - t).mean(-1)),
        (fed_ftg.kl(s, t), (q * np.log(q / p)).sum(-1)),
        (fed_ftg.mean_times_mean(ce, alpha), ce.mean() * alpha.mean()),
        (fed_ftg.per_sample(ce, alpha), (ce * alpha).mean()),
        (fed_ftg.soft_cross_entropy(s, q), -(q * np.log(p)).sum(-1).mean()),
        (fed_ftg.over_classes(s, q), -(q * np.log(p)).sum(-1).mean() / 3),
      ):
        np.testing.assert_allclose(got, want, rtol=1e-10)
      fixed = jax.grad(lambda t: fed_ftg.l1(s, t).sum())(jnp.asarray(t))
      np.testing.assert_array_equal(fixed, 0 * t)

  def test_student_gradient_is_that_of_the_weighted_kl_over_c(self):
    """The official loss, as the spec reads it, is (1 / C) sum_k alpha_k
    KL_k."""
    with enable_x64(True):
      rng = np.random.RandomState(1)
      student, teacher = (
        jnp.asarray(rng.randn(5, 3)),
        jnp.asarray(rng.randn(2, 5, 3)),
      )
      alpha = jnp.asarray(rng.dirichlet([1, 1], size=5).T)
      target = distillation.mean_of_probabilities(teacher, alpha)

      def weighted_kl(s):
        kl = jax.vmap(lambda t: losses.kl_divergence(t, s))(teacher)
        return jnp.mean(jnp.sum(alpha * kl, 0)) / 3

      np.testing.assert_allclose(
        jax.grad(fed_ftg.over_classes)(student, target),
        jax.grad(weighted_kl)(student),
        atol=1e-12,
      )

  def test_logit_ensemble_is_the_nearest_in_reverse_kl(self):
    """sum_k alpha_k KL(p || p_k) = KL(p || logit ensemble) + constant in p."""
    with enable_x64(True):
      rng = np.random.RandomState(2)
      teacher = jnp.asarray(rng.randn(2, 5, 3))
      alpha = jnp.asarray(rng.dirichlet([1, 1], size=5).T)
      together = jnp.log(distillation.mean_of_logits(teacher, alpha))
      a, b = (jnp.asarray(rng.randn(5, 3)) for _ in 'ab')
      weighted = lambda s: jnp.sum(
        alpha * jax.vmap(lambda t: losses.kl_divergence(s, t))(teacher), 0
      )
      np.testing.assert_allclose(
        weighted(a) - weighted(b),
        losses.kl_divergence(a, together) - losses.kl_divergence(b, together),
        atol=1e-10,
      )

  def test_weights(self):
    all_here = jnp.ones(3, bool)
    alpha = fed_ftg.class_weights(COUNTS, all_here)
    np.testing.assert_allclose(alpha.sum(0), 1, atol=1e-5)
    np.testing.assert_allclose(alpha[:, 0], [4 / 7, 1 / 7, 2 / 7], atol=1e-6)
    alpha = fed_ftg.class_weights(COUNTS, jnp.array([False, True, True]))
    np.testing.assert_allclose(alpha[:, 2], 0)  # no teacher has class 2
    np.testing.assert_allclose(alpha[0], 0)
    uniform = fed_ftg.uniform_weights(COUNTS, jnp.array([True, False, True]))
    np.testing.assert_allclose(uniform, [[0.5] * 3, [0] * 3, [0.5] * 3])

  @hypothesis.settings(deadline=None, max_examples=30)
  @hypothesis.given(
    st.lists(st.integers(0, 2**28 - 1), min_size=4, max_size=4),
    st.integers(0, 2**31 - 1),
  )
  def test_quota_labels(self, counts, seed):
    """Counts are exact even if products exceed 2**32; absent classes get
    none."""
    hypothesis.assume(sum(counts))
    num = 500
    labels = jax.jit(distillation.quota_labels, static_argnums=2)(
      jax.random.key(seed), jnp.array(counts, jnp.int32), num
    )
    ends = [num * int(c) // sum(counts) for c in np.cumsum(counts)]
    np.testing.assert_array_equal(
      np.bincount(labels, minlength=4), np.diff([0, *ends])
    )

  def test_iid_labels(self):
    labels = distillation.iid_labels(KEY, jnp.array([1, 0, 3]), 8000)
    np.testing.assert_allclose(
      np.bincount(labels, minlength=3) / 8000, [0.25, 0, 0.75], atol=0.02
    )

  def test_labels_of_all_classes(self):
    draw = distillation.of_all_classes(distillation.quota_labels)
    labels = draw(KEY, jnp.array([1, 0, 3]), 12)
    np.testing.assert_array_equal(np.bincount(labels), [4, 4, 4])

  def test_presets(self):
    """The options by name match those of the functions; defaults are the
    code's."""
    self.assertEqual(recipes.ftg_options('official'), recipes.FtgOptions())
    of = lambda name: recipes.ftg_options(name)._asdict()
    changed = lambda name: {
      k: v for k, v in of(name).items() if v != of('official')[k]
    }
    mended = dict(cls_weight='per_sample', student_reduction='batchmean')
    self.assertEqual(
      changed('paper'), dict(mended, md='kl', gen_step='joint', labels='iid')
    )
    self.assertEqual(changed('intended'), dict(mended, student_bn='keep'))
    self.assertEqual(
      changed('robust'),
      dict(
        mended,
        batch_size=10,
        gen_step='joint',
        generator_steps=2,
        student_bn='keep',
        hard_samples=False,
        ensemble='logit',
        weight_decay=0.0,
        student_clip=3.0,
        memory=0.9,
      ),
    )
    self.assertEqual(recipes.ftg_options('intended', md='kl').md, 'kl')

  @parameterized.parameters(
    (dict(md='l2'), r"md must be one of \('l1', 'kl'\), got 'l2'"),
    (dict(preset='best'), "intended.*got 'best'"),
    (dict(iterations=-1), 'iterations must be at least 0, got -1'),
    (dict(batch_size=0), 'batch_size must be at least 1, got 0'),
    (dict(student_clip=-1.0), 'clip_norm must be at least 0, got -1'),
    (dict(memory=1.0), 'memory must be at least 0 and below 1'),
  )
  def test_errors(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      recipes.build(
        'fed_ftg',
        recipes.Settings(
          problems.LINEAR,
          CLASSES,
          generator=GENERATOR,
          options={'fed_ftg': options},
        ),
      )

  def test_no_option_is_ignored(self):
    """A learning rate belongs to the optimiser and is not accepted
    elsewhere."""
    given = inputs()
    given.pop('model'), given.pop('settings'), given.pop('arrived')
    with self.assertRaises(TypeError):
      fed_ftg.fed_ftg(problems.LINEAR, GENERATOR, CLASSES, student_lr=0.5)
    with self.assertRaises(TypeError):
      fed_ftg.fine_tune(
        problems.LINEAR,
        GENERATOR,
        *given.values(),
        student_lr=0.5,
        generator_optimizer=optax.adam(0.01),
        student_optimizer=optax.sgd(0.1),
      )


class DiagnosticsTest(parameterized.TestCase):
  def test_by_hand(self):
    """One image is recognised as requested, one is split between two classes.

    The ensemble's weights sum to a half.
    """
    target = jnp.array([[1.0, 0.0, 0.0], [0.0, 0.25, 0.25]])
    uniform, exact = (
      jnp.zeros((2, 3)),
      jnp.log(jnp.array([[1.0, 1e-9, 1e-9], [1e-9, 0.5, 0.5]])),
    )
    measured = diagnostics.of_images(target, jnp.array([0, 1]), uniform, exact)
    for name, want in (
      ('recognised', 0.75),
      ('ensemble_ce', np.log(2) / 2),
      ('ensemble_entropy', np.log(2) / 2),
      ('gap', np.log(3) - np.log(2) / 2),
      ('gap_left', 0.0),
    ):
      np.testing.assert_allclose(measured[name], want, atol=1e-6, err_msg=name)

  def test_of_round(self):
    """Means are over iterations and, for some, over the teachers that
    arrived."""
    by_name = {
      'cls': jnp.array([[[1.0, 9.0, 3.0]], [[3.0, 9.0, 5.0]]]),
      'gap': jnp.array([1.0, 2.0]),
    }
    before = base.Variables({'w': jnp.array([3.0, 4.0])}, {})
    after = base.Variables({'w': jnp.array([3.0, 5.0])}, {})
    got = diagnostics.of_round(
      by_name, jnp.array([True, False, True]), before, after
    )
    self.assertEqual(
      {k: float(v) for k, v in got.items()},
      {'cls': 3.0, 'gap': 1.5, 'moved': np.float32(0.2)},
    )
    stats = {'m': jnp.array([2.0])}
    got = diagnostics.of_round(
      {},
      jnp.ones(2, bool),
      before._replace(stats=stats),
      after._replace(stats={'m': jnp.array([1.0])}),
    )
    self.assertEqual(float(got['stats_moved']), 0.5)

  def test_gaps_are_before_and_after(self):
    _, _, measured = fine_tune(
      **inputs(terms=fed_ftg.Terms(distance=fed_ftg.soft_cross_entropy))
    )
    self.assertEqual(measured['gap'].shape, (2,))
    self.assertTrue((measured['gap_left'] < measured['gap']).all())
    # Before its first step, the student's loss is the gap plus the entropy.
    np.testing.assert_allclose(
      measured['gap'] + measured['ensemble_entropy'],
      measured['student'][:, 0],
      rtol=1e-4,
    )


class InARoundTest(parameterized.TestCase):
  def part(self, **options):
    return recipes.RECIPES['fed_ftg'].build(
      recipes.Settings(problems.LINEAR, CLASSES, generator=GENERATOR),
      **{**SMALL, **options},
    )

  def test_no_iterations_equals_fed_avg_bitwise(self):
    with_ftg = problems.make(
      method=base.chain(fed_avg.fed_avg(), self.part(iterations=0))
    )
    without = problems.make()
    rows = problems.schedule([[0, 1, 4], [2, 3, -1]])
    results = []
    for fed in (with_ftg, without):
      state = fed.init(KEY)._replace(variables=without.init(KEY).variables)
      results.append(federation.run(fed, state, problems.DATA, rows, KEY)[0])
    chex.assert_trees_all_equal(results[0].variables, results[1].variables)

  def test_variants_and_metrics(self):
    fed = problems.make(method=base.chain(fed_avg.fed_avg(), self.part()))
    state, info = fed.round(
      fed.init(KEY), problems.DATA, problems.row([0, 1, 4, -1]), KEY
    )
    chex.assert_trees_all_equal(info.models['fine_tuned'], state.variables)
    chex.assert_trees_all_equal(
      info.models['aggregated'], info.models['average']
    )
    self.assertEqual(
      dict(info.same), {'aggregated': 'average', 'fine_tuned': 'broadcast'}
    )
    self.assertContainsSubset(
      {'fed_ftg/' + name for name in ('md', 'cls', 'dis', 'student', 'gap')},
      info.metrics,
    )
    moved = diagnostics.relative_distance(
      state.variables.params, info.models['average'].params
    )
    np.testing.assert_allclose(info.metrics['fed_ftg/moved'], moved, rtol=1e-4)
    self.assertGreater(moved, 1e-4)
    bits = info.metrics
    self.assertEqual(bits['bits_up'][0] - bits['bits_down'][0], 32 * CLASSES)
    nobody, info = fed.round(
      state, problems.DATA, problems.row([0, 1, 4, -1], [False] * 4), KEY
    )
    chex.assert_trees_all_equal(nobody._replace(round=state.round), state)
    chex.assert_trees_all_equal(info.models['fine_tuned'], state.variables)

  def test_learning_rates_follow_the_round(self):
    """Both optimisers are functions of the round, with rate 0 in round 0."""
    part = self.part(
      student_lr=lambda r: 0.1 * r,
      generator_lr=lambda r: 0.1 * r,
      student_bn='keep',
    )
    fed = problems.make(method=base.chain(fed_avg.fed_avg(), part))
    state = fed.init(KEY)
    cohort = problems.row([0, 1, 4, -1])
    first, info = fed.round(state, problems.DATA, cohort, KEY)
    chex.assert_trees_all_equal(
      info.models['fine_tuned'], info.models['average']
    )
    chex.assert_trees_all_equal(first.shared[1].params, state.shared[1].params)
    _, info = fed.round(first, problems.DATA, cohort, KEY)
    self.assertGreater(info.metrics['fed_ftg/moved'], 1e-4)

  @pytest.mark.slow
  def test_over_seeds(self):
    with enable_x64(True):
      fed = problems.make(
        method=base.chain(fed_avg.fed_avg(), self.part(memory=0.9))
      )
      seeds = jnp.stack([jax.random.key(s) for s in (3, 4)])
      both, cohort = federation.over_seeds(fed), problems.row([0, 1, 4, -1])
      state = both.init(seeds)
      for _ in range(2):
        state, _ = both.round(state, problems.DATA, cohort, seeds)
      for r, key in enumerate(seeds):
        alone = fed.init(key)
        for _ in range(2):
          alone, _ = fed.round(alone, problems.DATA, cohort, key)
        chex.assert_trees_all_close(
          jax.tree.map(lambda a, r=r: a[r], state.variables),
          alone.variables,
          atol=1e-8,
        )

  def test_pictures(self):
    for part in (self.part(), self.part(memory=0.5)):
      method = base.chain(fed_avg.fed_avg(), part)
      shared, _ = method.init(KEY, problems.LINEAR.init(KEY))
      made, labels = GENERATOR.init(jax.random.fold_in(KEY, 1)), jnp.arange(3)
      z = jax.random.normal(KEY, (3, GENERATOR.noise_dim))
      np.testing.assert_allclose(
        method.synthesise(shared, labels, KEY),
        GENERATOR.apply(made, z, labels)[0],
        atol=1e-6,
      )
    self.assertIsNone(base.chain(fed_avg.fed_avg()).synthesise)


if __name__ == '__main__':
  absltest.main()
