"""FedFTG: identities, masks, options, label sampling."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import chex
import hypothesis
from hypothesis import strategies as st
import jax
from jax import enable_x64
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedftg_jax import base, distillation, federation, losses, models
from fedftg_jax.methods import fed_avg, fed_ftg
from tests import problems

KEY = jax.random.key(3)
GENERATOR = models.image_generator(
    problems.IMAGE_SHAPE, problems.NUM_CLASSES, noise_dim=4, width=2,
    bias_before_norm=False)
SMALL = dict(iterations=2, student_steps=2, batch_size=6)
COUNTS = jnp.array([[4, 0, 2], [1, 3, 0], [2, 2, 0]])


def teachers(model=problems.LINEAR, num=3):
  return jax.vmap(model.init)(jax.random.split(KEY, num))


@functools.partial(jax.jit, static_argnames=('model', 'options'))
def fine_tune(student, made, taught, counts, arrived, z, labels,
              model=problems.LINEAR, options=fed_ftg.Options()):
  student, shared, terms = fed_ftg.fine_tune(
      model, GENERATOR, student, init_shared(made, options), taught, counts, z,
      labels, arrived=arrived, options=options)
  return student, shared.generator, terms


def init_shared(made, options):
  return fed_ftg.init_shared(made, problems.NUM_CLASSES, options)


def inputs(options, model=problems.LINEAR, num=3):
  z, labels = fed_ftg.draw(KEY, COUNTS[:num].sum(0), 4, options)
  return dict(
      student=model.init(jax.random.key(1)), made=GENERATOR.init(KEY),
      taught=teachers(model, num), counts=COUNTS[:num],
      arrived=jnp.ones(num, bool), z=z, labels=labels, model=model,
      options=options)


class FineTuneTest(parameterized.TestCase):

  @parameterized.parameters('sequential', 'joint')
  def test_absent_teacher_is_as_if_not_there(self, gen_step):
    options = fed_ftg.Options(**SMALL, gen_step=gen_step)
    three = inputs(options)
    two = {**three, 'taught': jax.tree.map(lambda a: a[::2], three['taught']),
           'counts': COUNTS[::2], 'arrived': jnp.ones(2, bool)}
    masked = fine_tune(**{**three, 'arrived': jnp.array([True, False, True])})
    removed = fine_tune(**two)
    chex.assert_trees_all_close(masked[:2], removed[:2], atol=1e-5)
    np.testing.assert_allclose(
        masked[2]['student'], removed[2]['student'], atol=1e-5)

  def test_one_teacher_joint_equals_sequential(self):
    results = []
    for gen_step in ('sequential', 'joint'):
      options = fed_ftg.Options(**SMALL, gen_step=gen_step)
      results.append(fine_tune(**inputs(options, num=1)))
    chex.assert_trees_all_close(*results, atol=1e-5)

  def test_joint_step_by_hand(self):
    """One SGD step of the generator on the sum over teachers."""
    options = fed_ftg.Options(
        iterations=1, student_steps=0, batch_size=6, gen_step='joint',
        generator_optimizer=optax.sgd)
    given = inputs(options)
    model, z, labels = given['model'], given['z'][0, 0], given['labels'][0]
    alpha = fed_ftg.ensemble_weights(COUNTS, jnp.ones(3, bool))

    def loss(params):
      x, _ = GENERATOR.apply(
          given['made']._replace(params=params), z, labels, train=True)
      student = model.apply(given['student'], x).logits
      total = losses.diversity(z, x)
      for k in range(3):
        teacher = model.apply(
            jax.tree.map(lambda a: a[k], given['taught']), x).logits
        weight = alpha[k, labels]
        gap = jnp.abs(student - jax.lax.stop_gradient(teacher)).mean(-1)
        cross_entropy = -jax.nn.log_softmax(teacher)[jnp.arange(6), labels]
        total += cross_entropy.mean() * weight.mean() - (gap * weight).mean()
      return total

    grads = jax.grad(loss)(given['made'].params)
    want = jax.tree.map(lambda p, g: p - .01 * g, given['made'].params, grads)
    _, made, _ = fine_tune(**given)
    chex.assert_trees_all_close(made.params, want, atol=1e-6)

  def test_student_statistics(self):
    model = problems.make_model('batch')
    for student_bn, same in (('keep', True), ('batch', True), ('overwrite', False)):
      options = fed_ftg.Options(**SMALL, student_bn=student_bn)
      given = inputs(options, model)
      student, _, _ = fine_tune(**given)
      before = jax.tree.leaves(given['student'].stats)
      equal = [np.array_equal(a, b) for a, b in zip(
          before, jax.tree.leaves(student.stats))]
      self.assertEqual(all(equal), same)
      self.assertFalse(np.array_equal(
          jax.tree.leaves(student.params)[0],
          jax.tree.leaves(given['student'].params)[0]))

  def test_student_clip_bounds_every_step(self):
    """Small variances, which the student keeps, make its gradients large: with a
    bound it goes no farther than steps times rate times bound, without much
    farther, or it is not finite at all."""
    model = problems.make_model('batch')

    def way(student_clip):
      options = fed_ftg.Options(
          **SMALL, student_bn='keep', student_reduction='batchmean',
          weight_decay=0., student_clip=student_clip)
      given = inputs(options, model)
      given['student'] = given['student']._replace(stats=jax.tree.map(
          lambda a: jnp.full_like(a, 1e-3), given['student'].stats))
      student, _, _ = fine_tune(**given)
      return float(optax.tree.norm(optax.tree.sub(
          student.params, given['student'].params)))

    bound = .1 * .5 * SMALL['iterations'] * SMALL['student_steps']
    self.assertLess(way(.5), 1.0001 * bound)
    far = way(0.)
    self.assertTrue(np.isnan(far) or far > 2 * bound)

  def test_teachers_are_evaluated_with_their_own_statistics(self):
    model = problems.make_model('batch')
    options = fed_ftg.Options(**SMALL)
    given = inputs(options, model)
    other = given['taught']._replace(stats=jax.tree.map(
        lambda a: a + 1., given['taught'].stats))
    first, second = fine_tune(**given), fine_tune(**{**given, 'taught': other})
    self.assertGreater(
        np.abs(first[2]['cls'] - second[2]['cls']).max(), 1e-4)

  def test_float32_against_float64(self):
    """With SGD for the generator: Adam blows up the rounding of float32."""
    options = fed_ftg.Options(**SMALL, generator_optimizer=optax.sgd)
    given = inputs(options)
    single = jax.tree.map(np.asarray, fine_tune(**given)[:2])
    given = {k: jax.tree.map(np.asarray, v) if k not in ('model', 'options')
             else v for k, v in given.items()}
    with enable_x64(True):
      wide = {k: jax.tree.map(
          lambda a: jnp.asarray(a, float if a.dtype == np.float32 else None), v)
              if k not in ('model', 'options') else v for k, v in given.items()}
      double = jax.tree.map(np.asarray, fine_tune(**wide)[:2])
    self.assertEqual(jax.tree.leaves(double)[0].dtype, np.float64)
    chex.assert_trees_all_close(
        single, jax.tree.map(lambda a: a.astype(np.float32), double), atol=1e-5)

  def test_batch_of_one(self):
    options = fed_ftg.Options(iterations=2, student_steps=1, batch_size=1)
    chex.assert_tree_all_finite(fine_tune(**inputs(options)))

  @parameterized.parameters(
      dict(hard_samples=False), dict(generator_steps=2), dict(noise='fresh'),
      dict(temperature=3., student_weight='recognised'),
      dict(noise='every_step'), dict(teacher_weight='confident'), dict(warm_up=1),
      dict(md='kl', gen_step='joint', ensemble='logit', lambda_cls=.5,
           lambda_dis=0., student_reduction='batchmean', labels='iid',
           kl_direction='reverse', cls_weight='per_sample'))
  def test_other_options_give_other_finite_results(self, **change):
    base_options = fed_ftg.Options(**SMALL)
    options = base_options._replace(**change)
    plain, changed = (fine_tune(**inputs(o)) for o in (base_options, options))
    chex.assert_tree_all_finite(changed)
    for a, b in zip(plain[:2], changed[:2]):
      self.assertGreater(optax.tree.norm(optax.tree.sub(
          a.params, b.params)), 1e-5)


@pytest.mark.slow
class PlainLoopTest(parameterized.TestCase):
  """The whole server step against Python loops, written from the spec."""

  def reference(self, model, options, student, made, taught, counts, arrived, z,
                labels):
    here = [k for k in range(len(counts)) if arrived[k]]
    teacher = {k: jax.tree.map(lambda a, k=k: a[k], taught) for k in here}
    total = sum(np.asarray(counts[k], float) for k in here) + 1e-6
    alpha = {k: np.asarray(counts[k], float) / total for k in here}
    adam = optax.adam(.01)
    opt_state = adam.init(made.params)

    def loss(params, stats, noise, y, some, student, share):
      x, stats = GENERATOR.apply(
          base.Variables(params, stats), noise, y, train=True)
      s = jax.nn.log_softmax(model.apply(student, x).logits)
      value = share * losses.diversity(noise, x)
      for k in some:
        logits = model.apply(teacher[k], x).logits
        t, weight = jax.nn.log_softmax(logits), jnp.asarray(alpha[k])[y]
        if options.md == 'l1':
          gap = jnp.abs(model.apply(student, x).logits
                        - jax.lax.stop_gradient(logits)).mean(-1)
        else:
          gap = (jnp.exp(t) * (t - s)).sum(-1)
        nll = -t[jnp.arange(len(y)), y]
        value += (nll * weight).mean() if options.cls_weight == 'per_sample' else (
            nll.mean() * weight.mean())
        if options.hard_samples:
          value -= (gap * weight).mean()
      return value, stats

    grad = jax.jit(jax.grad(loss, has_aux=True), static_argnums=(4, 6))
    for noise, y in zip(z, labels):
      for _ in range(options.generator_steps):
        turns = [tuple(here)] if options.gen_step == 'joint' else [
            (k,) for k in here]
        for some in turns:
          grads, stats = grad(*made, noise[0], y, some, student, len(some) / len(
              here))
          updates, opt_state = adam.update(grads, opt_state)
          made = base.Variables(optax.apply_updates(made.params, updates), stats)
      x, _ = GENERATOR.apply(made, noise[-1], y)
      weight = {k: jnp.asarray(alpha[k])[y][:, None] for k in here}
      logits = {k: model.apply(teacher[k], x).logits for k in here}
      if options.ensemble == 'prob':
        q = sum(weight[k] * jax.nn.softmax(logits[k]) for k in here)
      else:
        q = sum(weight.values()) * jax.nn.softmax(
            sum(weight[k] * logits[k] for k in here))
      for _ in range(options.student_steps):
        def distil(params, stats=student.stats, x=x, q=q):
          out = model.apply(base.Variables(params, stats), x,
                            train=options.student_bn != 'keep')
          ce = -(q * jax.nn.log_softmax(out.logits)).sum(-1).mean()
          over = 1 if options.student_reduction == 'batchmean' else q.shape[1]
          return ce / over, out.stats
        grads, stats = jax.grad(distil, has_aux=True)(student.params)
        if options.student_clip:
          share = min(1, options.student_clip / float(optax.tree.norm(grads)))
          grads = jax.tree.map(lambda g, share=share: share * g, grads)
        if options.student_bn != 'overwrite':
          stats = student.stats
        student = base.Variables(jax.tree.map(
            lambda p, g: p - .1 * (g + options.weight_decay * p), student.params,
            grads), stats)
    return student, made

  @parameterized.product(
      preset=list(fed_ftg.PRESETS), arrived=([True, False, True],))
  def test_presets(self, preset, arrived):
    """Two iterations, two generator passes, an absent teacher, BatchNorm."""
    self.compare(preset, arrived)

  def test_bounded_student_in_train_mode(self):
    bounded = self.compare('official', [True, False, True], student_bn='batch',
                           student_clip=.01)
    free = self.compare('official', [True, False, True], student_bn='batch')
    with enable_x64(True):
      self.assertGreater(optax.tree.norm(optax.tree.sub(
          bounded.params, free.params)), .01)

  def compare(self, preset, arrived, **changes):
    with enable_x64(True):
      model = problems.make_model('batch')
      options = fed_ftg.preset(
          preset, iterations=2, generator_steps=2, student_steps=2, batch_size=6,
          noise='fresh', **changes)
      given = {**inputs(options, model), 'arrived': jnp.array(arrived)}
      student, made, _ = fine_tune(**given)
      given.pop('options'), given.pop('model')
      want = self.reference(model, options, **given)
      # Adam's first steps divide a gradient by its own size: where it is zero
      # but for rounding (one tap of a dead unit), the two differ by more.
      chex.assert_trees_all_close((student, made), want, atol=1e-7)
      return student


class PiecesTest(parameterized.TestCase):

  @parameterized.parameters(
      dict(md='kl'), dict(md='kl', kl_direction='reverse'),
      dict(cls_weight='per_sample'))
  def test_terms_differ(self, **change):
    rng = np.random.RandomState(3)
    student, teacher = map(jnp.asarray, rng.randn(2, 5, 3))
    given = student, teacher, jnp.asarray(rng.rand(5)), jnp.arange(5) % 3
    plain = fed_ftg.teacher_terms(*given)
    changed = fed_ftg.teacher_terms(*given, fed_ftg.Options(**change))
    self.assertNotAlmostEqual(
        float(sum(plain)), float(sum(changed)), places=3)

  @parameterized.parameters('labels', 'label_sampling')
  def test_labels_differ(self, name):
    plain, changed = (
        fed_ftg.draw(KEY, COUNTS.sum(0), 4, fed_ftg.Options(
            **SMALL, **{name: choice}))[1] for choice in fed_ftg.CHOICES[name])
    self.assertFalse(np.array_equal(np.sort(plain.ravel()),
                                    np.sort(changed.ravel())))

  def test_kl_terms_against_plain_sums(self):
    rng = np.random.RandomState(0)
    student, teacher = rng.randn(2, 5, 3)
    labels, alpha = rng.randint(3, size=5), rng.rand(5)
    p, q = (np.exp(v) / np.exp(v).sum(-1, keepdims=True)
            for v in (student, teacher))
    with enable_x64(True):
      for direction, want in (
          ('forward', (q * np.log(q / p)).sum(-1)),
          ('reverse', (p * np.log(p / q)).sum(-1))):
        md, _ = fed_ftg.teacher_terms(
            jnp.asarray(student), jnp.asarray(teacher), jnp.asarray(alpha),
            jnp.asarray(labels), fed_ftg.Options(
                md='kl', kl_direction=direction))
        np.testing.assert_allclose(md, -(want * alpha).mean(), rtol=1e-10)

  def test_student_gradient_is_that_of_the_weighted_kl_over_c(self):
    """The spec's reading of the official loss: (1 / C) sum_k alpha_k KL_k."""
    with enable_x64(True):
      rng = np.random.RandomState(1)
      student, teacher = jnp.asarray(rng.randn(5, 3)), jnp.asarray(
          rng.randn(2, 5, 3))
      alpha = jnp.asarray(rng.dirichlet([1, 1], size=5).T)
      target = distillation.ensemble(teacher, alpha, 'prob')

      def weighted_kl(s):
        kl = jax.vmap(lambda t: losses.kl_divergence(t, s))(teacher)
        return jnp.mean(jnp.sum(alpha * kl, 0)) / 3

      np.testing.assert_allclose(
          jax.grad(fed_ftg.student_loss)(student, target),
          jax.grad(weighted_kl)(student), atol=1e-12)
      batchmean = fed_ftg.Options(student_reduction='batchmean')
      np.testing.assert_allclose(
          fed_ftg.student_loss(student, target, batchmean),
          3 * fed_ftg.student_loss(student, target), rtol=1e-12)

  def test_reverse_student_loss_to_the_logit_ensemble(self):
    """sum_k alpha_k KL(p || p_k) = KL(p || logit ensemble) + constant in p."""
    with enable_x64(True):
      rng = np.random.RandomState(2)
      teacher = jnp.asarray(rng.randn(2, 5, 3))
      alpha = jnp.asarray(rng.dirichlet([1, 1], size=5).T)
      options = fed_ftg.Options(
          ensemble='logit', kl_direction='reverse',
          student_reduction='batchmean')
      target = distillation.ensemble(teacher, alpha, 'logit')

      def weighted_kl(s):
        kl = jax.vmap(lambda t: losses.kl_divergence(s, t))(teacher)
        return jnp.mean(jnp.sum(alpha * kl, 0))

      student = jnp.asarray(rng.randn(5, 3))
      np.testing.assert_allclose(
          jax.grad(lambda s: fed_ftg.student_loss(s, target, options))(student),
          jax.grad(weighted_kl)(student), atol=1e-8)

  def test_ensemble_weights(self):
    all_here = jnp.ones(3, bool)
    alpha = fed_ftg.ensemble_weights(COUNTS, all_here)
    np.testing.assert_allclose(alpha.sum(0), 1, atol=1e-5)
    np.testing.assert_allclose(alpha[:, 0], [4 / 7, 1 / 7, 2 / 7], atol=1e-6)
    alpha = fed_ftg.ensemble_weights(COUNTS, jnp.array([False, True, True]))
    np.testing.assert_allclose(alpha[:, 2], 0)  # nobody left holds class 2
    np.testing.assert_allclose(alpha[0], 0)
    uniform = fed_ftg.ensemble_weights(
        COUNTS, jnp.array([True, False, True]),
        fed_ftg.Options(teacher_weight='uniform'))
    np.testing.assert_allclose(uniform, [[.5] * 3, [0] * 3, [.5] * 3])

  @hypothesis.settings(deadline=None, max_examples=30)
  @hypothesis.given(
      st.lists(st.integers(0, 10**5), min_size=4, max_size=4),
      st.integers(0, 2**31 - 1))
  def test_quota_labels(self, counts, seed):
    """Counts are exact, and no class that nobody has is drawn."""
    hypothesis.assume(sum(counts))
    num = 500
    labels = distillation.quota_labels(
        jax.random.key(seed), jnp.array(counts, jnp.int32), num)
    ends = [num * int(c) // sum(counts) for c in np.cumsum(counts)]
    np.testing.assert_array_equal(
        np.bincount(labels, minlength=4), np.diff([0, *ends]))

  def test_iid_labels(self):
    labels = distillation.iid_labels(KEY, jnp.array([1, 0, 3]), 8000)
    np.testing.assert_allclose(
        np.bincount(labels, minlength=3) / 8000, [.25, 0, .75], atol=.02)

  def test_fresh_noise(self):
    z, labels = fed_ftg.draw(
        KEY, COUNTS.sum(0), 4, fed_ftg.Options(**SMALL, noise='fresh'))
    self.assertEqual(z.shape, (2, 2, 6, 4))
    self.assertEqual(labels.shape, (2, 6))
    self.assertGreater(np.abs(z[:, 0] - z[:, 1]).max(), .1)

  def test_presets(self):
    self.assertEqual(fed_ftg.preset('official'), fed_ftg.Options())
    self.assertEqual(
        fed_ftg.preset('intended', md='kl').student_bn, 'keep')
    robust = fed_ftg.preset('robust')
    self.assertEqual((robust.student_bn, robust.student_clip), ('keep', 3.))
    for bad, message in (
        (dict(md='l2'), r"md must be one of \('l1', 'kl'\), got 'l2'"),
        (dict(iterations=-1), 'iterations must be at least 0, got -1'),
        (dict(warm_up=-1), 'warm_up must be at least 0, got -1'),
        (dict(student_clip=-1.), 'student_clip must be at least 0, got -1'),
        (dict(memory=1.), 'memory must be from 0 to below 1, got 1'),
        (dict(generator_average=-.1), 'generator_average must be from 0 to below'),
        (dict(temperature=0.), 'temperature must be above 0, got 0')):
      with self.assertRaisesRegex(ValueError, message):
        fed_ftg.preset('official', **bad)
    with self.assertRaisesRegex(ValueError, "intended.*got 'best'"):
      fed_ftg.preset('best')


class DiagnosticsTest(parameterized.TestCase):

  def test_by_hand(self):
    """Two images: one recognised as asked for, one halved between two classes by
    an ensemble whose weights sum to a half."""
    target = jnp.array([[1., 0., 0.], [0., .25, .25]])
    uniform, exact = jnp.zeros((2, 3)), jnp.log(jnp.array(
        [[1., 1e-9, 1e-9], [1e-9, .5, .5]]))
    said = fed_ftg._what_is_said(  # pylint: disable=protected-access
        target, jnp.array([0, 1]), uniform, exact)
    for name, want in (
        ('recognised', .75), ('ensemble_ce', np.log(2) / 2),
        ('ensemble_entropy', np.log(2) / 2),
        ('gap', np.log(3) - np.log(2) / 2), ('gap_left', 0.)):
      np.testing.assert_allclose(said[name], want, atol=1e-6, err_msg=name)

  def test_gaps_are_before_and_after(self):
    options = fed_ftg.Options(**SMALL, student_reduction='batchmean')
    given = inputs(options)
    _, _, terms = fine_tune(**given)
    self.assertEqual(terms['gap'].shape, (2,))
    self.assertTrue((terms['gap_left'] < terms['gap']).all())
    # The student's loss is the gap and the entropy, before its first step.
    np.testing.assert_allclose(
        terms['gap'] + terms['ensemble_entropy'], terms['student'][:, 0],
        rtol=1e-4)

  def round_with(self, norm='none', **changes):
    model = problems.make_model(norm)
    method = base.chain(fed_avg.fed_avg(), fed_ftg.fed_ftg(
        model, GENERATOR, problems.NUM_CLASSES,
        fed_ftg.Options(**SMALL, **changes)))
    fed = problems.make(model, method)
    return fed.round(fed.init(KEY), problems.DATA, problems.row(range(5)), KEY)

  def test_trust_region(self):
    """The way is cut short, in its direction; a wide region changes nothing."""
    _, plain = self.round_with()
    moved = float(plain.metrics['fed_ftg/moved'])
    _, wide = self.round_with(trust_region=1.01 * moved)
    chex.assert_trees_all_close(
        wide.models['fine_tuned'], plain.models['fine_tuned'], atol=1e-6)
    _, cut = self.round_with(trust_region=moved / 4)
    np.testing.assert_allclose(cut.metrics['fed_ftg/moved'], moved / 4, rtol=1e-4)
    chex.assert_trees_all_close(
        cut.models['fine_tuned'], jax.tree.map(
            lambda new, old: old + (new - old) / 4, plain.models['fine_tuned'],
            plain.models['average']), atol=1e-6)

  @parameterized.parameters(
      (dict(start_round=1), False), (dict(min_recognised=1.), False),
      (dict(min_recognised=1e-6), True))
  def test_when_it_is_taken(self, change, taken):
    """The generator learns in any case; what is broadcast is the average."""
    plain, with_it = self.round_with()
    state, info = self.round_with(**change)
    chex.assert_trees_all_close(state.shared, plain.shared, atol=1e-6)
    chex.assert_trees_all_close(
        info.models['fine_tuned'],
        with_it.models['fine_tuned' if taken else 'average'], atol=1e-6)
    self.assertEqual(float(info.metrics['fed_ftg/moved']) > 0, taken)

  def test_memory(self):
    """The broadcast model is one more teacher, once there are earlier rounds."""
    _, plain = self.round_with()
    state, first = self.round_with(memory=.5)
    chex.assert_trees_all_close(first.models, plain.models, atol=1e-6)
    y = np.asarray(problems.DATA.y)
    totals = np.bincount(y, minlength=problems.NUM_CLASSES)
    np.testing.assert_allclose(state.shared[-1].past, totals / 2)

  def test_all_teachers(self):
    options = fed_ftg.Options(memory=.5)
    sent = problems.LINEAR.init(jax.random.key(1))
    received = base.Received(
        sent, None, (), (teachers(), COUNTS), jnp.array([True, True, False]),
        jnp.int32(1), 5, ())
    past = jnp.array([3., .2, 0.])
    (taught, counts, arrived), after = fed_ftg._all_teachers(  # pylint: disable=protected-access
        received, past, options)
    chex.assert_trees_all_equal(jax.tree.map(lambda a: a[3], taught), sent)
    chex.assert_trees_all_equal(jax.tree.map(lambda a: a[:3], taught), teachers())
    np.testing.assert_array_equal(counts, [*COUNTS, [3, 0, 0]])
    np.testing.assert_array_equal(arrived, [True, True, False, True])
    np.testing.assert_allclose(after, (past + COUNTS.sum(0)) / 2)

  def test_memory_teaches(self):
    """The step is that of the cohort's teachers and one more."""
    options = fed_ftg.Options(**SMALL, memory=.5)
    method = fed_ftg.fed_ftg(
        problems.LINEAR, GENERATOR, problems.NUM_CLASSES, options)
    given, sent = inputs(options), problems.LINEAR.init(jax.random.key(7))
    arrived, counts = jnp.array([True, True, False]), COUNTS.at[2].set(0)
    received = base.Received(
        sent, None, (), (given['taught'], counts), arrived, jnp.int32(1), 5, ())
    shared, _ = method.init(KEY, given['student'])
    tuned, after, _ = method.update(
        given['student'], shared._replace(past=jnp.array([3., .2, 1.])), received,
        KEY)
    counts = jnp.concatenate([counts, jnp.array([[3, 0, 1]])])
    z, labels = fed_ftg.draw(KEY, counts.sum(0), GENERATOR.noise_dim, options)
    student, made, _ = fine_tune(
        given['student'], shared.generator, jax.tree.map(
            lambda a, b: jnp.concatenate([a, b[None]]), given['taught'], sent),
        counts, jnp.append(arrived, True), z, labels, options=options)
    chex.assert_trees_all_close(
        (tuned, after.generator), (student, made), atol=1e-6)
    np.testing.assert_allclose(after.past, [4., 1.6, 1.5])

  def test_count_bound(self):
    self.assertEqual(fed_ftg.count_bound(fed_ftg.Options(
        iterations=2, warm_up=1, batch_size=6, memory=.5)), 36)

  def test_warm_up(self):
    """The generator learns as in iterations without a student's step."""
    options = fed_ftg.Options(**SMALL, warm_up=2, generator_optimizer=optax.sgd)
    given = inputs(options)
    student, made, terms = fine_tune(**given)
    self.assertEqual(terms['student'].shape, (2, 2))
    alone = {**given, 'z': given['z'][:2], 'labels': given['labels'][:2],
             'options': options._replace(warm_up=0, student_steps=0)}
    _, warm, _ = fine_tune(**alone)
    after = {**given, 'made': warm, 'z': given['z'][2:],
             'labels': given['labels'][2:], 'options': options._replace(warm_up=0)}
    chex.assert_trees_all_close(
        (student, made), fine_tune(**after)[:2], atol=1e-6)

  def test_mean_generator(self):
    """Of both iterations, bias corrected, from the first one on."""
    options = fed_ftg.Options(iterations=2, student_steps=0, batch_size=6,
                              generator_average=.75)
    given = inputs(options)

    def run(part):
      return fed_ftg.fine_tune(
          problems.LINEAR, GENERATOR, given['student'],
          init_shared(given['made'], options), given['taught'], given['counts'],
          given['z'][part], given['labels'][part], options=options)[1]

    first, both = run(slice(1)), run(slice(2))
    chex.assert_trees_all_close(
        fed_ftg.image_generator(first, options), first.generator, atol=1e-6)
    chex.assert_trees_all_close(
        fed_ftg.image_generator(both, options), jax.tree.map(
            lambda a, b: (.75 * a + b) / 1.75, first.generator, both.generator),
        atol=1e-6)

  def test_mean_generator_makes_the_images(self):
    """Those of the student, and those that are looked at."""
    options = fed_ftg.Options(iterations=1, student_steps=1, batch_size=6,
                              generator_steps=0, generator_average=.75)
    given, other = inputs(options), GENERATOR.init(jax.random.key(9))
    shared = fed_ftg.Shared(given['made'], average=optax.EmaState(
        jnp.int32(1), jax.tree.map(lambda a: .25 * a, other)))
    student, shared, _ = fed_ftg.fine_tune(
        problems.LINEAR, GENERATOR, given['student'], shared, given['taught'],
        given['counts'], given['z'], given['labels'], options=options)
    mean = jax.tree.map(lambda a, b: (.75 * a + b) / 1.75, other, given['made'])
    plain = {**given, 'made': mean,
             'options': options._replace(generator_average=0.)}
    chex.assert_trees_all_close(student, fine_tune(**plain)[0], atol=1e-6)
    method = fed_ftg.fed_ftg(
        problems.LINEAR, GENERATOR, problems.NUM_CLASSES, options)
    labels = jnp.arange(3)
    noise = jax.random.normal(KEY, (3, GENERATOR.noise_dim))
    np.testing.assert_allclose(
        method.synthesise(shared, labels, KEY),
        GENERATOR.apply(mean, noise, labels)[0], atol=1e-5)

  def test_generator_optimizer_goes_on(self):
    options = fed_ftg.Options(**SMALL, generator_state='kept', gen_step='joint')
    given = inputs(options)

    def run(shared, part):
      return fed_ftg.fine_tune(
          problems.LINEAR, GENERATOR, given['student'], shared, given['taught'],
          given['counts'], given['z'][part], given['labels'][part],
          options=options._replace(student_steps=0))[1]

    whole = run(init_shared(given['made'], options), slice(None))
    halves = run(run(init_shared(given['made'], options), slice(1)), slice(1, 2))
    chex.assert_trees_all_close(whole, halves, atol=1e-6)
    fresh = run(run(init_shared(given['made'], options), slice(1))._replace(
        opt_state=init_shared(given['made'], options).opt_state), slice(1, 2))
    self.assertGreater(optax.tree.norm(optax.tree.sub(
        fresh.generator, whole.generator)), 1e-4)

  def test_noise_of_every_step(self):
    """Step by step on images of its own."""
    options = fed_ftg.Options(iterations=1, student_steps=2, batch_size=6,
                              generator_steps=0, noise='every_step')
    given = inputs(options)
    self.assertEqual(given['z'].shape, (1, 3, 6, 4))
    student, _, _ = fine_tune(**given)
    one = given['student']
    for i in 1, 2:
      one, _, _ = fine_tune(**{
          **given, 'student': one, 'z': given['z'][:, i:i + 1],
          'options': options._replace(noise='shared', student_steps=1)})
    chex.assert_trees_all_close(student, one, atol=1e-6)

  def test_confident_teachers_say_more(self):
    """As much in all as before; who denies the label says nothing."""
    weight = jnp.array([[.5, .2], [.5, .2], [0., .2]])
    logits = jnp.log(jnp.array([
        [[.8, .2], [.5, .5]], [[.2, .8], [.5, .5]], [[1., 0.], [1., 0.]]]))
    np.testing.assert_allclose(
        fed_ftg._confident(weight, logits, jnp.array([0, 1])),  # pylint: disable=protected-access
        [[.8, .3], [.2, .3], [0., 0.]], atol=1e-6)
    nobody = fed_ftg._confident(0 * weight, logits, jnp.array([0, 1]))  # pylint: disable=protected-access
    np.testing.assert_array_equal(nobody, 0 * weight)

  def test_recognised_images_count_more(self):
    """An image whose label the ensemble denies is as if it were not there."""
    target = jnp.array([[1., 0., 0.], [0., .5, 0.]])
    weighted = target * fed_ftg._of_label(  # pylint: disable=protected-access
        target, jnp.array([0, 0]))
    np.testing.assert_array_equal(weighted, [[1, 0, 0], [0, 0, 0]])

  def test_temperature(self):
    """KL and its gradient in the limit of a high temperature: the mean square of
    the difference of centred logits, halved (Hinton et al., section 2.1)."""
    with enable_x64(True):
      options = fed_ftg.Options(temperature=1e4, student_reduction='batchmean')
      student, teacher = jax.random.normal(KEY, (2, 4, 3))
      student, teacher = (
          a - a.mean(1, keepdims=True) for a in (student, teacher))
      gradient = jax.grad(fed_ftg.student_loss)(
          student, jax.nn.softmax(teacher / 1e4), options)
      np.testing.assert_allclose(
          gradient, (student - teacher) / 3 / 4, atol=1e-4)

  @parameterized.parameters('none', 'batch')
  def test_distances(self, norm):
    _, info = self.round_with(norm)
    average, tuned = (info.models[name] for name in ('average', 'fine_tuned'))
    for name, part in (('moved', 'params'), ('stats_moved', 'stats')):
      if name == 'stats_moved' and norm == 'none':
        self.assertNotIn('fed_ftg/stats_moved', info.metrics)
        continue
      before, after = (
          np.concatenate([a.ravel() for a in jax.tree.leaves(getattr(v, part))])
          for v in (average, tuned))
      np.testing.assert_allclose(
          info.metrics[f'fed_ftg/{name}'],
          np.linalg.norm(after - before) / np.linalg.norm(before), rtol=1e-4)


class InARoundTest(parameterized.TestCase):

  def part(self, **options):
    return fed_ftg.fed_ftg(
        problems.LINEAR, GENERATOR, problems.NUM_CLASSES,
        fed_ftg.Options(**{**SMALL, **options}))

  def test_no_iterations_equals_fed_avg_bitwise(self):
    with_ftg = problems.make(
        method=base.chain(fed_avg.fed_avg(), self.part(iterations=0)))
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
        fed.init(KEY), problems.DATA, problems.row([0, 1, 4, -1]), KEY)
    chex.assert_trees_all_equal(info.models['fine_tuned'], state.variables)
    gap = optax.tree.norm(optax.tree.sub(
        info.models['average'].params, state.variables.params))
    self.assertGreater(gap, 1e-4)
    for name in ('md', 'cls', 'dis', 'student'):
      self.assertTrue(np.isfinite(info.metrics[f'fed_ftg/{name}']))
    self.assertEqual(
        fed.traffic(state, problems.DATA)[1] - fed.traffic(
            state, problems.DATA)[0], 32 * problems.NUM_CLASSES)

  @parameterized.parameters(
      {}, dict(memory=.9, generator_average=.5, generator_state='kept'))
  def test_over_seeds(self, **changes):
    fed = problems.make(method=base.chain(fed_avg.fed_avg(), self.part(
        generator_optimizer=optax.sgd, **changes)))
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
          jax.tree.map(lambda a: a[r], state.variables), alone.variables,
          atol=1e-5)

  def test_nobody_arrives(self):
    fed = problems.make(method=base.chain(fed_avg.fed_avg(), self.part()))
    state = fed.init(KEY)
    after, info = fed.round(
        state, problems.DATA, problems.row([0, 1], [False, False]), KEY)
    chex.assert_trees_all_equal(after._replace(round=state.round), state)
    chex.assert_trees_all_equal(info.models['fine_tuned'], state.variables)

  def test_scan_equals_loop_and_one_trace(self):
    fed = problems.make(method=base.chain(fed_avg.fed_avg(), self.part()))
    rows = problems.schedule([[0, 1, 4], [2, 3, -1], [0, 2, 3]])
    before = federation._scan_rounds._cache_size()  # pylint: disable=protected-access
    runs = [federation.run(fed, fed.init(KEY), problems.DATA, rows, KEY,
                           every=every)[0] for every in (1, 1)]
    self.assertEqual(
        federation._scan_rounds._cache_size(), before + 1)  # pylint: disable=protected-access
    whole, _ = federation.run(fed, fed.init(KEY), problems.DATA, rows, KEY)
    chex.assert_trees_all_equal(*runs)
    chex.assert_trees_all_equal(runs[0], whole)

  def test_too_many_labels(self):
    part = self.part(iterations=2**30)
    fed = problems.make(method=base.chain(fed_avg.fed_avg(), part))
    with self.assertRaisesRegex(ValueError, r'below 2\*\*32'):
      jax.eval_shape(fed.round, jax.eval_shape(fed.init, KEY), problems.DATA,
                     problems.row([0, 1]), KEY)

  def test_pictures(self):
    method = base.chain(fed_avg.fed_avg(), self.part())
    shared, _ = method.init(KEY, problems.LINEAR.init(KEY))
    images = method.synthesise(shared, jnp.arange(3), KEY)
    self.assertEqual(images.shape, (3, *problems.IMAGE_SHAPE))
    self.assertIsNone(base.chain(fed_avg.fed_avg()).synthesise)


if __name__ == '__main__':
  absltest.main()
