"""FedLSD: distillation of the received model's logits for all classes.

Lee, Jeong, Shin, Bae and Yun, the first version of arXiv:2106.03097 (FedNTD's
paper), local self-distillation. To the cross-entropy CE it adds

  LSD = tau^2 * mean_b KL(softmax(g / tau) || softmax(s / tau)),

with s the logits of the model in training and g those of the received model
(frozen, in eval mode). There is no official code. The form of the sum and tau
are recalled from the paper, unverified: CE + beta LSD ('additive') or (1 -
beta) CE + beta LSD ('convex'). Nothing is sent besides the model, and nothing
is kept.
"""

from typing import Literal, get_args

from fedftg_jax import losses
from fedftg_jax.base import Method, Model

Mix = Literal['additive', 'convex']


def fed_lsd(
  model: Model, beta: float = 1.0, tau: float = 1.0, mix: Mix = 'additive'
) -> Method:
  """Builds FedLSD: self-distillation from the received model.

  Args:
    model: the classifier.
    beta: weight of the distillation; at most 1 if the mix is convex.
    tau: temperature.
    mix: 'additive', CE + beta LSD, or 'convex', (1 - beta) CE + beta LSD.

  Returns:
    The method.

  Raises:
    ValueError: for a weight or a temperature out of range, or another mix.
  """
  losses.check_distillation(beta, tau)
  if mix not in get_args(Mix):
    raise ValueError(f'mix must be one of {get_args(Mix)}, got {mix!r}.')
  if mix == 'convex' and beta > 1:
    raise ValueError(f'beta must be at most 1 in a convex mix, got {beta}.')

  def penalty(variables, output, batch, view, key):
    del variables, key
    received = losses.frozen(
      lambda v: model.apply(v, batch.x).logits, view.received
    )
    divergence = losses.tempered_divergence(output.logits, received, tau)
    distillation = losses.masked_mean(divergence, batch.mask)
    if mix == 'additive':
      return beta * distillation
    return beta * (
      distillation - losses.cross_entropy(output.logits, batch.y, batch.mask)
    )

  return Method(penalty=penalty)
