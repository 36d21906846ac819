"""FedFTG: data-free fine-tuning of the aggregated model on the server.

Zhang, Shen, Ding, Tao and Duan, Fine-tuning Global Model via Data-Free Knowledge
Distillation for Non-IID Federated Learning, CVPR 2022, arXiv:2203.09249.

A generator G learns images x = G(z, y) on which the aggregated model (student,
D(x; w)) and the clients' models (teachers, D(x; w_k)) disagree; the student is
distilled on them. Each of I outer iterations draws z and y, then
  I_g times   theta <- Adam(theta, grad(l_md + lambda_cls l_cls + lambda_dis l_dis))
  I_d times   w <- SGD(w, grad(l_student)).
`Options` names every point where the paper and the official code (commit
1e6347c of ZhangLin-PKU/FedFTG) differ, and ways out of what goes wrong with both;
`PRESETS` are four choices of them:
  official  the released code, number by number;
  paper     the published equations as far as they are known: the text could not
            be checked, so this preset is a reading of it, not a reference (the
            diversity term keeps the code's distances, mean square and mean
            absolute; with md='kl' gradients pass through the teachers too);
  intended  the official code with its defects mended: fidelity weighted per
            sample, student loss not divided by C, aggregated BatchNorm
            statistics kept (where a deep net can diverge, see `student_clip`),
            no bias in front of a BatchNorm;
  robust    ours, neither the paper's nor the code's: 'intended' without hard
            samples and without weight decay, teachers combined by their logits,
            the student's gradient bounded, and with the broadcast model as one
            more teacher, for what earlier cohorts knew (measured in
            docs/when_it_pays.md).

Privacy: the server learns every client's class counts.
"""

import functools
import math
from typing import Callable, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from fedftg_jax import distillation, losses, models, trees
from fedftg_jax.base import Generator, Info, Method, Model, Variables


class Options(NamedTuple):
  """The settings of FedFTG; the defaults are those of the official code.

  Attributes:
    iterations: I, outer iterations a round; 0 switches the fine-tuning off.
    generator_steps: I_g, passes of generator updates in an iteration.
    student_steps: I_d, student updates in an iteration.
    batch_size: B, generated images at once.
    student_lr: learning rate of the student's SGD (here also a function of the
      round).
    generator_lr: learning rate of the generator's Adam (here also a function of
      the round).
    weight_decay: of the student's SGD (code: the clients'). It shrinks the model
      by about I I_d student_lr weight_decay in a round, wherever else it goes.
    lambda_cls: weight of the fidelity term.
    lambda_dis: weight of the diversity term.
    gen_step: 'sequential', one Adam step per teacher in the order of client ids
      with lambda_dis / K in each (code), or 'joint', one step on the sum over
      teachers with lambda_dis once (paper).
    md: model discrepancy that the generator raises: 'l1' of logits, mean over
      classes, teacher held fixed (code), or 'kl' of predictions (paper).
    kl_direction: 'forward', KL(teacher || student), or 'reverse', for the
      student's loss and for md='kl'. Which one the paper means is unsettled.
    cls_weight: fidelity as mean(CE) * mean(alpha) ('mean', code) or as
      mean(CE * alpha) ('per_sample').
    ensemble: teachers combine as probabilities ('prob', code) or 'logit'.
    student_reduction: student loss as mean over batch and classes ('mean_bc',
      code) or over the batch alone ('batchmean', C times larger).
    labels: 'quota', deterministic class counts in random order (code), or
      'iid' draws (paper).
    noise: 'shared', the student sees the z that the generator was trained on
      (code, and as far as known the paper), 'fresh', one of its own in an
      iteration, or 'every_step', another in each of its steps.
    student_bn: 'overwrite', the student is distilled in train mode and its
      BatchNorm statistics become those of generated images (code), 'batch', it is
      distilled alike, but the aggregated statistics are kept, or 'keep', it
      normalises by them, too.
    student_clip: largest global norm of the student's gradient in a step, before
      weight decay is added; 0 for no bound (code), with which a deep net that
      normalises by kept statistics can diverge.
    student_weight: generated images count alike for the student ('all', code), or
      as much as the ensemble gives the label that was asked for ('recognised').
    temperature: of the softmaxes of ensemble and student in the student's loss,
      which is then T^2 as large (Hinton et al., arXiv:1503.02531); 1 in the code.
    trust_region: how far the student may end from the aggregated model, over that
      model's norm; it is brought back to there. 0 for no bound (code).
    memory: the model that was broadcast is one more teacher, the last, with the
      class counts of earlier rounds, discounted by this factor a round. Its weight
      tends to this factor where cohorts are alike, and to 1 for classes that the
      cohort lacks; 0 for no such teacher (code).
    warm_up: iterations at the beginning of a round in which the generator learns
      alone; 0 in the code.
    generator_average: decay, per iteration, of the running mean (bias corrected)
      of generators that makes the student's images; 0 for the generator itself
      (code).
    generator_state: the generator's optimiser begins anew in every round ('fresh',
      code) or goes on ('kept').
    min_recognised: the fine-tuned student is taken only in rounds in which the
      ensemble gives the asked labels this probability in the mean; 0 in the code.
    start_round: the first round of which it is taken; the generator learns
      before, too. 0 in the code.
    gen_bn_bias: 'keep' biases in front of the generator's BatchNorms (code) or
      'drop' them; see `make_generator`.
    hard_samples: whether the discrepancy is a part of the generator's loss, so
      that it looks for hard samples (code).
    label_sampling: 'customised', classes as frequent as the cohort has them, or
      'uniform' over all classes (ablation).
    teacher_weight: 'class', alpha_k^y = n_k^y / sum_i n_i^y, 'uniform', 1 / K
      (ablation of the class-level ensemble), or 'confident', the class weights
      times the probability that the teacher gives the asked label (ensemble only).
    generator_optimizer: learning rate -> optax optimiser, whose state must not hold
      the rate.
  """
  iterations: int = 10
  generator_steps: int = 1
  student_steps: int = 5
  batch_size: int = 50
  student_lr: float | Callable = .1
  generator_lr: float | Callable = .01
  weight_decay: float = 1e-3
  lambda_cls: float = 1.
  lambda_dis: float = 1.
  gen_step: str = 'sequential'
  md: str = 'l1'
  kl_direction: str = 'forward'
  cls_weight: str = 'mean'
  ensemble: str = 'prob'
  student_reduction: str = 'mean_bc'
  labels: str = 'quota'
  noise: str = 'shared'
  student_bn: str = 'overwrite'
  student_clip: float = 0.
  student_weight: str = 'all'
  temperature: float = 1.
  trust_region: float = 0.
  min_recognised: float = 0.
  memory: float = 0.
  warm_up: int = 0
  generator_average: float = 0.
  generator_state: str = 'fresh'
  start_round: int = 0
  gen_bn_bias: str = 'keep'
  hard_samples: bool = True
  label_sampling: str = 'customised'
  teacher_weight: str = 'class'
  generator_optimizer: Callable = optax.adam


CHOICES = {
    'gen_step': ('sequential', 'joint'),
    'md': ('l1', 'kl'),
    'kl_direction': ('forward', 'reverse'),
    'cls_weight': ('mean', 'per_sample'),
    'ensemble': ('prob', 'logit'),
    'student_reduction': ('mean_bc', 'batchmean'),
    'labels': ('quota', 'iid'),
    'noise': ('shared', 'fresh', 'every_step'),
    'student_bn': ('overwrite', 'batch', 'keep'),
    'student_weight': ('all', 'recognised'),
    'generator_state': ('fresh', 'kept'),
    'gen_bn_bias': ('keep', 'drop'),
    'label_sampling': ('customised', 'uniform'),
    'teacher_weight': ('class', 'uniform', 'confident'),
}
PER_TEACHER = ('md', 'cls', 'dis')  # terms with an axis of teachers
LEAST = {'iterations': 0, 'generator_steps': 0, 'student_steps': 0,
         'batch_size': 1, 'student_clip': 0, 'trust_region': 0, 'warm_up': 0,
         'min_recognised': 0, 'start_round': 0}

PRESETS = {
    'official': {},
    'paper': dict(gen_step='joint', md='kl', cls_weight='per_sample',
                  student_reduction='batchmean', labels='iid'),
    'intended': dict(cls_weight='per_sample', student_reduction='batchmean',
                     student_bn='keep', gen_bn_bias='drop'),
    'robust': dict(cls_weight='per_sample', student_reduction='batchmean',
                   student_bn='keep', student_clip=3., gen_bn_bias='drop',
                   hard_samples=False, weight_decay=0., memory=.9,
                   ensemble='logit'),
}


class Shared(NamedTuple):
  """The server slot; () where the options do without."""
  generator: Variables
  average: optax.EmaState | tuple = ()  # see `Options.generator_average`
  opt_state: optax.OptState | tuple = ()  # see `Options.generator_state`
  past: jax.Array | tuple = ()  # [C] class counts, see `Options.memory`


def preset(name: str, **changes) -> Options:
  """The options of a preset, with `changes` on top."""
  if name not in PRESETS:
    raise ValueError(f'preset must be one of {sorted(PRESETS)}, got {name!r}.')
  return check(Options(**{**PRESETS[name], **changes}))


def check(options: Options) -> Options:
  """Returns `options`; ValueError names a wrong one and what would be right."""
  distillation.check_options(options, CHOICES, LEAST)
  if not options.temperature > 0:
    raise ValueError(f'temperature must be above 0, got {options.temperature}.')
  for name in ('memory', 'generator_average'):
    if not 0 <= getattr(options, name) < 1:
      raise ValueError(f'{name} must be from 0 to below 1, got '
                       f'{getattr(options, name)}.')
  return options


def make_generator(
    options: Options, image_shape: tuple[int, int, int], num_classes: int,
    **settings) -> Generator:
  """`models.image_generator` with `settings`, as `options` wants it."""
  return models.image_generator(
      image_shape, num_classes,
      bias_before_norm=options.gen_bn_bias == 'keep', **settings)


def fed_ftg(
    model: Model,
    generator: Generator,
    num_classes: int,
    options: Options = Options(),
) -> Method:
  """The fine-tuning as a part of a chain, after the part that aggregates.

  Args:
    model: the classifier.
    generator: of images in the space of `model`'s float inputs, such as
      `make_generator`'s.
    num_classes: C.
    options: see `Options`.

  Returns:
    The method. Its server slot is `Shared`, its message the class counts. Info
    holds the models 'aggregated' (by the parts before) and 'fine_tuned' and, as
    means over the round, the losses and what `fine_tune` says of the images;
    'moved' (and 'stats_moved', of BatchNorm statistics) is the distance between
    the two over the norm of the first.

  Raises:
    ValueError: for a wrong option.
  """
  check(options)

  def init(key, variables):
    del variables
    return init_shared(generator.init(key), num_classes, options), ()

  def update(variables, shared, received, key):
    if not options.iterations:
      return variables, shared, Info(
          models={'aggregated': variables, 'fine_tuned': variables})
    (teachers, counts, arrived), past = _all_teachers(
        received, shared.past, options)
    z, labels = draw(key, counts.sum(0), generator.noise_dim, options)
    tuned, shared, terms = fine_tune(
        model, generator, variables, shared, teachers, counts, z, labels,
        arrived=arrived, options=options,
        student_lr=distillation.rate_of(options.student_lr, received),
        generator_lr=distillation.rate_of(options.generator_lr, received),
        spread=received.spread)
    tuned = _taken(tuned, variables, terms, received.round, options)
    present = distillation.present(arrived)
    metrics = {name: jnp.mean(value @ present if name in PER_TEACHER else value)
               for name, value in terms.items()}
    metrics['moved'] = _distance(tuned.params, variables.params)
    if jax.tree.leaves(variables.stats):
      metrics['stats_moved'] = _distance(tuned.stats, variables.stats)
    metrics = {f'fed_ftg/{name}': value for name, value in metrics.items()}
    return (tuned, shared._replace(past=past),
            Info(metrics, {'aggregated': variables, 'fine_tuned': tuned}))

  return Method(
      init=init, update=update,
      synthesise=distillation.draw_images(
          generator, lambda shared: image_generator(shared, options)),
      upload=distillation.count_labels(num_classes, count_bound(options)),
      stacked=lambda sent: (sent.model, sent.message))


def init_shared(
    generator_variables: Variables, num_classes: int, options: Options) -> Shared:
  """The server slot of a generator that is not trained yet."""
  shared = Shared(generator_variables)
  if options.generator_average:
    shared = shared._replace(
        average=optax.ema(options.generator_average).init(generator_variables))
  if options.generator_state == 'kept':
    rate = options.generator_lr
    optimizer = options.generator_optimizer(rate(0) if callable(rate) else rate)
    shared = shared._replace(opt_state=optimizer.init(generator_variables.params))
  if options.memory:
    shared = shared._replace(past=jnp.zeros(num_classes))
  return shared


def image_generator(shared: Shared, options: Options) -> Variables:
  """The generator that makes the student's images."""
  if not options.generator_average:
    return shared.generator
  return optax.tree.bias_correction(
      shared.average.ema, options.generator_average,
      jnp.maximum(shared.average.count, 1))


def count_bound(options: Options) -> int:
  """What `distillation.count_labels` has to allow for: the labels of a round, times
  the rounds whose counts they are drawn from."""
  return math.ceil(_num_labels(options) / (1 - options.memory))


def _all_teachers(received, past, options):
  """((teachers [K, ...], counts [K, C] zero for the absent, arrived [K]), past):
  the cohort, and with `memory` the model that was broadcast."""
  teachers, counts = received.stacked
  if not options.memory:
    return (teachers, counts, received.arrived), past
  remembered = jnp.round(past).astype(counts.dtype)
  last = received.broadcast, remembered, jnp.any(remembered)
  return jax.tree.map(
      lambda cohort, one: jnp.concatenate([cohort, one[None]]),
      (teachers, counts, received.arrived), last
  ), options.memory * (past + jnp.sum(counts, axis=0))


def _num_labels(options):
  return (options.warm_up + options.iterations) * options.batch_size


def draw(key, counts, noise_dim, options):
  """Noise [W + I, D, B, noise] and labels [W + I, B] of one round.

  The first of D noises is the generator's, the others, if any, the student's.
  """
  key_noise, key_labels = jax.random.split(key)
  num_draws = 1 + {'shared': 0, 'fresh': 1,
                   'every_step': max(1, options.student_steps)}[options.noise]
  iterations = options.warm_up + options.iterations
  shape = iterations, num_draws, options.batch_size, noise_dim
  if options.label_sampling == 'uniform':
    counts = jnp.ones_like(counts)
  sample = (distillation.quota_labels if options.labels == 'quota'
            else distillation.iid_labels)
  labels = sample(key_labels, counts, _num_labels(options))
  return jax.random.normal(key_noise, shape), labels.reshape(iterations, -1)


def ensemble_weights(
    counts: jax.Array, arrived: jax.Array, options: Options = Options()
) -> jax.Array:
  """alpha_k^y [K, C] (the paper's Eq. 9): how much teacher k says on class y.

  A class that nobody holds has weight 0 for all; so has an absent teacher.
  """
  chex.assert_rank([counts, arrived], [2, 1])
  present = arrived.astype(jnp.result_type(float))[:, None]
  if options.teacher_weight == 'uniform':
    return present / jnp.maximum(jnp.sum(present), 1) * jnp.ones(counts.shape)
  return present * counts / (jnp.sum(present * counts, axis=0) + 1e-6)


def fine_tune(
    model: Model,
    generator: Generator,
    student: Variables,
    shared: Shared,
    teachers: Variables,
    counts: jax.Array,
    z: jax.Array,
    labels: jax.Array,
    *,
    arrived: jax.Array | None = None,
    options: Options = Options(),
    student_lr: float | jax.Array = .1,
    generator_lr: float | jax.Array = .01,
    spread: Callable = lambda tree: tree,
) -> tuple[Variables, Shared, dict[str, jax.Array]]:
  """The server step: generator against student, I times.

  Args:
    model: the classifier.
    generator: the generator.
    student: variables of the aggregated model.
    shared: what the server keeps, see `init_shared`.
    teachers: variables of the clients' models, every leaf [K, ...].
    counts: [K, C] examples of each class that each teacher was trained on.
    z: [W + I, D, B, noise]; the generator is trained on z[:, 0], the student on
      images from the last ones, see `draw`; the first W iterations are warm-up.
    labels: [W + I, B].
    arrived: [K] bool, False for teachers to be left out; None for none.
    options: see `Options`; the numbers of iterations and examples are those of
      `z` and `labels`.
    student_lr: learning rate of the student in this round.
    generator_lr: learning rate of the generator in this round.
    spread: see `base.Received`; for passes through all teachers at once.

  Returns:
    The fine-tuned student, what the server keeps, and the losses before each step:
    'md' (with hard samples), 'cls', 'dis' [I, I_g, K] (0 for an absent teacher),
    'student' [I, I_d];
    and of the images of the student's first steps, [I] each: 'recognised', the
    ensemble's mean probability of the label that was asked for; 'ensemble_ce' and
    'ensemble_entropy', its cross-entropy with that label and its entropy; 'gap'
    and 'gap_left', KL(ensemble || student) before and after the student's steps.
  """
  if arrived is None:
    arrived = jnp.ones(len(counts), bool)
  alpha = ensemble_weights(counts, arrived, options)
  optimizer = options.generator_optimizer(generator_lr)
  apart = spread(teachers)
  learn = functools.partial(
      _learn, model, generator, optimizer, options,
      apart if options.gen_step == 'joint' else teachers, alpha, arrived)
  example = functools.partial(_example, model, generator, options, apart, alpha)
  distil = functools.partial(
      distillation.distil, model,
      optimizer=distillation.sgd(
          student_lr, options.weight_decay, options.student_clip),
      loss=functools.partial(student_loss, options=options),
      num_steps=options.student_steps,
      train=options.student_bn != 'keep')
  every_step = options.noise == 'every_step'

  def iteration(carry, draws):
    student, kept = carry
    z, labels = draws
    kept, terms = learn(student, kept, z[0], labels)
    draw_one = functools.partial(
        example, image_generator(kept, options), labels=labels)
    images, said, target = jax.lax.map(draw_one, z[1:] if every_step else z[-1:])
    tuned, loss = distil(student, examples=lambda i: jax.tree.map(
        lambda a: a[i] if every_step else a[0], (images, target)))
    if options.student_bn != 'overwrite':
      tuned = tuned._replace(stats=student.stats)
    answers = [model.apply(s, images[0]).logits for s in (student, tuned)]
    return (tuned, kept), {
        **terms, 'student': loss, **_what_is_said(said[0], labels, *answers)}

  fresh = options.generator_state == 'fresh'
  kept = shared._replace(past=())
  if fresh:
    kept = kept._replace(opt_state=optimizer.init(shared.generator.params))
  if options.warm_up:
    first, z, labels = (z, labels), z[options.warm_up:], labels[options.warm_up:]
    kept, _ = jax.lax.scan(
        lambda kept, draws: (learn(student, kept, draws[0][0], draws[1])[0], None),
        kept, jax.tree.map(lambda a: a[:options.warm_up], first))
  (student, kept), terms = jax.lax.scan(iteration, (student, kept), (z, labels))
  return student, kept._replace(
      past=shared.past, opt_state=() if fresh else kept.opt_state), terms


def _learn(model, generator, optimizer, options, teachers, alpha, arrived, student,
           kept, z, labels):
  """The generator's part of an iteration: I_g passes, and the running mean."""
  train = functools.partial(
      _train_generator, model, generator, optimizer, options, teachers, alpha,
      arrived, student, z, labels)
  (made, opt_state), terms = jax.lax.scan(
      lambda carry, _: train(carry), (kept.generator, kept.opt_state),
      length=options.generator_steps)
  average = kept.average
  if options.generator_average:
    _, average = optax.ema(options.generator_average).update(made, average)
  return Shared(made, average, opt_state), terms


def _example(model, generator, options, teachers, alpha, made, z, labels):
  """Images, what the ensemble says of them, and the student's target."""
  images, _ = generator.apply(made, z, labels)
  logits = distillation.teacher_logits(model, teachers, images)
  weight = alpha[:, labels]
  if options.teacher_weight == 'confident':
    weight = _confident(weight, logits, labels)
  together = functools.partial(
      distillation.ensemble, weight=weight, kind=options.ensemble)
  said, target = together(logits), together(logits / options.temperature)
  if options.student_weight == 'recognised':
    target *= _of_label(said, labels)
  return images, said, target


def _confident(weight, logits, labels):
  """[K, B] `weight`, each image's in proportion to the probability of its label."""
  of_label = jnp.take_along_axis(
      jax.nn.log_softmax(logits), labels[None, :, None], axis=2)[..., 0]
  some = weight > 0
  shares = jax.nn.softmax(  # of logarithms: all may be next to nothing
      of_label + jnp.log(weight), axis=0, where=some)
  return jnp.sum(weight, axis=0) * jnp.where(some, shares, 0)


def _taken(tuned, variables, terms, round_, options) -> Variables:
  """What of the fine-tuned model is broadcast, instead of the aggregated one."""
  if options.trust_region:
    moved = _distance(tuned.params, variables.params)
    share = jnp.minimum(1, options.trust_region / jnp.maximum(moved, 1e-12))
    tuned = jax.tree.map(
        lambda new, old: old + share.astype(old.dtype) * (new - old),
        tuned, variables)
  if options.min_recognised or options.start_round:
    take = (round_ >= options.start_round) & (
        jnp.mean(terms['recognised']) >= options.min_recognised)
    tuned = trees.where(take, tuned, variables)
  return tuned


def _normalised(target):
  """Rows that sum to 1."""
  return target / jnp.maximum(jnp.sum(target, axis=1, keepdims=True), 1e-6)


def _of_label(target, labels):
  """[B, 1] the ensemble's probability of each label."""
  return jnp.take_along_axis(_normalised(target), labels[:, None], axis=1)


def _what_is_said(target, labels, before, after) -> dict[str, jax.Array]:
  """Of generated images, by ensemble and student; see `fine_tune`."""
  of_label, target = _of_label(target, labels), _normalised(target)
  entropy = -jnp.sum(target * jnp.log(target + 1e-12), axis=1)
  gaps = [jnp.mean(-jnp.sum(target * jax.nn.log_softmax(logits), axis=1) - entropy)
          for logits in (before, after)]
  return {'recognised': jnp.mean(of_label),
          'ensemble_ce': -jnp.mean(jnp.log(of_label + 1e-12)),
          'ensemble_entropy': jnp.mean(entropy),
          'gap': gaps[0], 'gap_left': gaps[1]}


def _distance(tree, origin) -> jax.Array:
  """Between two trees, over the norm of the second."""
  norm = optax.tree.norm(origin)
  return optax.tree.norm(optax.tree.sub(tree, origin)) / jnp.maximum(norm, 1e-12)


def _train_generator(model, generator, optimizer, options, teachers, alpha,
                     arrived, student, z, labels, carry):
  """One pass over the teachers: K Adam steps, or one joint step."""
  num_teachers = jnp.maximum(jnp.sum(arrived), 1)

  def loss_fn(params, stats, teachers, alpha, lambda_dis):
    """Sum over stacked `teachers` of md and cls, plus the diversity term."""
    images, stats = generator.apply(
        Variables(params, stats), z, labels, train=True)
    student_logits = model.apply(student, images).logits
    teacher_logits = distillation.teacher_logits(model, teachers, images)
    md, cls = jax.vmap(
        lambda t, a: teacher_terms(student_logits, t, a, labels, options))(
            teacher_logits, alpha)
    dis = losses.diversity(z, images)
    total = options.lambda_cls * jnp.sum(cls) + lambda_dis * dis
    terms = {'cls': cls, 'dis': jnp.broadcast_to(dis, cls.shape)}
    if options.hard_samples:  # otherwise the student need not be asked
      total += jnp.sum(md)
      terms['md'] = md
    return total, (stats, terms)

  def step(carry, teachers, alpha, lambda_dis):
    (params, stats), opt_state = carry
    grads, (stats, terms) = jax.grad(loss_fn, has_aux=True)(
        params, stats, teachers, alpha, lambda_dis)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return (Variables(params, stats), opt_state), terms

  alpha = alpha[:, labels]  # [K, B]
  if options.gen_step == 'joint':
    return step(carry, teachers, alpha, options.lambda_dis)

  def one_teacher(carry, teacher):
    teacher, alpha, here = teacher
    only = jax.tree.map(lambda a: a[None], (teacher, alpha))
    nothing = {name: jnp.zeros(1, z.dtype) for name in PER_TEACHER
               if name != 'md' or options.hard_samples}
    return jax.lax.cond(
        here, lambda: step(carry, *only, options.lambda_dis / num_teachers),
        lambda: (carry, nothing))

  carry, terms = jax.lax.scan(one_teacher, carry, (teachers, alpha, arrived))
  return carry, {name: value[:, 0] for name, value in terms.items()}


def teacher_terms(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    alpha: jax.Array,
    labels: jax.Array,
    options: Options = Options(),
) -> tuple[jax.Array, jax.Array]:
  """What one teacher adds to the generator's loss: (l_md, l_cls).

  Args:
    student_logits: [B, C].
    teacher_logits: [B, C].
    alpha: [B] weight of this teacher for each label.
    labels: [B].
    options: `md`, `kl_direction` and `cls_weight` are read.

  Returns:
    l_md, the negated discrepancy, and l_cls, the teacher's cross-entropy.
  """
  chex.assert_equal_shape([student_logits, teacher_logits])
  chex.assert_equal_shape([alpha, labels])
  if options.md == 'l1':
    fixed = jax.lax.stop_gradient(teacher_logits)
    gap = jnp.mean(jnp.abs(student_logits - fixed), axis=-1)
  elif options.kl_direction == 'forward':
    gap = losses.kl_divergence(teacher_logits, student_logits)
  else:
    gap = losses.kl_divergence(student_logits, teacher_logits)
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels(
      teacher_logits, labels)
  if options.cls_weight == 'mean':
    cls = jnp.mean(cross_entropy) * jnp.mean(alpha)
  else:
    cls = jnp.mean(cross_entropy * alpha)
  return -jnp.mean(gap * alpha), cls


def student_loss(
    logits: jax.Array, target: jax.Array, options: Options = Options()
) -> jax.Array:
  """Distillation of `target` [B, C] into `logits` [B, C], a scalar."""
  chex.assert_equal_shape([logits, target])
  scale = options.temperature**2
  log_student = jax.nn.log_softmax(logits / options.temperature)
  if options.kl_direction == 'forward':
    per_class = -target * log_student  # cross-entropy: KL but for a constant
  else:
    mass = jnp.sum(target, axis=-1, keepdims=True)
    log_target = jnp.log(target / jnp.maximum(mass, 1e-6) + 1e-12)
    per_class = mass * jnp.exp(log_student) * (log_student - log_target)
  if options.student_reduction == 'mean_bc':
    return scale * jnp.mean(per_class)
  return scale * jnp.mean(jnp.sum(per_class, axis=-1))
