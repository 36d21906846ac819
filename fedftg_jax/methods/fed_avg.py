"""FedAvg: federated averaging, with server optimisers on top of any mean.

McMahan et al., Communication-Efficient Learning of Deep Networks from
Decentralized Data, AISTATS 2017, arXiv:1602.05629. With a server optimiser
other than SGD of rate 1 it is FedOpt: Reddi et al., Adaptive Federated
Optimization, ICLR 2021, arXiv:2003.00295 (optax.adam: FedAdam; yogi: FedYogi;
adagrad: FedAdagrad; momentum: FedAvgM, Hsu et al., arXiv:1909.06335). BatchNorm
statistics are the plain weighted mean; server optimisers update the parameters
only.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fedftg_jax.base import Info, Method, Variables


def fed_avg(
  server_optimizer: optax.GradientTransformation | None = None,
) -> Method:
  """Builds FedAvg: the weighted mean of the clients' models.

  Args:
    server_optimizer: see `aggregate`.

  Returns:
    The method. It aggregates: a chain has exactly one such part, the first.
  """

  def mean(params, received):
    del params
    return received.average.params

  return aggregate(mean, server_optimizer)


def aggregate(
  mean: Callable, server_optimizer: optax.GradientTransformation | None = None
) -> Method:
  """Builds an aggregating method from a rule that averages the clients' models.

  Args:
    mean: (params, received) -> params, the average of the received models.
    server_optimizer: any optax optimiser; its gradient is the pseudo-gradient
      "model minus `mean`". None is SGD of rate 1: the new model is the mean.

  Returns:
    The method; its server slot is the optimiser's state.
  """

  def init(key, variables):
    del key
    if server_optimizer is None:
      return (), ()
    return server_optimizer.init(variables.params), ()

  def update(variables, shared, received, key):
    del key
    params = mean(variables.params, received)
    if server_optimizer is not None:
      pseudo_gradient = jax.tree.map(jnp.subtract, variables.params, params)
      updates, shared = server_optimizer.update(
        pseudo_gradient, shared, variables.params
      )
      params = optax.apply_updates(variables.params, updates)
    return Variables(params, received.average.stats), shared, Info()

  return Method(init=init, update=update, aggregates=True)
