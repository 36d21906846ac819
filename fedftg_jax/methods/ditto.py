"""Ditto: each client also trains a personal model near the common one.

Li, Hu, Beirami and Smith, Ditto: Fair and Robust Federated Learning Through
Personalization, ICML 2021, arXiv:2012.04221, Eq. 2 and Algorithm 1: with w the
received model, client k's own model v_k minimises

  f_k(v) + lambda / 2 ||v - w||^2

starting from where it stopped. w is trained and averaged as without Ditto. Both
trainings take the solver's steps, on the same batches (the paper leaves v_k's
number of steps open). f_k is the cross-entropy: what other parts of a chain add
to w's objective is not v_k's. Nothing is sent besides the model.
"""

import jax.numpy as jnp
import optax

from fedftg_jax import trees
from fedftg_jax.base import Method, Model, Personal


def ditto(model: Model, lam: float = 0.1) -> Method:
  """Builds Ditto: personal models that are pulled towards the received model.

  Args:
    model: the classifier.
    lam: lambda, how strongly a personal model is pulled; 0 trains it alone.

  Returns:
    The method. A client's slot is its personal model, which is the initial
    model before its first round.

  Raises:
    ValueError: for a negative lam.
  """
  if lam < 0:
    raise ValueError(f'lam must be at least 0, got {lam}.')

  def train(inner, objective, view, key):
    del key
    anchor = view.received.params

    def loss(variables, batch, key):
      _, aux = objective.loss(variables, batch, key)
      away = optax.tree.sub(variables.params, anchor)
      pull = lam / 2 * optax.tree.norm(away, squared=True)
      return aux.cross_entropy + pull, aux

    own = inner(
      objective._replace(loss=loss, decay=jnp.zeros_like(objective.decay)),
      view._replace(variables=view.own),
    )
    own = trees.where(own.num_steps > 0, own.variables, view.own)
    return inner(objective, view), own

  return Method(
    init=lambda key, variables: ((), variables),
    train=train,
    personal=lambda view: {'ditto': Personal(model.apply, view.own)},
  )
