"""FedDF: the mean of the clients' models is distilled from their ensemble.

Lin, Kong, Stich and Jaggi, Ensemble Distillation for Robust Model Fusion in
Federated Learning, NeurIPS 2020, arXiv:2006.07242. There are two forms, which
come after the part that aggregates:

`fed_df_public` distils on unlabelled public images that the server holds; only
models are sent. Deviations: the ensemble is the mean of the clients'
probabilities, unless `Options.ensemble` is the paper's, the softmax of their
mean logits; a fixed number of steps, without early stopping on validation data;
the learning rate is constant within a round.

`fed_df` needs no data; it is the form in the official FedFTG repository, with
two phases. First a generator learns, from fresh noise and labels in each step,
to make images that the clients recognise (mean cross-entropy over clients) and
that are diverse (the diversity term of FedFTG). Then the student learns the
clients' mean probabilities on fresh images. That code adds up its loss over one
generator pass per client and one for the diversity term; these K + 1 passes
update the generator's BatchNorm statistics K + 1 times with the same batch.
Here there is one pass, and then the statistics are moved as far. Which images
and steps the paper would choose is not known: it uses a generator only as a
variant.

Privacy: `fed_df` tells the server every client's class counts.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedftg_jax import distillation, losses, optimizers
from fedftg_jax.base import Generator, Info, Method, Model, Variables
from fedftg_jax.models import layers


class Options(NamedTuple):
  """The options of both forms; the defaults are the official FedFTG code's.

  Attributes:
    generator_steps: updates of the generator in a round (generated images
      only).
    student_steps: updates of the student in a round; without updates of either
      kind the mean does not change.
    batch_size: B, number of images in a batch.
    student_lr: learning rate of the student's SGD (here also a function of the
      round).
    generator_lr: learning rate of the generator's Adam (here also a function of
      the round).
    weight_decay: weight decay of both.
    lambda_dis: weight of the diversity term.
    eps_root: added under the square root of the generator's Adam, for forward
      mode through a round, as with --ftg_eps_root.
    ensemble: whether the teachers' probabilities (code,
      `distillation.mean_of_probabilities`) or logits (paper,
      `distillation.mean_of_logits`) are averaged.
  """

  generator_steps: int = 50
  student_steps: int = 20
  batch_size: int = 50
  student_lr: float | Callable = 0.1
  generator_lr: float | Callable = 0.01
  weight_decay: float = 1e-3
  lambda_dis: float = 1.0
  eps_root: float = 0.0
  ensemble: Callable = distillation.mean_of_probabilities


def check(options: Options) -> None:
  """Checks the numbers of the options.

  Raises:
    ValueError: names a number that is too small, and its lower bound.
  """
  distillation.check_least(
    generator_steps=(options.generator_steps, 0),
    student_steps=(options.student_steps, 0),
    batch_size=(options.batch_size, 1),
  )


def fed_df(
  model: Model,
  generator: Generator,
  num_classes: int,
  options: Options = Options(),
) -> Method:
  """Builds FedDF on generated images; it refines the mean.

  Args:
    model: the classifier.
    generator: of images in the space of `model`'s float inputs.
    num_classes: C.
    options: see `Options`.

  Returns:
    The method. Its server slot is the generator, its message the class counts.
    Info has the mean of each loss and the model 'distilled'.

  Raises:
    ValueError: for a wrong option.
  """
  check(options)

  def init(key, variables):
    del variables
    return generator.init(key), ()

  def update(variables, shared, received, key):
    teachers, counts = received.stacked
    z, labels = draw(key, counts.sum(0), generator.noise_dim, options)
    cut = options.generator_steps
    shared, terms = train_generator(
      model,
      generator,
      shared,
      teachers,
      received,
      z[:cut],
      labels[:cut],
      options,
    )

    def examples(i):
      draws = z[cut + i], labels[cut + i]
      return losses.frozen(
        lambda made: generator.apply(made, *draws)[0], shared
      )

    student, loss = _distil(
      model, variables, teachers, received, examples, options
    )
    metrics = {
      f'fed_df/{name}': jnp.sum(value) / max(cut, 1)
      for name, value in terms.items()
    }
    return (
      student,
      shared,
      Info({**metrics, 'fed_df/student': loss}, {'distilled': student}),
    )

  return Method(
    init=init,
    update=update,
    synthesise=distillation.draw_images(generator),
    upload=distillation.count_labels(num_classes),
    stacked=lambda sent: (sent.model, sent.message),
  )


def fed_df_public(model: Model, options: Options = Options()) -> Method:
  """Builds FedDF on the public images of `Data.public` [P, H, W, channels].

  Args:
    model: the classifier.
    options: see `Options`; those of the generator are not used.

  Returns:
    The method. It keeps nothing and sends nothing. Info has the mean loss and
    the model 'distilled'.

  Raises:
    ValueError: for a wrong option; in the first round, if there are no public
      images.
  """
  check(options)

  def update(variables, shared, received, key):
    images = received.public
    if not hasattr(images, 'shape'):
      raise ValueError(
        'FedDF on public data needs images in Data.public, got '
        f'{type(images).__name__}.'
      )

    def examples(i):
      rows = jax.random.randint(
        jax.random.fold_in(key, i), (options.batch_size,), 0, len(images)
      )
      return images[rows]

    student, loss = _distil(
      model, variables, received.stacked, received, examples, options
    )
    return (
      student,
      shared,
      Info({'fed_df/student': loss}, {'distilled': student}),
    )

  return Method(stacked=lambda sent: sent.model, update=update)


def draw(key, counts, noise_dim, options):
  """Draws noise [steps, B, noise] and labels [steps, B] for both phases.

  The generator's steps come first.
  """
  num = options.generator_steps + options.student_steps
  key_noise, key_labels = jax.random.split(key)
  labels = distillation.quota_labels(
    key_labels, counts, num * options.batch_size
  )
  shape = num, options.batch_size
  return jax.random.normal(key_noise, (*shape, noise_dim)), labels.reshape(
    shape
  )


def train_generator(
  model, generator, variables, teachers, received, z, labels, options
):
  """Runs the first phase: one Adam step per row of `z` [steps, B, noise].

  Returns:
    The generator's variables, and the loss terms before each step.
  """
  present = distillation.present(received.arrived)
  rate = distillation.rate_of(options.generator_lr, received)
  optimizer = optax.chain(
    optax.add_decayed_weights(options.weight_decay),
    optimizers.adam(rate, eps_root=options.eps_root),
  )
  passes = 1 + jnp.sum(received.arrived)

  def loss_fn(params, stats, z, labels):
    images, new = generator.apply(
      Variables(params, stats), z, labels, train=True
    )
    logits = distillation.teacher_logits(model, teachers, images)
    cls = jnp.sum(
      present * jax.vmap(lambda own: losses.cross_entropy(own, labels))(logits)
    )
    dis = losses.diversity(z, images)
    return cls + options.lambda_dis * dis, (
      _repeated(stats, new, passes),
      {'cls': cls, 'dis': dis},
    )

  def step(carry, draws):
    (params, stats), opt_state = carry
    grads, (stats, terms) = jax.grad(loss_fn, has_aux=True)(
      params, stats, *draws
    )
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return (Variables(params, stats), opt_state), terms

  (variables, _), terms = jax.lax.scan(
    step, (variables, optimizer.init(variables.params)), (z, labels)
  )
  return variables, terms


def _repeated(old, new, times):
  """Moves running statistics `times` times as from `old` to `new`."""
  keep = 1 - layers.BATCH_NORM_MOMENTUM
  factor = (1 - keep**times) / (1 - keep)
  return jax.tree.map(lambda a, b: a + factor * (b - a), old, new)


def _distil(model, student, teachers, received, images, options):
  """Trains the student on `images(i)`; returns it and its mean loss."""
  weight = jnp.broadcast_to(
    distillation.present(received.arrived)[:, None],
    (len(received.arrived), options.batch_size),
  )

  def examples(i):
    x = images(i)
    logits = distillation.frozen_logits(model, teachers, x)
    return x, options.ensemble(logits, weight)

  def loss(logits, target):
    return jnp.mean(
      optax.losses.kl_divergence(jax.nn.log_softmax(logits), target)
    )

  student, values = distillation.distil(
    model,
    student,
    distillation.sgd(
      distillation.rate_of(options.student_lr, received), options.weight_decay
    ),
    loss,
    examples,
    options.student_steps,
  )
  return student, jnp.sum(values) / max(options.student_steps, 1)
