"""What server methods share that distil clients' models into one.

Labels for generated images, what teachers say together, and the student's
training. Teachers are variables with a leading axis [K].
"""

from typing import Callable, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from fedftg_jax.base import Generator, Model, Received, Variables
from fedftg_jax.data import clients


def check_options(
    options: NamedTuple, choices: dict[str, tuple[str, ...]],
    least: dict[str, int]) -> None:
  """Checks the options of a method.

  Args:
    options: of the method.
    choices: what the named options may be.
    least: what the named options must be at least.

  Raises:
    ValueError: names a wrong option and what would be right.
  """
  for name, allowed in choices.items():
    if getattr(options, name) not in allowed:
      raise ValueError(
          f'{name} must be one of {allowed}, got {getattr(options, name)!r}.')
  for name, bound in least.items():
    if getattr(options, name) < bound:
      raise ValueError(
          f'{name} must be at least {bound}, got {getattr(options, name)}.')


def count_labels(num_classes: int, num_labels: int) -> Callable:
  """The hook `Method.upload` that sends a client's class counts [C].

  Args:
    num_classes: C.
    num_labels: at most how many labels the server draws in a round, times the
      rounds whose counts it draws them from.

  Returns:
    The hook. It raises ValueError where `quota_labels` would count past 2**32.
  """
  def upload(view, local, objective, key):
    del local, objective, key
    num_counted = len(view.data.y) + num_classes  # where counts are rounded
    if num_labels * num_counted >= 2**32:
      raise ValueError(
          'labels drawn in a round times number of examples and classes must stay '
          f'below 2**32, got {num_labels} * {num_counted}.')
    return view.own, clients.label_counts(view.data, num_classes)
  return upload


def draw_images(
    generator: Generator, variables: Callable = lambda shared: shared) -> Callable:
  """The hook `Method.synthesise`.

  Args:
    generator: the generator.
    variables: server slot -> the generator's variables.

  Returns:
    The hook.
  """
  def synthesise(shared, labels, key):
    z = jax.random.normal(key, (len(labels), generator.noise_dim))
    return generator.apply(variables(shared), z, labels)[0]
  return synthesise


def present(arrived: jax.Array) -> jax.Array:
  """[K] one over the number of those that arrived, 0 for the others."""
  return arrived / jnp.maximum(jnp.sum(arrived), 1)


def rate_of(rate: float | Callable, received: Received) -> jax.Array | float:
  """A learning rate that may be a function of the round."""
  return rate(received.round) if callable(rate) else rate


def quota_labels(key: jax.Array, counts: jax.Array, num: int) -> jax.Array:
  """`num` labels with class shares as in integer `counts` [C], shuffled.

  Class c gets floor(num * cumsum_c / total) less what the classes before it
  got; computed in integers, so that no share is off by a rounding. `num` times
  the total must stay below 2**32.
  """
  chex.assert_type(counts, int)
  cumulative = jnp.cumsum(counts).astype(jnp.uint32)
  ends = cumulative * jnp.uint32(num) // jnp.maximum(cumulative[-1], 1)
  labels = jnp.searchsorted(ends, jnp.arange(num, dtype=jnp.uint32), 'right')
  return jax.random.permutation(key, labels.astype(jnp.int32))


def iid_labels(key: jax.Array, counts: jax.Array, num: int) -> jax.Array:
  """`num` independent labels with probabilities `counts` [C] / total."""
  return jax.random.categorical(key, jnp.log(counts), shape=(num,))


def teacher_logits(model: Model, teachers: Variables, x: jax.Array) -> jax.Array:
  """[K, B, C] what each teacher says of the images `x`, in eval mode."""
  return jax.vmap(lambda teacher: model.apply(teacher, x).logits)(teachers)


def ensemble(logits: jax.Array, weight: jax.Array, kind: str) -> jax.Array:
  """What teachers say together, [B, C].

  Args:
    logits: [K, B, C].
    weight: [K, B].
    kind: 'prob', the weighted mean of probabilities, or 'logit', the
      probabilities of the weighted sum of logits.

  Returns:
    Rows sum to sum_k weight_k.
  """
  chex.assert_equal_shape_prefix([logits, weight], 2)
  if kind == 'prob':
    return jnp.einsum('kbc,kb->bc', jax.nn.softmax(logits), weight)
  mass = jnp.sum(weight, axis=0)[:, None]
  return mass * jax.nn.softmax(jnp.einsum('kbc,kb->bc', logits, weight))


def distil(
    model: Model,
    student: Variables,
    optimizer: optax.GradientTransformation,
    loss: Callable,
    examples: Callable,
    num_steps: int,
    *,
    train: bool = True,
) -> tuple[Variables, jax.Array]:
  """Trains the student on images with soft targets.

  Args:
    model: the classifier.
    student: its variables.
    optimizer: with its learning rate; its state begins anew.
    loss: (logits [B, C], target [B, C]) -> scalar.
    examples: (step) -> (images, target).
    num_steps: number of updates.
    train: whether the student normalises by the batch and renews its BatchNorm
      statistics.

  Returns:
    The student, and the loss before each step [num_steps].
  """

  def loss_fn(params, stats, images, target):
    output = model.apply(Variables(params, stats), images, train=train)
    return loss(output.logits, target), output.stats

  def step(carry, i):
    (params, stats), opt_state = carry
    (value, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        params, stats, *examples(i))
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return (Variables(params, stats), opt_state), value

  (student, _), values = jax.lax.scan(
      step, (student, optimizer.init(student.params)), jnp.arange(num_steps))
  return student, values


def sgd(learning_rate: float | jax.Array, weight_decay: float,
        clip_norm: float = 0.) -> optax.GradientTransformation:
  """SGD whose weight decay is a part of the gradient, as in PyTorch.

  Args:
    learning_rate: step size.
    weight_decay: factor of the parameters that is added to the gradient.
    clip_norm: largest global norm of the gradient before that; 0 for no bound.

  Returns:
    The optimiser.
  """
  clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
  return optax.chain(
      *clip, optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate))
