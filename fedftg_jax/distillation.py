"""What server methods share that distil clients' models into one.

Labels for generated images, what teachers say together, and the student's
training. Teachers are variables with a leading axis [K].
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from fedftg_jax import losses
from fedftg_jax.base import Generator, Model, Output, Received, Variables
from fedftg_jax.data import clients


def check_least(**bounds: tuple[float, float]) -> None:
  """Checks that every value (value, least) is at least what it must be.

  Raises:
    ValueError: names the value that is not.
  """
  for name, (value, least) in bounds.items():
    if value < least:
      raise ValueError(f'{name} must be at least {least}, got {value}.')


def count_labels(num_classes: int) -> Callable:
  """Makes the hook `Method.upload` that sends a client's class counts [C]."""

  def upload(view, local, objective, key):
    del local, objective, key
    return view.own, clients.label_counts(view.data, num_classes)

  return upload


def draw_images(generator: Generator) -> Callable:
  """Makes the hook `Method.synthesise` of a server slot that is the
  generator."""

  def synthesise(shared, labels, key):
    z = jax.random.normal(key, (len(labels), generator.noise_dim))
    return generator.apply(shared, z, labels)[0]

  return synthesise


KEPT = 8  # images of each class that a server keeps, for pictures


def no_images(num_classes: int, image_shape: tuple[int, ...]) -> jax.Array:
  """[C, KEPT, ...] what a server keeps before there are any."""
  return jnp.zeros((num_classes, KEPT, *image_shape))


def keep_images(
  kept: jax.Array, images: jax.Array, labels: jax.Array, valid: jax.Array
) -> jax.Array:
  """Keeps the first images of each class, over and over if they are few.

  Args:
    kept: [C, KEPT, ...] those before, which stay for a class without new ones.
    images: [B, ...].
    labels: [B].
    valid: [B] False for those that do not count.

  Returns:
    As `kept`.
  """

  def of_class(old, label):
    of_it = valid & (labels == label)
    num = jnp.sum(of_it)
    order = jnp.argsort(~of_it)
    rows = order[jnp.arange(KEPT) % jnp.clip(num, 1, len(labels))]
    return jnp.where(num > 0, images[rows], old)

  return jax.vmap(of_class)(kept, jnp.arange(len(kept)))


def draw_kept(
  shared: jax.Array, labels: jax.Array, key: jax.Array
) -> jax.Array:
  """The hook `Method.synthesise` of a server slot as `keep_images` makes it:
  one after the other of a class's."""
  del key
  return shared[labels, jnp.arange(len(labels)) % KEPT]


def present(arrived: jax.Array) -> jax.Array:
  """[K] one over the number of those that arrived, 0 for the others."""
  return arrived / jnp.maximum(jnp.sum(arrived), 1)


def rate_of(rate: float | Callable, received: Received) -> jax.Array | float:
  """A learning rate that may be a function of the round."""
  return rate(received.round) if callable(rate) else rate


def at_round(
  optimizer: Any, received: Received
) -> optax.GradientTransformation:
  """An optimiser that may be a function of the round."""
  return optimizer(received.round) if callable(optimizer) else optimizer


def quota_labels(key: jax.Array, counts: jax.Array, num: int) -> jax.Array:
  """`num` labels with class shares as in integer `counts` [C], shuffled.

  Class c gets floor(num * cumsum_c / total) less what the classes before it
  got, in integers, so that no share is off by a rounding. The total must stay
  below 2**30.
  """
  chex.assert_type(counts, int)
  ends = _share(num, jnp.cumsum(counts))
  labels = jnp.searchsorted(ends, jnp.arange(num, dtype=jnp.uint32), 'right')
  return jax.random.permutation(key, labels.astype(jnp.int32))


def _share(num: int, cumulative: jax.Array) -> jax.Array:
  """floor(num * cumulative / cumulative[-1]), by long division: the product may
  not fit into 32 bits."""
  part = cumulative.astype(jnp.uint32)
  total = jnp.maximum(part[-1], 1)
  bits = num.bit_length()

  def one_bit(i, carry):
    quotient, rest = carry
    bit = jnp.uint32(num) >> (bits - 1 - i).astype(jnp.uint32) & 1
    rest = 2 * rest + bit * part
    return 2 * quotient + rest // total, rest % total

  return jax.lax.fori_loop(
    0, bits, one_bit, (jnp.zeros_like(part), jnp.zeros_like(part))
  )[0]


def iid_labels(key: jax.Array, counts: jax.Array, num: int) -> jax.Array:
  """`num` independent labels with probabilities `counts` [C] / total."""
  return jax.random.categorical(key, jnp.log(counts), shape=(num,))


def of_all_classes(draw_labels: Callable) -> Callable:
  """Draws as if all classes were equally frequent, for ablations."""
  return lambda key, counts, num: draw_labels(key, jnp.ones_like(counts), num)


def teacher_logits(
  model: Model, teachers: Variables, x: jax.Array
) -> jax.Array:
  """[K, B, C] what each teacher says of the images `x`, in eval mode."""
  return jax.vmap(lambda teacher: model.apply(teacher, x).logits)(teachers)


def frozen_logits(model: Model, teachers: Variables, x: jax.Array) -> jax.Array:
  """As `teacher_logits`, where no gradient is taken, see `losses.frozen`."""
  return losses.frozen(lambda t: teacher_logits(model, t, x), teachers)


def mean_of_probabilities(logits: jax.Array, weight: jax.Array) -> jax.Array:
  """The weighted mean of the teachers' probabilities.

  Args:
    logits: [K, B, C].
    weight: [K, B].

  Returns:
    [B, C]; rows sum to sum_k weight_k.
  """
  chex.assert_equal_shape_prefix([logits, weight], 2)
  return jnp.einsum('kbc,kb->bc', jax.nn.softmax(logits), weight)


def mean_of_logits(logits: jax.Array, weight: jax.Array) -> jax.Array:
  """The probabilities of the weighted sum of logits; as
  `mean_of_probabilities`."""
  chex.assert_equal_shape_prefix([logits, weight], 2)
  mass = jnp.sum(weight, axis=0)[:, None]
  return mass * jax.nn.softmax(jnp.einsum('kbc,kb->bc', logits, weight))


ENSEMBLES = {'prob': mean_of_probabilities, 'logit': mean_of_logits}


def renewed_statistics(
  model: Model, variables: Variables, x: jax.Array
) -> Output:
  """Normalises by the batch; the running statistics become those of the
  batches."""
  return model.apply(variables, x, train=True)


def batch_statistics(
  model: Model, variables: Variables, x: jax.Array
) -> Output:
  """Normalises by the batch; the running statistics stay as they are."""
  return model.apply(variables, x, train=True)._replace(stats=variables.stats)


def kept_statistics(model: Model, variables: Variables, x: jax.Array) -> Output:
  """Normalises by the running statistics, which stay as they are."""
  return model.apply(variables, x)


STATISTICS = {
  'overwrite': renewed_statistics,
  'batch': batch_statistics,
  'keep': kept_statistics,
}


def distil(
  model: Model,
  student: Variables,
  optimizer: optax.GradientTransformation,
  loss: Callable,
  examples: Callable,
  num_steps: int,
  *,
  forward: Callable = renewed_statistics,
) -> tuple[Variables, jax.Array]:
  """Trains the student on images with soft targets.

  Args:
    model: the classifier.
    student: its variables.
    optimizer: with its learning rate; its state begins anew.
    loss: (logits [B, C], target [B, C]) -> scalar.
    examples: (step) -> (images, target).
    num_steps: number of updates.
    forward: (model, variables, images) -> Output: how the student normalises,
      one of `STATISTICS`.

  Returns:
    The student, and the loss before each step [num_steps].
  """

  def loss_fn(params, stats, images, target):
    output = forward(model, Variables(params, stats), images)
    return loss(output.logits, target), output.stats

  def step(carry, i):
    (params, stats), opt_state = carry
    (value, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      params, stats, *examples(i)
    )
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return (Variables(params, stats), opt_state), value

  (student, _), values = jax.lax.scan(
    step, (student, optimizer.init(student.params)), jnp.arange(num_steps)
  )
  return student, values


def sgd(
  learning_rate: float | jax.Array,
  weight_decay: float = 0.0,
  clip_norm: float = 0.0,
) -> optax.GradientTransformation:
  """SGD whose weight decay is a part of the gradient, as in PyTorch.

  Args:
    learning_rate: step size.
    weight_decay: factor of the parameters that is added to the gradient.
    clip_norm: largest global norm of the gradient before that; 0 for no bound.

  Returns:
    The optimiser.

  Raises:
    ValueError: for a negative bound.
  """
  check_least(clip_norm=(clip_norm, 0))
  clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
  return optax.chain(
    *clip, optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate)
  )
