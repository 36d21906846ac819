"""q-FedAvg: fair weighting, in which clients with a larger loss count more.

Li, Sanjabi, Beirami and Smith, Fair Resource Allocation in Federated Learning,
ICLR 2020, arXiv:1905.10497, Algorithm 2. The objective is sum_k p_k F_k^(q + 1)
/ (q + 1). With F_k the loss of the received model on the client's data, d_k =
w_k - w and L = 1 / learning rate (`Local.step_size`),

  w <- w + sum_k p_k F_k^q d_k / sum_k p_k (q F_k^(q - 1) L ||d_k||^2 + F_k^q).

Deviation: the paper draws clients with probability p_k and adds their terms
unweighted; here the schedule draws the clients, and the federation's weights
are p_k. q = 0 is FedAvg.
"""

import jax.numpy as jnp
import optax

from fedftg_jax import losses
from fedftg_jax.base import Method
from fedftg_jax.data import clients
from fedftg_jax.methods import fed_avg

_SMALLEST_LOSS = 1e-10


def q_fed_avg(
  q: float = 1.0,
  server_optimizer: optax.GradientTransformation | None = None,
  batch_size: int = 50,
) -> Method:
  """Builds q-FedAvg, the fair mean; it aggregates.

  Args:
    q: fairness: how much more a client with a larger loss counts; 0 is FedAvg.
    server_optimizer: see `fed_avg.aggregate`.
    batch_size: examples in a batch when a client's loss is computed.

  Returns:
    The method. Its message is F_k^q and the client's term of the denominator.

  Raises:
    ValueError: for a negative q.
  """
  if q < 0:
    raise ValueError(f'q must be at least 0, got {q}.')

  def upload(view, local, objective, key):
    def cross_entropy(batch):
      return losses.frozen(
        lambda v: objective.loss(v, batch, key)[1].cross_entropy, view.received
      )

    loss = jnp.maximum(
      _SMALLEST_LOSS,
      clients.mean_over_examples(cross_entropy, view.data, batch_size),
    )
    change = optax.tree.sub(local.variables.params, view.received.params)
    rate = jnp.where(local.step_size > 0, local.step_size, 1)
    curvature = optax.tree.norm(change, squared=True) / rate
    return view.own, (loss**q, q * loss ** (q - 1) * curvature + loss**q)

  def summed(sent):
    fair, denominator = sent.message
    return (
      optax.tree.scale(sent.weight * fair, sent.delta.params),
      sent.weight * denominator,
    )

  def mean(params, received):
    change, denominator = received.summed
    return optax.tree.add(
      params,
      optax.tree.scale(1 / jnp.maximum(denominator, _SMALLEST_LOSS), change),
    )

  return fed_avg.aggregate(mean, server_optimizer)._replace(
    upload=upload, summed=summed
  )
