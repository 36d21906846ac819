"""Diagnostics of distillation on generated images, as functions of arrays."""

import jax
import jax.numpy as jnp
import optax

from fedftg_jax import distillation
from fedftg_jax.base import Variables


def label_probability(target: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns the probability [B] that the ensemble gives each image's label.

  Args:
    target: [B, C], rows of any sum, such as those of an ensemble whose weights
      do not sum to 1.
    labels: [B].
  """
  return jnp.take_along_axis(normalised(target), labels[:, None], axis=1)[:, 0]


def normalised(target: jax.Array) -> jax.Array:
  """Scales the rows of `target` [B, C] so that they sum to 1."""
  return target / jnp.maximum(jnp.sum(target, axis=1, keepdims=True), 1e-6)


def entropy(target: jax.Array) -> jax.Array:
  """Computes the entropy [B] of each row of probabilities [B, C], in nats."""
  return -jnp.sum(target * jnp.log(target + 1e-12), axis=1)


def kl_from_target(target: jax.Array, logits: jax.Array) -> jax.Array:
  """Computes the mean over the batch of KL(target || softmax(logits)).

  Args:
    target: [B, C] probabilities.
    logits: [B, C].
  """
  cross_entropy = -jnp.sum(target * jax.nn.log_softmax(logits), axis=1)
  return jnp.mean(cross_entropy - entropy(target))


def relative_distance(tree, origin) -> jax.Array:
  """Computes the norm of `tree` - `origin` divided by the norm of `origin`."""
  norm = optax.tree.norm(origin)
  return optax.tree.norm(optax.tree.sub(tree, origin)) / jnp.maximum(
    norm, 1e-12
  )


def of_images(
  target: jax.Array, labels: jax.Array, before: jax.Array, after: jax.Array
) -> dict[str, jax.Array]:
  """Measures how ensemble and student classify one iteration's images.

  Args:
    target: [B, C] the ensemble's probabilities.
    labels: [B] the labels that the images were generated for.
    before: [B, C] logits of the student before its steps.
    after: [B, C] logits of the student after them.

  Returns:
    Means over the batch: 'recognised', the ensemble's probability of the label;
    'ensemble_ce' and 'ensemble_entropy', the ensemble's cross-entropy with the
    label and its entropy; 'gap' and 'gap_left', KL(ensemble || student) before
    and after the student's steps.
  """
  of_label, target = label_probability(target, labels), normalised(target)
  return {
    'recognised': jnp.mean(of_label),
    'ensemble_ce': -jnp.mean(jnp.log(of_label + 1e-12)),
    'ensemble_entropy': jnp.mean(entropy(target)),
    'gap': kl_from_target(target, before),
    'gap_left': kl_from_target(target, after),
  }


def per_teacher(terms) -> tuple[str, ...]:
  """Returns the names of FedFTG's generator losses with an axis of teachers."""
  return ('cls', 'dis') + (() if terms.discrepancy is None else ('md',))


def of_round(
  by_name: dict[str, jax.Array],
  arrived: jax.Array,
  before: Variables,
  after: Variables,
) -> dict[str, jax.Array]:
  """Averages the results of `fed_ftg.fine_tune` over a round.

  Args:
    by_name: losses and measures, [I, ...]; 'md', 'cls', 'dis' [I, I_g, K].
    arrived: [K] bool, the teachers that count.
    before: the student before fine-tuning.
    after: the student after it.

  Returns:
    Scalars: each mean, and 'moved', the relative distance by which the
    parameters moved ('stats_moved' for BatchNorm statistics, if there are any).
  """
  present = distillation.present(arrived)
  means = {
    name: jnp.mean(value @ present if name in ('md', 'cls', 'dis') else value)
    for name, value in by_name.items()
  }
  means['moved'] = relative_distance(after.params, before.params)
  if jax.tree.leaves(before.stats):
    means['stats_moved'] = relative_distance(after.stats, before.stats)
  return means
