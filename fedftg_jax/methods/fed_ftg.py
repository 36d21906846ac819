"""FedFTG: data-free fine-tuning of the aggregated model on the server.

Zhang, Shen, Ding, Tao and Duan, Fine-tuning Global Model via Data-Free
Knowledge Distillation for Non-IID Federated Learning, CVPR 2022,
arXiv:2203.09249.

A generator G learns images x = G(z, y) on which the student D(x; w), the
aggregated model, and the teachers D(x; w_k), the clients' models, disagree.
With alpha_k^y = n_k^y / sum_i n_i^y (Eq. 9), each of I iterations draws z and
y, then

  I_g times  theta <- Adam(theta, grad l_gen),
             l_gen = sum_k (l_md + lambda_cls l_cls) + lambda_dis l_dis
  I_d times  w     <- SGD(w, grad l_kd),
             l_kd  = distance(D(x; w), ensemble_k D(x; w_k))

The paper and the released code (commit 1e6347c of ZhangLin-PKU/FedFTG) write
some terms differently; `Terms` holds the chosen forms, and `PRESETS` four
choices:

  official  the released code, number by number;
  paper     the published equations as far as they are known. The text could not
            be checked, so this is a reading of it. The diversity term is the
            code's;
  intended  the code with its defects fixed: fidelity weighted per sample,
            student loss not divided by C, aggregated BatchNorm statistics kept;
  robust    ours: 'intended' without hard samples, with the mean of the
            teachers' logits and generator steps for all teachers together
            (measured in docs/fed_ftg_parts.md).

A preset's other choices (numbers of steps and images, weight decay, gradient
bound, label draws, the teacher of `remembering`, biases of the generator) are
in `recipes.FTG_PRESETS`.

Privacy: the server learns every client's class counts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from fedftg_jax import distillation, losses
from fedftg_jax.base import Generator, Info, Method, Model, Variables
from fedftg_jax.methods import diagnostics


# Discrepancy between student and teacher: logits [B, C], [B, C] -> [B].
def l1(student, teacher):
  """Computes the mean absolute difference; the teacher is constant (code)."""
  return jnp.mean(jnp.abs(student - jax.lax.stop_gradient(teacher)), axis=-1)


def kl(student, teacher):
  """Computes KL(teacher || student), with gradients through both.

  It stands for the paper's term, whose direction could not be checked.
  """
  return losses.kl_divergence(teacher, student)


# Fidelity of a teacher: cross-entropy [B], weights alpha_k^y [B] -> scalar.
def mean_times_mean(cross_entropy, alpha):
  """Multiplies the mean cross-entropy by the mean weight (code)."""
  return jnp.mean(cross_entropy) * jnp.mean(alpha)


def per_sample(cross_entropy, alpha):
  """Averages the cross-entropy, weighted per sample (paper)."""
  return jnp.mean(cross_entropy * alpha)


# Distance of the student from the ensemble: logits, target [B, C] -> scalar.
def soft_cross_entropy(logits, target):
  """Computes the mean cross-entropy: KL up to a constant (paper)."""
  return jnp.mean(jnp.sum(-target * jax.nn.log_softmax(logits), axis=-1))


def over_classes(logits, target):
  """Computes the mean over batch and classes: C times smaller (code)."""
  return jnp.mean(-target * jax.nn.log_softmax(logits))


def class_weights(counts: jax.Array, arrived: jax.Array) -> jax.Array:
  """Computes alpha_k^y [K, C] of Eq. 9.

  It is 0 for an absent teacher and for a class that no teacher has.
  """
  chex.assert_rank([counts, arrived], [2, 1])
  counts = counts * arrived[:, None]
  return counts / (jnp.sum(counts, axis=0) + 1e-6)


def uniform_weights(counts: jax.Array, arrived: jax.Array) -> jax.Array:
  """Returns weight 1 / K for each of the K teachers that arrived, [K, C].

  This is the ablation of the class-level ensemble.
  """
  return jnp.ones(counts.shape) * distillation.present(arrived)[:, None]


class Terms(NamedTuple):
  """The exchangeable parts of the losses; the defaults are the code's."""

  discrepancy: Callable | None = l1  # in l_md, or `kl`; None: no hard samples
  fidelity: Callable = mean_times_mean  # in l_cls, or `per_sample`
  distance: Callable = over_classes  # in l_kd, or `soft_cross_entropy`
  ensemble: Callable = distillation.mean_of_probabilities  # or `mean_of_logits`
  weights: Callable = class_weights  # or `uniform_weights`
  lambda_cls: float = 1.0
  lambda_dis: float = 1.0


CODE = Terms()
MENDED = Terms(fidelity=per_sample, distance=soft_cross_entropy)
# The keyword arguments that a preset passes to `fine_tune` (or `fed_ftg`).
PRESETS: dict[str, dict[str, Any]] = {
  'official': dict(terms=CODE),
  'paper': dict(terms=MENDED._replace(discrepancy=kl), joint=True),
  'intended': dict(terms=MENDED, student_bn=distillation.kept_statistics),
  'robust': dict(
    terms=MENDED._replace(
      discrepancy=None, ensemble=distillation.mean_of_logits
    ),
    joint=True,
    student_bn=distillation.kept_statistics,
  ),
}


def generator_loss(
  model,
  generator,
  terms,
  student,
  teachers,
  alpha,
  share,
  z,
  labels,
  params,
  stats,
):
  """Computes l_gen of the generator `params` over stacked `teachers` [K, ...].

  `alpha` [K, B] is the weight of each teacher for the label of each image;
  `share` is the factor of the diversity term: 1, or 1 / K if each teacher has a
  step of its own.

  Returns:
    l_gen, and (new BatchNorm statistics, the terms of each teacher [K] by
    name).
  """
  images, stats = generator.apply(
    Variables(params, stats), z, labels, train=True
  )
  logits = distillation.teacher_logits(model, teachers, images)  # [K, B, C]
  cross_entropy = jax.vmap(
    optax.softmax_cross_entropy_with_integer_labels, (0, None)
  )(logits, labels)
  cls = jax.vmap(terms.fidelity)(cross_entropy, alpha)
  dis = losses.diversity(z, images)
  loss = terms.lambda_cls * jnp.sum(cls) + terms.lambda_dis * share * dis
  by_name = {'cls': cls, 'dis': jnp.broadcast_to(dis, cls.shape)}
  if terms.discrepancy is not None:
    own = model.apply(student, images).logits
    gap = jax.vmap(terms.discrepancy, (None, 0))(own, logits)  # [K, B]
    by_name['md'] = -jnp.mean(gap * alpha, axis=1)
    loss += jnp.sum(by_name['md'])
  return loss, (stats, by_name)


def fine_tune(
  model: Model,
  generator: Generator,
  student: Variables,
  made: Variables,
  teachers: Variables,
  counts: jax.Array,
  z: jax.Array,
  labels: jax.Array,
  *,
  arrived: jax.Array | None = None,
  terms: Terms = CODE,
  generator_optimizer: optax.GradientTransformation,
  student_optimizer: optax.GradientTransformation,
  generator_steps: int = 1,
  student_steps: int = 5,
  joint: bool = False,
  student_bn: Callable = distillation.renewed_statistics,
) -> tuple[Variables, Variables, dict[str, jax.Array]]:
  """Runs the server step: I iterations of generator and student updates.

  Args:
    model: the classifier.
    generator: the generator.
    student: variables of the aggregated model.
    made: variables of the generator.
    teachers: variables of the clients' models, every leaf [K, ...].
    counts: [K, C] number of examples of each class that each teacher was
      trained on.
    z: [I, B, noise], the noise of the images that generator and student train
      on.
    labels: [I, B].
    arrived: [K] bool, False for teachers that are left out; None to use all.
    terms: the chosen forms of the losses.
    generator_optimizer: includes the learning rate; its state starts anew here.
    student_optimizer: includes the learning rate; its state starts anew in each
      iteration.
    generator_steps: I_g, passes of generator updates in an iteration.
    student_steps: I_d, student updates in an iteration.
    joint: True for one generator update on the sum over teachers (paper), False
      for one update per teacher in turn, with 1 / K of the diversity in each
      (code).
    student_bn: how the student normalises, one of `distillation.STATISTICS`.

  Returns:
    The student, the generator, and by name the losses before each step: 'md'
    (with hard samples), 'cls', 'dis' [I, I_g, K] (0 for an absent teacher) and
    'student' [I, I_d], and the measures of `diagnostics.of_images` [I].
  """
  arrived = jnp.ones(len(counts), bool) if arrived is None else arrived
  alpha = terms.weights(counts, arrived)
  num_teachers = jnp.maximum(jnp.sum(arrived), 1)

  def generator_step(
    made, opt_state, student, teachers, alpha, share, z, labels
  ):
    def loss(params, stats):
      return generator_loss(
        model,
        generator,
        terms,
        student,
        teachers,
        alpha,
        share,
        z,
        labels,
        params,
        stats,
      )

    grads, (stats, by_name) = jax.grad(loss, has_aux=True)(*made)
    updates, opt_state = generator_optimizer.update(
      grads, opt_state, made.params
    )
    params = optax.apply_updates(made.params, updates)
    return (Variables(params, stats), opt_state), by_name

  def one_pass(carry, student, z, labels):
    if joint:
      return generator_step(
        *carry, student, teachers, alpha[:, labels], 1.0, z, labels
      )

    def one_teacher(carry, row):
      here, *one = row
      one = jax.tree.map(lambda a: a[None], one)
      nothing = dict.fromkeys(
        diagnostics.per_teacher(terms), jnp.zeros(1, z.dtype)
      )
      return jax.lax.cond(
        here,
        lambda: generator_step(
          *carry, student, *one, 1 / num_teachers, z, labels
        ),
        lambda: (carry, nothing),
      )

    carry, by_name = jax.lax.scan(
      one_teacher, carry, (arrived, teachers, alpha[:, labels])
    )
    return carry, {name: value[:, 0] for name, value in by_name.items()}

  def iteration(carry, draws):
    student, *generating = carry
    z, labels = draws
    generating, by_name = jax.lax.scan(
      lambda carry, _: one_pass(carry, student, z, labels),
      tuple(generating),
      length=generator_steps,
    )
    images = losses.frozen(
      lambda made: generator.apply(made, z, labels)[0], generating[0]
    )
    logits = distillation.frozen_logits(model, teachers, images)
    target = terms.ensemble(logits, alpha[:, labels])
    tuned, loss = distillation.distil(
      model,
      student,
      student_optimizer,
      terms.distance,
      lambda i: (images, target),
      student_steps,
      forward=student_bn,
    )
    before, after = (
      losses.frozen(lambda v: model.apply(v, images).logits, variables)
      for variables in (student, tuned)
    )
    return (tuned, *generating), {
      **by_name,
      'student': loss,
      **(diagnostics.of_images(target, labels, before, after)),
    }

  (student, made, _), by_name = jax.lax.scan(
    iteration,
    (student, made, generator_optimizer.init(made.params)),
    (z, labels),
  )
  return student, made, by_name


def draw(
  key,
  counts,
  noise_dim,
  iterations,
  batch_size,
  draw_labels=distillation.quota_labels,
):
  """Draws one round's noise [I, B, noise] and labels [I, B] from counts [C]."""
  key_noise, key_labels = jax.random.split(key)
  labels = draw_labels(key_labels, counts, iterations * batch_size)
  z = jax.random.normal(key_noise, (iterations, batch_size, noise_dim))
  return z, labels.reshape(iterations, batch_size)


def fed_ftg(
  model: Model,
  generator: Generator,
  num_classes: int,
  *,
  iterations: int = 10,
  batch_size: int = 50,
  generator_steps: int = 1,
  student_steps: int = 5,
  terms: Terms = CODE,
  joint: bool = False,
  student_bn: Callable = distillation.renewed_statistics,
  generator_optimizer: Any = optax.adam(0.01),
  student_optimizer: Any = distillation.sgd(0.1, weight_decay=1e-3),
  draw_labels: Callable = distillation.quota_labels,
) -> Method:
  """Builds FedFTG; it comes after the part that aggregates.

  Args:
    model: the classifier.
    generator: of images in the space of `model`'s float inputs.
    num_classes: C.
    iterations: I, iterations in a round; 0 switches fine-tuning off.
    batch_size: B, number of generated images in a batch.
    generator_steps: see `fine_tune`.
    student_steps: likewise.
    terms: likewise.
    joint: likewise.
    student_bn: likewise.
    generator_optimizer: an optax optimiser, or a function of the round that
      returns one.
    student_optimizer: likewise.
    draw_labels: (key, counts [C], num) -> labels [num]:
      `distillation.quota_labels` (code) or `distillation.iid_labels` (paper).

  Returns:
    The method. Its server slot is the generator, its message the class counts.
    Info has the models 'aggregated' (before) and 'fine_tuned', and the means of
    a round, see `diagnostics.of_round`.

  Raises:
    ValueError: for a number that is too small.
  """
  distillation.check_least(
    iterations=(iterations, 0),
    batch_size=(batch_size, 1),
    generator_steps=(generator_steps, 0),
    student_steps=(student_steps, 0),
  )

  def update(variables, made, received, key):
    tuned, by_name = variables, {}
    if iterations:
      teachers, counts = received.stacked
      z, labels = draw(
        key,
        counts.sum(0),
        generator.noise_dim,
        iterations,
        batch_size,
        draw_labels,
      )
      tuned, made, by_name = fine_tune(
        model,
        generator,
        variables,
        made,
        teachers,
        counts,
        z,
        labels,
        arrived=received.arrived,
        terms=terms,
        joint=joint,
        generator_optimizer=distillation.at_round(
          generator_optimizer, received
        ),
        student_optimizer=distillation.at_round(student_optimizer, received),
        generator_steps=generator_steps,
        student_steps=student_steps,
        student_bn=student_bn,
      )
      by_name = diagnostics.of_round(
        by_name, received.arrived, variables, tuned
      )
    return (
      tuned,
      made,
      Info(
        {f'fed_ftg/{name}': value for name, value in by_name.items()},
        {'aggregated': variables, 'fine_tuned': tuned},
      ),
    )

  return Method(
    init=lambda key, variables: (generator.init(key), ()),
    update=update,
    synthesise=distillation.draw_images(generator),
    upload=distillation.count_labels(num_classes),
    stacked=lambda sent: (sent.model, sent.message),
  )
