"""Federated averaging, and server optimisers on top of it.

McMahan et al., Communication-Efficient Learning of Deep Networks from
Decentralized Data, AISTATS 2017, arXiv:1602.05629. With another server
optimiser than SGD of rate 1 it is FedOpt: Reddi et al., Adaptive Federated
Optimization, ICLR 2021, arXiv:2003.00295 (Adam: FedAdam; momentum: FedAvgM).
BatchNorm statistics take the plain weighted mean; server optimisers move
parameters only.
"""

import jax
import jax.numpy as jnp
import optax

from fedftg_jax import trees
from fedftg_jax.base import Info, Method


def fed_avg(
    server_optimizer: optax.GradientTransformation | None = None) -> Method:
  """Weighted mean of the clients' models, as an optimiser's step.

  Args:
    server_optimizer: any optax optimiser, fed with the pseudo-gradient "model
      minus mean of the clients' models". None is SGD of rate 1: the new model
      is the mean.

  Returns:
    The method. It aggregates: a chain has exactly one such part, the first.
  """

  def init(key, variables):
    del key
    if server_optimizer is None:
      return (), ()
    return server_optimizer.init(variables.params), ()

  def update(variables, shared, received, key):
    del key
    mean = trees.weighted_mean(received.models, received.weight)
    if server_optimizer is None:
      return mean, shared, Info()
    pseudo_gradient = jax.tree.map(
        jnp.subtract, variables.params, mean.params)
    updates, shared = server_optimizer.update(
        pseudo_gradient, shared, variables.params)
    params = optax.apply_updates(variables.params, updates)
    return mean._replace(params=params), shared, Info()

  return Method(init=init, update=update)
