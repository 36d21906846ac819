"""FedProx: a proximal term keeps local models near the received model.

Li, Sahu, Zaheer, Sanjabi, Talwalkar and Smith, Federated Optimization in
Heterogeneous Networks, MLSys 2020, arXiv:1812.06127, Eq. 2: the local objective
gains mu / 2 ||theta - w||^2.

Optional deviation: the official FedFTG repository's "FedProx" adds mu to the
weight decay instead and so pulls towards zero (`to_zero`). Its server adds mu
to the student's weight decay, too, which `configuration.assembly` does.
"""

import optax

from fedftg_jax.base import Method


def fed_prox(mu: float = 1e-4, to_zero: bool = False) -> Method:
  """Builds FedProx; its gradient is clipped together with that of the loss.

  Args:
    mu: weight of the proximal term.
    to_zero: whether to pull towards zero instead, as the official FedFTG code
      does: mu is added to the weight decay, also to that of a student on the
      server.

  Returns:
    The method; it keeps no state.

  Raises:
    ValueError: for a negative mu.
  """
  if mu < 0:
    raise ValueError(f'mu must be at least 0, got {mu}.')
  if to_zero:
    return Method(decay=lambda view: mu)

  def penalty(variables, output, batch, view, key):
    del output, batch, key
    distance = optax.tree.sub(variables.params, view.received.params)
    return mu / 2 * optax.tree.norm(distance, squared=True)

  return Method(penalty=penalty)
