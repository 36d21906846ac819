"""FedGen: a feature generator, trained on the server, guides local training.

Zhu, Hong and Zhou, Data-Free Knowledge Distillation for Heterogeneous Federated
Learning, ICML 2021, arXiv:2105.10056; terms as in its released code (commit
dd5807c). A generator G(z, y) makes inputs of a model's last layer, the head h_k
of client k. With n_k^y = 1 + client k's examples of class y and alpha_k^y =
n_k^y / sum_i n_i^y, the server minimises in each round

  sum_k mean_b(alpha_k^y CE(h_k(G(z, y)), y)) + lambda_dis diversity(z, G(z, y))
    - lambda_student mean_bc(KL(sum_k alpha_k^y h_k(G) || h(G)))

with h the head of the broadcast model, and z uniform in [0, 1). Clients receive
G (frozen, with its running statistics). In every round t but the first they add
to their loss, with a_t = a 0.98^t and b_t = b 0.98^t, at least 1e-4,

  a_t CE(h(G(z, y~)), y~) + b_t KL(softmax(h(G(z, y))) || softmax(model(x)))

for labels y~ uniform over the classes, and the labels y of the batch. The first
term has a gradient in the head alone. The second, which the paper does not
have, holds its target constant.

Deviations from the released code: clients count the examples that they hold,
not those that they drew; y~ may be of a class that no client has; BatchNorm
statistics are sent with the model (with `--batch_norm=local` they are not, as
in the code); and features may be the output of a ReLU, as lenet's are, while
the generator's features are unbounded (as they are in `fedgen_cnn`, too).

Privacy: the server learns every client's class counts.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from fedftg_jax import distillation, losses, models, optimizers
from fedftg_jax.base import (
  Generator,
  Head,
  Info,
  Method,
  Model,
  PyTree,
  Variables,
)
from fedftg_jax.methods import fed_ftg

Weighting = Literal['official', 'intended', 'ensemble']
_LEAST = 1e-4  # lower bound of the decaying coefficients


class Slot(NamedTuple):
  """The server's slot of FedGen."""

  generator: Variables
  moments: PyTree  # Adam's state, kept over the rounds


def fed_gen(
  model: Model,
  num_classes: int,
  *,
  alpha: float = 10.0,
  beta: float = 10.0,
  decay: float = 0.98,
  steps: int = 50,
  batch_size: int = 32,
  lr: float = 3e-4,
  l2: float = 1e-2,
  weighting: Weighting = 'official',
  lambda_dis: float = 1.0,
  lambda_student: float = 0.0,
  hidden: int = 256,
  noise_dim: int = 32,
) -> Method:
  """Builds FedGen: a feature generator as an inductive bias of local training.

  Args:
    model: the classifier; it must have a head.
    num_classes: C.
    alpha: a, weight of the cross-entropy on generated features; 0 for none.
    beta: b, weight of the distillation from generated features; 0 for none.
    decay: factor per round of a, b and the generator's learning rate.
    steps: updates of the generator in a round.
    batch_size: number of generated features in a batch, on the server and on
      clients (32 in the code, as its clients' batches).
    lr: learning rate of the generator's Adam.
    l2: factor of the generator's parameters that is added to their gradient.
    weighting: 'official', cross-entropies weighted as mean(CE) *
      mean(alpha_k^y), as in the code; 'intended', as mean(CE * alpha_k^y); or
      'ensemble', one cross-entropy of the mean logits sum_k n_k / n h_k, with
      labels as frequent as in the clients' data (PFLlib).
    lambda_dis: weight of the diversity term.
    lambda_student: weight of the divergence between student and ensemble, which
      the generator maximises (0 in the code).
    hidden: width of the generator's hidden layer.
    noise_dim: length of z.

  Returns:
    The method. Its server slot begins with the generator. Info has, for the
    last step, 'fed_gen/teacher', 'fed_gen/diversity' and, with
    `lambda_student`, 'fed_gen/student'.

  Raises:
    ValueError: for a value out of range, or a model without a head.
  """
  head = models.need(model, 'head', 'fed_gen')
  if weighting not in get_args(Weighting):
    raise ValueError(
      f'weighting must be one of {get_args(Weighting)}, got {weighting!r}.'
    )
  distillation.check_least(
    alpha=(alpha, 0),
    beta=(beta, 0),
    steps=(steps, 0),
    batch_size=(batch_size, 1),
    hidden=(hidden, 1),
    noise_dim=(noise_dim, 1),
  )
  shape = jax.eval_shape(lambda: model.init(jax.random.key(0)))
  generator = models.feature_generator(
    num_features(head, shape), num_classes, hidden=hidden, noise_dim=noise_dim
  )
  terms = Terms(weighting, lambda_dis, lambda_student, l2)

  def init(key, variables):
    del variables
    return new_slot(generator.init(key), terms), ()

  def penalty(variables, output, batch, view, key):
    if not alpha and not beta:
      return 0.0
    keys = jax.random.split(key, 3)
    drawn = jax.random.randint(keys[0], (batch_size,), 0, num_classes)
    features = [
      generator.apply(
        view.shared, jax.random.uniform(k, (len(labels), noise_dim)), labels
      )[0]
      for k, labels in zip(keys[1:], (drawn, batch.y))
    ]
    terms = client_terms(
      head, variables, output.logits, batch.mask, features, drawn
    )
    return sum(
      jnp.where(
        view.round > 0,
        jnp.maximum(min(_LEAST, first), first * decay**view.round),
        0,
      )
      * term
      for first, term in zip((alpha, beta), terms)
    )

  def upload(view, local, objective, key):
    own, counts = distillation.count_labels(num_classes)(
      view, local, objective, key
    )
    return own, 1 + counts

  def update(variables, shared, received, key):
    heads, counts = received.stacked
    counts = counts * received.arrived[:, None]
    examples = jnp.maximum(counts - 1, 0)  # [K, C]
    if weighting == 'ensemble':
      frequency = jnp.sum(examples, axis=0)
      share = jnp.sum(examples, axis=1, keepdims=True)
      weight = jnp.broadcast_to(
        share / jnp.maximum(jnp.sum(share), 1), counts.shape
      )
    else:
      frequency = jnp.any(examples, axis=0).astype(float)
      weight = label_weights(counts)
    student = head.params(received.broadcast)
    rate = lr * decay**received.round

    def step(slot, key):
      key_y, key_z = jax.random.split(key)
      labels = distillation.iid_labels(key_y, frequency, batch_size)
      z = jax.random.uniform(key_z, (batch_size, noise_dim))
      return generator_step(
        generator,
        head,
        terms,
        slot,
        heads,
        weight[:, labels],
        student,
        z,
        labels,
        rate,
      )

    shared, values = jax.lax.scan(step, shared, jax.random.split(key, steps))
    metrics = {f'fed_gen/{k}': v[-1] for k, v in values.items() if steps}
    return variables, shared, Info(metrics)

  return Method(
    init=init,
    broadcast=lambda shared: shared.generator,
    penalty=penalty,
    upload=upload,
    stacked=lambda sent: (head.params(sent.model), sent.message),
    update=update,
  )


def label_weights(counts: jax.Array) -> jax.Array:
  """Computes alpha_k^y [K, C] from counts [K, C], 0 for absent clients."""
  return counts / jnp.maximum(jnp.sum(counts, axis=0), 1)


def client_terms(
  head: Head,
  variables: Variables,
  logits: jax.Array,
  mask: jax.Array,
  features: Sequence[jax.Array],
  drawn: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Computes the two terms of a client's loss, without their coefficients.

  Args:
    head: the last layer.
    variables: the model in training.
    logits: [B, C] its logits on a batch.
    mask: [B] False on padding.
    features: generated features for the labels `drawn`, and for the batch's
      labels.
    drawn: labels of the first features.

  Returns:
    The cross-entropy and the divergence.
  """
  own = head.params(variables)
  for_drawn, target = (head.apply(own, f) for f in features)
  divergence = losses.kl_divergence(losses.held_fixed(target), logits)
  return (
    losses.cross_entropy(for_drawn, drawn),
    losses.masked_mean(divergence, mask),
  )


class Terms(NamedTuple):
  """The settings of the generator's objective; see `fed_gen`."""

  weighting: Weighting = 'official'
  lambda_dis: float = 1.0
  lambda_student: float = 0.0
  l2: float = 1e-2


def new_slot(generator: Variables, terms: Terms) -> Slot:
  """Returns the slot of a generator with a fresh state of Adam."""
  return Slot(generator, _adam(terms).init(generator.params))


def generator_step(
  generator: Generator,
  head: Head,
  terms: Terms,
  slot: Slot,
  heads: PyTree,
  weight: jax.Array,
  student: PyTree,
  z: jax.Array,
  labels: jax.Array,
  rate: jax.Array | float,
) -> tuple[Slot, dict[str, jax.Array]]:
  """Runs one Adam step of the feature generator.

  Args:
    generator: makes features [B, F].
    head: the last layer of the clients' models.
    terms: the settings of the objective.
    slot: the generator and Adam's moments.
    heads: the clients' last layers, every leaf [K, ...].
    weight: [K, B] alpha_k^y of each label (with 'ensemble' n_k / n).
    student: the broadcast model's last layer.
    z: [B, noise].
    labels: [B].
    rate: learning rate.

  Returns:
    The new slot, and the terms before the step by name: 'teacher', 'diversity'
    and, if its weight is not 0, 'student'.
  """

  def objective(params):
    features, stats = generator.apply(
      slot.generator._replace(params=params), z, labels, train=True
    )
    logits = jax.vmap(head.apply, (0, None))(heads, features)  # [K, B, C]
    values = {
      'teacher': _teacher(terms.weighting, logits, weight, labels),
      'diversity': losses.diversity(z, features),
    }
    loss = values['teacher'] + terms.lambda_dis * values['diversity']
    if terms.lambda_student:
      ensemble = jnp.einsum('kbc,kb->bc', logits, weight)
      values['student'] = student_gap(ensemble, head.apply(student, features))
      loss -= terms.lambda_student * values['student']
    return loss, (stats, values)

  params = slot.generator.params
  grads, (stats, values) = jax.grad(objective, has_aux=True)(params)
  direction, moments = _adam(terms).update(grads, slot.moments, params)
  params = jax.tree.map(lambda p, d: p - rate * d, params, direction)
  return Slot(Variables(params, stats), moments), values


def _teacher(weighting, logits, weight, labels):
  """Computes the loss of the clients' heads on features of classes `labels`."""
  if weighting == 'ensemble':
    mean = jnp.einsum('kbc,kb->bc', logits, weight)
    return losses.cross_entropy(mean, labels)
  cross_entropy = jax.vmap(
    optax.softmax_cross_entropy_with_integer_labels, (0, None)
  )(logits, labels)
  weigh = {'official': fed_ftg.mean_times_mean, 'intended': fed_ftg.per_sample}[
    weighting
  ]
  return jnp.sum(jax.vmap(weigh)(cross_entropy, weight))


def student_gap(ensemble: jax.Array, student: jax.Array) -> jax.Array:
  """Computes KL(softmax(ensemble) || softmax(student)) of logits [B, C].

  The value is a mean over batch and classes.
  """
  divergence = losses.kl_divergence(ensemble, student)
  return jnp.mean(divergence) / student.shape[-1]


def _adam(terms) -> optax.GradientTransformation:
  """Builds Adam without a learning rate, on the gradient with the L2 term."""
  return optax.chain(
    optax.add_decayed_weights(terms.l2),
    optimizers.with_derivative(optax.scale_by_adam()),
  )


def num_features(head: Head, variables: Variables) -> int:
  """Returns the width F of the last layer's input: its matrix is [F, C]."""
  return next(
    a.shape[0] for a in jax.tree.leaves(head.params(variables)) if a.ndim == 2
  )
