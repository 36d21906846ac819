"""Losses as pure functions of arrays, per example or as masked means."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax

from fedftg_jax.base import PyTree


def masked_mean(values: jax.Array, mask: jax.Array | None = None) -> jax.Array:
  """Averages `values` [B] where `mask` [B] is True; 0 if it is True nowhere."""
  if mask is None:
    return jnp.mean(values)
  chex.assert_equal_shape([values, mask])
  return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1)


def cross_entropy(
  logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
  """Computes the mean cross-entropy of `logits` [B, C] and `labels` [B].

  Args:
    logits: [B, C].
    labels: [B] integers.
    mask: [B] False for examples that do not count; None if all count.

  Returns:
    A scalar.
  """
  chex.assert_rank([logits, labels], [2, 1])
  return masked_mean(
    optax.softmax_cross_entropy_with_integer_labels(logits, labels), mask
  )


def kl_divergence(target_logits: jax.Array, logits: jax.Array) -> jax.Array:
  """Computes KL(softmax(target_logits) || softmax(logits)), [..., B]."""
  chex.assert_equal_shape_suffix([target_logits, logits], 2)
  log_target = jax.nn.log_softmax(target_logits)
  difference = log_target - jax.nn.log_softmax(logits)
  return jnp.sum(jnp.exp(log_target) * difference, axis=-1)


def tempered_divergence(
  logits: jax.Array, teacher_logits: jax.Array, temperature: float
) -> jax.Array:
  """Computes T^2 KL(softmax(teacher / T) || softmax(student / T)) per example.

  Args:
    logits: [B, C] of the student.
    teacher_logits: [B, C].
    temperature: T.

  Returns:
    [B].
  """
  return temperature**2 * kl_divergence(
    teacher_logits / temperature, logits / temperature
  )


def not_true_divergence(
  logits: jax.Array,
  teacher_logits: jax.Array,
  labels: jax.Array,
  temperature: float,
) -> jax.Array:
  """Computes `tempered_divergence` over all classes but each example's label.

  This is FedNTD's loss (arXiv:2106.03097). The logit of an example's label does
  not enter it, so its gradient is exactly 0.

  Args:
    logits: [B, C] of the student.
    teacher_logits: [B, C].
    labels: [B] the classes that are left out.
    temperature: T.

  Returns:
    [B].
  """
  chex.assert_equal_shape([logits, teacher_logits])
  chex.assert_rank([logits, labels], [2, 1])
  if logits.shape[-1] == 1:  # no other class
    return jnp.zeros(len(logits), logits.dtype)
  others = ~jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
  log_target, log_own = (
    a / temperature
    - jax.nn.logsumexp(a / temperature, axis=-1, keepdims=True, where=others)
    for a in (teacher_logits, logits)
  )
  terms = jnp.exp(log_target) * (log_target - log_own)
  return temperature**2 * jnp.sum(jnp.where(others, terms, 0), axis=-1)


def check_distillation(weight: float, temperature: float) -> None:
  """Checks the weight and the temperature of a distillation loss.

  Raises:
    ValueError: for a negative weight or a temperature that is not above 0.
  """
  if weight < 0:
    raise ValueError(f'beta must be at least 0, got {weight}.')
  if temperature <= 0:
    raise ValueError(f'tau must be above 0, got {temperature}.')


@jax.custom_vjp
def held_fixed(target: jax.Array) -> jax.Array:
  """Holds `target` constant in a gradient, as `jax.lax.stop_gradient` does.

  Unlike there, a `jax.jvp` through the gradient still sees what `target`
  depends on, so influence can be carried through a whole round.
  """
  return target


held_fixed.defvjp(
  lambda target: (target, ()), lambda _, cotangent: (jnp.zeros_like(cotangent),)
)


def frozen(function: Callable, variables: PyTree) -> PyTree:
  """Computes `function(variables)` without taking a gradient of it.

  JAX cannot take `jax.jvp` through a function with a custom gradient rule, such
  as our convolutions, unless a gradient uses that rule. Here a gradient does
  use it, its result is dropped, and what remains are plain operations.
  """
  return jax.vjp(function, variables)[0]


def contrast(
  features: jax.Array, near: jax.Array, far: jax.Array, temperature: float
) -> jax.Array:
  """Computes -log softmax([cos(e, near), cos(e, far)] / temperature)[0], [B].

  This is MOON's model-contrastive loss per example (arXiv:2103.16257, Eq. 3),
  with e the `features`; all arguments are [B, F].
  """
  chex.assert_equal_shape([features, near, far])
  similarity = lambda other: optax.losses.cosine_similarity(
    features, other, epsilon=1e-12
  )  # epsilon bounds the squared norms
  return jax.nn.softplus((similarity(far) - similarity(near)) / temperature)


def diversity(z: jax.Array, images: jax.Array) -> jax.Array:
  """Computes exp(-mean_ij(mean_d (z_i - z_j)^2 * mean_pixels |x_i - x_j|)).

  This is the diversity term of FedFTG's official code; pairs i = j are
  included. It is small if different noise vectors give different images.

  Args:
    z: [B, noise] noise vectors.
    images: [B, ...] the images generated from them.

  Returns:
    A scalar in (0, 1].
  """
  chex.assert_equal_shape_prefix([z, images], 1)
  z_distance = jnp.mean((z[:, None] - z) ** 2, axis=-1)  # [B, B]
  # With pixels as the first axis, a CPU adds up whole rows of pairs at once.
  flat = images.reshape(len(images), -1).T
  x_distance = jnp.mean(jnp.abs(flat[:, :, None] - flat[:, None]), axis=0)
  return jnp.exp(-jnp.mean(z_distance * x_distance))
