"""FedNova: normalised averaging for unequal numbers of local steps.

Wang, Liu, Liang, Joshi and Poor, Tackling the Objective Inconsistency Problem
in Heterogeneous Federated Optimization, NeurIPS 2020, arXiv:2007.07481, Eq. 6
with tau_eff = sum_k p_k ||a_k||_1:

  w <- w + sum_k p_k ||a_k||_1  sum_k p_k (w_k - w) / ||a_k||_1.

||a_k||_1 is how far client k's steps move its model per unit of a constant
gradient: its number of steps, with momentum more (`Local.step_size`). All is
counted in learning rates here, which cancel.

Deviation: a proximal term makes the paper's ||a_k||_1 smaller. Here it does
not.
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
    The method. Its message is ||a_k||_1 times the learning rate. A client
    without a step counts as if it had sent the received model.
  """

  def upload(view, local, objective, key):
    del objective, key
    return view.own, local.num_steps * local.step_size

  def summed(sent):
    reach = sent.message
    each = sent.weight / jnp.where(reach > 0, reach, 1)
    return sent.weight * reach, optax.tree.scale(each, sent.delta.params)

  def mean(params, received):
    effective, change = received.summed  # tau_eff, and the mean
    return optax.tree.add(params, optax.tree.scale(effective, change))

  return fed_avg.aggregate(mean, server_optimizer)._replace(
    upload=upload, summed=summed
  )
