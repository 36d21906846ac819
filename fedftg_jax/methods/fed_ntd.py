"""FedNTD: distillation of the received model's logits for all other classes.

Lee, Jeong, Shin, Bae and Yun, Preservation of the Global Knowledge by Not-True
Distillation in Federated Learning, NeurIPS 2022, arXiv:2106.03097. The local
objective gains

  beta * tau^2 * mean_b KL(softmax(g_-y / tau) || softmax(s_-y / tau))

with s the logits of the model in training, g those of the received model
(frozen, in eval mode), and -y all classes but the label. Nothing is sent
besides the model, and nothing is kept.
"""

from fedftg_jax import losses
from fedftg_jax.base import Method, Model


def fed_ntd(model: Model, beta: float = 1.0, tau: float = 1.0) -> Method:
  """Builds FedNTD: not-true distillation from the received model.

  Args:
    model: the classifier.
    beta: weight of the distillation.
    tau: temperature (1 in the official configuration, 3 in its class).

  Returns:
    The method.

  Raises:
    ValueError: for a negative weight or a temperature that is not positive.
  """
  losses.check_distillation(beta, tau)

  def penalty(variables, output, batch, view, key):
    del variables, key
    received = losses.frozen(
      lambda v: model.apply(v, batch.x).logits, view.received
    )
    divergence = losses.not_true_divergence(
      output.logits, received, batch.y, tau
    )
    return beta * losses.masked_mean(divergence, batch.mask)

  return Method(penalty=penalty)
