"""MOON: a contrastive term between received, previous and current features.

Li, He and Song, Model-Contrastive Federated Learning, CVPR 2021,
arXiv:2103.16257, Eq. 3: the local objective gains

  mu * -log( exp(cos(e, e_glob) / tau)
             / (exp(cos(e, e_glob) / tau) + exp(cos(e, e_prev) / tau)) )

with e the features of the model in training, e_glob those of the received model
and e_prev those of the client's last model, both frozen and in eval mode. It
draws features towards the received model's and away from the last local
model's. In its first round a client has no last model, and the term is 0 (as in
the official codes). Features are the input of the last layer: the projected
embedding if the model has a projection head (the paper;
`models.build(projection_dim=...)`), else the pooled features (the official
FedFTG code).
"""

import jax.numpy as jnp

from fedftg_jax import losses, models
from fedftg_jax.base import Method, Model


def moon(model: Model, mu: float = 0.5, tau: float = 5.0) -> Method:
  """Builds MOON, the model-contrastive term.

  Args:
    model: the classifier.
    mu: weight of the term (the official FedFTG scripts use .5; MOON's paper is
      recalled to use 1 to 10, unverified).
    tau: temperature (5 in those scripts; the paper is recalled to use .5,
      unverified).

  Returns:
    The method. A client keeps its last model and whether it has one.

  Raises:
    ValueError: for a negative mu, a temperature that is not positive, or a
      model without features.
  """
  models.need(model, 'features', 'moon')
  if mu < 0:
    raise ValueError(f'mu must be at least 0, got {mu}.')
  if tau <= 0:
    raise ValueError(f'tau must be above 0, got {tau}.')

  def init(key, variables):
    del key
    return (), (variables, jnp.zeros((), bool))

  def penalty(variables, output, batch, view, key):
    del key
    previous, seen = view.own
    # `frozen` takes no gradient of them. `stop_gradient` would also hide them
    # from a `jax.jvp` of the round.
    near, far = (
      losses.frozen(lambda v: model.apply(v, batch.x).features, variables)
      for variables in (view.received, previous)
    )
    contrast = losses.contrast(output.features, near, far, tau)
    return mu * seen * losses.masked_mean(contrast, batch.mask)

  def upload(view, local, objective, key):
    del view, objective, key
    return (local.variables, jnp.ones((), bool)), ()

  return Method(init=init, penalty=penalty, upload=upload)
