"""Shared parts of server methods that distil clients' models into one.

These are the labels of generated images, the ensemble of the teachers, and the
student's training. Teachers are variables with a leading axis [K].
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
  """Checks that every value is at least its lower bound.

  Args:
    **bounds: (value, lower bound) by name.

  Raises:
    ValueError: names the first value that is too small.
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
  """Makes the hook `Method.synthesise` where the server slot is a generator."""

  def synthesise(shared, labels, key):
    z = jax.random.normal(key, (len(labels), generator.noise_dim))
    return generator.apply(shared, z, labels)[0]

  return synthesise


KEPT = 8  # number of images of each class that a server keeps for pictures


def no_images(num_classes: int, image_shape: tuple[int, ...]) -> jax.Array:
  """Returns a slot [C, KEPT, ...] for kept images, filled with zeros."""
  return jnp.zeros((num_classes, KEPT, *image_shape))


def keep_images(
  kept: jax.Array, images: jax.Array, labels: jax.Array, valid: jax.Array
) -> jax.Array:
  """Keeps the first images of each class, repeated if there are too few.

  Args:
    kept: [C, KEPT, ...] the images kept before, which stay for a class without
      new ones.
    images: [B, ...].
    labels: [B].
    valid: [B] False for images that do not count.

  Returns:
    The kept images, shaped like `kept`.
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
  """Returns kept images of the given classes: the hook `Method.synthesise`.

  It is for a server slot made by `keep_images`, and cycles through the images
  of a class.
  """
  del key
  return shared[labels, jnp.arange(len(labels)) % KEPT]


def present(arrived: jax.Array) -> jax.Array:
  """Returns equal weights [K] of the clients that arrived, 0 for the others."""
  return arrived / jnp.maximum(jnp.sum(arrived), 1)


def rate_of(rate: float | Callable, received: Received) -> jax.Array | float:
  """Evaluates a learning rate that may be a function of the round."""
  return rate(received.round) if callable(rate) else rate


def at_round(
  optimizer: Any, received: Received
) -> optax.GradientTransformation:
  """Evaluates an optimiser that may be a function of the round."""
  return optimizer(received.round) if callable(optimizer) else optimizer


def quota_labels(key: jax.Array, counts: jax.Array, num: int) -> jax.Array:
  """Draws `num` labels with fixed class shares, in random order.

  Class c gets floor(num * cumsum_c / total) labels, less those of the classes
  before it. This is computed in integers, so that no share is off by a rounding
  error.

  Args:
    key: shuffles the labels.
    counts: [C] integers, to which the shares are proportional; their total must
      be below 2**30.
    num: number of labels.

  Returns:
    [num] int32.
  """
  chex.assert_type(counts, int)
  ends = _share(num, jnp.cumsum(counts))
  labels = jnp.searchsorted(ends, jnp.arange(num, dtype=jnp.uint32), 'right')
  return jax.random.permutation(key, labels.astype(jnp.int32))


def _share(num: int, cumulative: jax.Array) -> jax.Array:
  """Computes floor(num * cumulative / cumulative[-1]) by long division.

  The product may not fit into 32 bits.
  """
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
  """Draws `num` independent labels with probabilities `counts` [C] / total."""
  return jax.random.categorical(key, jnp.log(counts), shape=(num,))


def of_all_classes(draw_labels: Callable) -> Callable:
  """Wraps `draw_labels` to draw all classes equally often, for ablations."""
  return lambda key, counts, num: draw_labels(key, jnp.ones_like(counts), num)


def teacher_logits(
  model: Model, teachers: Variables, x: jax.Array
) -> jax.Array:
  """Computes each teacher's logits on images `x` in eval mode, [K, B, C]."""
  return jax.vmap(lambda teacher: model.apply(teacher, x).logits)(teachers)


def frozen_logits(model: Model, teachers: Variables, x: jax.Array) -> jax.Array:
  """Computes `teacher_logits` without a gradient, see `losses.frozen`."""
  return losses.frozen(lambda t: teacher_logits(model, t, x), teachers)


def mean_of_probabilities(logits: jax.Array, weight: jax.Array) -> jax.Array:
  """Computes the weighted mean of the teachers' probabilities.

  Args:
    logits: [K, B, C].
    weight: [K, B].

  Returns:
    [B, C]; rows sum to sum_k weight_k.
  """
  chex.assert_equal_shape_prefix([logits, weight], 2)
  return jnp.einsum('kbc,kb->bc', jax.nn.softmax(logits), weight)


def mean_of_logits(logits: jax.Array, weight: jax.Array) -> jax.Array:
  """Computes the probabilities of the weighted sum of the teachers' logits.

  Arguments and result are those of `mean_of_probabilities`.
  """
  chex.assert_equal_shape_prefix([logits, weight], 2)
  mass = jnp.sum(weight, axis=0)[:, None]
  return mass * jax.nn.softmax(jnp.einsum('kbc,kb->bc', logits, weight))


ENSEMBLES = {'prob': mean_of_probabilities, 'logit': mean_of_logits}


def renewed_statistics(
  model: Model, variables: Variables, x: jax.Array
) -> Output:
  """Runs the model in train mode: batch statistics update the running ones."""
  return model.apply(variables, x, train=True)


def batch_statistics(
  model: Model, variables: Variables, x: jax.Array
) -> Output:
  """Normalises by the batch and leaves the running statistics unchanged."""
  return model.apply(variables, x, train=True)._replace(stats=variables.stats)


def kept_statistics(model: Model, variables: Variables, x: jax.Array) -> Output:
  """Normalises by the running statistics and leaves them unchanged."""
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
    optimizer: includes the learning rate; its state starts anew.
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
  """Builds SGD with weight decay as part of the gradient, as in PyTorch.

  Args:
    learning_rate: step size.
    weight_decay: factor of the parameters that is added to the gradient.
    clip_norm: largest global norm of the gradient, before weight decay is
      added; 0 for no bound.

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
