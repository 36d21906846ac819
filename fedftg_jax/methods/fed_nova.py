"""FedNova: normalised averaging for unequal numbers of local steps.

Wang, Liu, Liang, Joshi and Poor, Tackling the Objective Inconsistency Problem
in Heterogeneous Federated Optimization, NeurIPS 2020, arXiv:2007.07481, Eq. 6
with plain SGD: each client's change is divided by its number of steps tau_k,

  w <- w + tau_eff sum_k p_k (w_k - w) / tau_k,   tau_eff = sum_k p_k tau_k.

Deviation: for momentum and for a proximal term the paper's ||a_k||_1 differs
from the number of steps; here it is the number of steps for every local solver.
"""

import jax.numpy as jnp
import optax

from fedftg_jax.base import Method
from fedftg_jax.methods import fed_avg


def fed_nova(
  server_optimizer: optax.GradientTransformation | None = None,
) -> Method:
  """Builds FedNova, the normalised mean; it aggregates.

  Args:
    server_optimizer: see `fed_avg.aggregate`.

  Returns:
    The method. Its message is tau_k, the number of steps that a client has
    taken; a client without a step counts as if it had sent the received model.
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
