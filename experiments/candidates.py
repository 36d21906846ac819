"""Compares FedFTG with one candidate changed: FTG_CANDIDATE=NAME, flags of compare.

These are trials of docs/when_it_pays.md, "What was tried to make it last".
"""

import os

import jax
import jax.numpy as jnp
import optax

from fedftg_jax import distillation, losses
from fedftg_jax.base import Generator, Variables
from fedftg_jax.methods import diagnostics, fed_ftg
from fedftg_jax.programs import command

name, _, number = os.environ.get('FTG_CANDIDATE', '').partition(':')
number = float(number or 1)
plain_fine_tune, plain_fed_ftg = fed_ftg.fine_tune, fed_ftg.fed_ftg
plain_distil, plain_of_images = distillation.distil, diagnostics.of_images


def pair(generator):
  """Makes two generators into one: each makes half of a batch.

  The diversity term pushes the images of all pairs apart, so also those of the
  two generators.
  """

  def init(key):
    both = [generator.init(k) for k in jax.random.split(key)]
    return jax.tree.map(lambda *a: jnp.stack(a), *both)

  def apply(made, z, labels, train=False):
    half = len(z) // 2
    parts = slice(None, half), slice(half, None)
    images, stats = zip(
      *(
        generator.apply(
          jax.tree.map(lambda a, i=i: a[i], made), z[p], labels[p], train=train
        )
        for i, p in enumerate(parts)
      ),
      strict=True,
    )
    return jnp.concatenate(images), jax.tree.map(
      lambda *a: jnp.stack(a), *stats
    )

  return Generator(init, apply, generator.noise_dim)


def entropy_temperatures(counts):
  """Returns log C / H(n_k) of each teacher, in [1, 5]: few classes, hot."""
  shares = counts / jnp.maximum(jnp.sum(counts, 1, keepdims=True), 1)
  heat = -jnp.sum(shares * jnp.log(shares + 1e-12), axis=1)
  return jnp.clip(jnp.log(counts.shape[1]) / (heat + 1e-6), 1, 5)


def fine_tune(
  model, generator, student, made, teachers, counts, *rest, terms, **kwargs
):
  """Runs the server step with the candidate."""
  ensemble, classes = terms.ensemble, counts.shape[1]
  if name == 'temperature':
    hot = entropy_temperatures(counts)[:, None, None]
    terms = terms._replace(ensemble=lambda l, a: ensemble(l / hot, a))
  if name == 'prior':
    prior = jnp.log(counts + number) - jnp.log(
      jnp.sum(counts, 1, keepdims=True) + number * classes
    )
    terms = terms._replace(
      ensemble=lambda l, a: ensemble(l - prior[:, None, :], a)
    )
  if name == 'features':
    distance = terms.distance

    def joined(logits, a):
      kept = jnp.einsum('kbf,kb->bf', logits[..., classes:], a)
      return jnp.concatenate([ensemble(logits[..., :classes], a), kept], 1)

    def both(logits, target):
      error = logits[:, classes:] - target[:, classes:]
      return distance(
        logits[:, :classes], target[:, :classes]
      ) + number * jnp.mean(jnp.square(error))

    terms = terms._replace(ensemble=joined, distance=both)

    def with_features(plain):
      def apply(*args, **kwargs):
        output = plain.apply(*args, **kwargs)
        return output._replace(
          logits=jnp.concatenate([output.logits, output.features], 1)
        )

      return plain._replace(apply=apply)

    def teacher_outputs(model, teachers, x):
      return losses.frozen(
        lambda t: distillation.teacher_logits(with_features(model), t, x),
        teachers,
      )

    distillation.frozen_logits = teacher_outputs
    distillation.distil = lambda model, *a, **k: plain_distil(
      with_features(model), *a, **k
    )
    diagnostics.of_images = lambda target, *a: plain_of_images(
      target[:, :classes], *a
    )
  if name in ('gap', 'disagree'):

    def distil(model, student, optimizer, loss, examples, steps, **kwargs):
      images, target = examples(0)
      before = losses.frozen(lambda v: model.apply(v, images).logits, student)
      if name == 'disagree':  # only images on which the answers differ
        differ = jnp.argmax(before, 1) != jnp.argmax(target, 1)
        weight = differ / jnp.maximum(jnp.sum(differ), 1)
        examples = lambda i: (images, target * weight[:, None] * len(target))
      tuned, values = plain_distil(
        model, student, optimizer, loss, examples, steps, **kwargs
      )
      if name == 'gap':  # a shorter step where the gap is below `number`
        gap = diagnostics.kl_from_target(diagnostics.normalised(target), before)
        share = jnp.clip(gap / number, 0, 1)
        tuned = jax.tree.map(lambda a, b: a + share * (b - a), student, tuned)
      return tuned, values

    distillation.distil = distil
  return plain_fine_tune(
    model,
    generator,
    student,
    made,
    teachers,
    counts,
    *rest,
    terms=terms,
    **kwargs,
  )


def with_candidate(model, generator, *args, **kwargs):
  """Builds FedFTG with the candidate."""
  if name == 'pair':
    generator = pair(generator)
  return plain_fed_ftg(model, generator, *args, **kwargs)


fed_ftg.fine_tune, fed_ftg.fed_ftg = fine_tune, with_candidate

if __name__ == '__main__':
  command.launch('compare')
