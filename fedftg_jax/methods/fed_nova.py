"""FedNova: normalised averaging for unequal numbers of local steps.

Wang, Liu, Liang, Joshi and Poor, Tackling the Objective Inconsistency Problem
in Heterogeneous Federated Optimization, NeurIPS 2020, arXiv:2007.07481, Eq. 6
with plain SGD: a client's change counts per step,

  w <- w + tau_eff sum_k p_k (w_k - w) / tau_k,   tau_eff = sum_k p_k tau_k.

Deviation: the paper's ||a_k||_1 of momentum and of a proximal term differs from
the number of steps; here it is the number of steps whatever the local solver.
"""

import jax.numpy as jnp
import optax

from fedftg_jax.base import Method
from fedftg_jax.methods import fed_avg


def fed_nova(
  server_optimizer: optax.GradientTransformation | None = None,
) -> Method:
  """The normalised mean; it aggregates.

  Args:
    server_optimizer: see `fed_avg.aggregate`.

  Returns:
    The method. Its message is tau_k, the steps that a client has taken; clients
    without a step count as if they had sent what they received.
  """

  def upload(view, local, objective, key):
    del objective, key
    return view.own, local.num_steps

  def summed(sent):
    steps = sent.message.astype(sent.weight.dtype)
    per_step = sent.weight / jnp.maximum(steps, 1)
    return sent.weight * steps, optax.tree.scale(per_step, sent.delta.params)

  def mean(params, received):
    effective, change = received.summed
    return optax.tree.add(params, optax.tree.scale(effective, change))

  return fed_avg.aggregate(mean, server_optimizer)._replace(
    upload=upload, summed=summed
  )
