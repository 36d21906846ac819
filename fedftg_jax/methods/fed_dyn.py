"""FedDyn: dynamic regularisation that aligns local and global optima.

Acar, Zhao, Navarro, Mattina, Whatmough and Saligrama, Federated Learning Based
on Dynamic Regularization, ICLR 2021, arXiv:2111.04263. With h_k = -(the paper's
gradient memory) / alpha, a_k = alpha / s_k and s_k = N n_k / sum_j n_j, as in
the official code:

  client   min CE + a_k <theta, h_k - w> + a_k / 2 ||theta||^2   (w as received)
           h_k <- h_k + w_k - w
  server   w <- mean_k w_k + (1 / N) sum over ALL clients of h_k

The quadratic term is added to the weight decay, which is not clipped; the
linear term is clipped with the gradient. The official mean over the cohort is
unweighted: build the federation with weighting='uniform' (recipes do).
BatchNorm statistics are the plain mean, without correction.
"""

import jax
import jax.numpy as jnp
import optax

from fedftg_jax.base import Info, Method


def fed_dyn(alpha: float = 0.01) -> Method:
  """Builds FedDyn, which corrects the mean after the part that aggregates.

  Args:
    alpha: weight of the regulariser, divided by the clients' relative sizes.

  Returns:
    The method. A client keeps h_k; the server keeps the mean of all h_k, which
    it computes from the changes that clients send anyway: there is no message.

  Raises:
    ValueError: for a negative alpha.
  """
  if alpha < 0:
    raise ValueError(f'alpha must be at least 0, got {alpha}.')

  def strength(view):  # a_k; a client without examples takes no step
    return alpha / jnp.where(view.share > 0, view.share, 1)

  def init(key, variables):
    del key
    zero = jax.tree.map(jnp.zeros_like, variables.params)
    return zero, zero

  def penalty(variables, output, batch, view, key):
    del output, batch, key
    slope = optax.tree.sub(view.own, view.received.params)
    return strength(view) * optax.tree.vdot(variables.params, slope)

  def upload(view, local, objective, key):
    del objective, key
    change = optax.tree.sub(local.variables.params, view.received.params)
    return optax.tree.add(view.own, change), ()

  def update(variables, shared, received, key):
    del key
    shared = optax.tree.add(
      shared, optax.tree.scale(1 / received.num_clients, received.summed)
    )
    if not alpha:  # without a regulariser the mean needs no correction
      return variables, shared, Info()
    params = optax.tree.add(variables.params, shared)
    return variables._replace(params=params), shared, Info()

  return Method(
    init=init,
    penalty=penalty,
    decay=strength,
    upload=upload,
    summed=lambda sent: sent.delta.params,
    update=update,
  )
