"""SCAFFOLD: control variates against client drift.

Karimireddy, Kale, Mohri, Reddi, Stich and Suresh, SCAFFOLD: Stochastic
Controlled Averaging for Federated Learning, ICML 2020, arXiv:1910.06378,
Algorithm 1, in the form of the official FedDyn and FedFTG codes (s_k = N n_k /
sum_j n_j, M steps of size lr):

  client   min CE + <theta, c / s_k - c_k>
  option 1 c_k' = gradient of the client's cross-entropy at w, over all its data
  option 2 c_k' = c_k - c + (w - w_k) / (M lr), lr being `Local.step_size`
  server   c <- c + (1 / N) sum_k s_k (c_k' - c_k)

Deviations: the paper has no s_k, see `by_share` (they are 1 for clients of
equal size; note that c is not divided by s_k in option 2, as in the codes). The
official codes take M = 50 steps for every client, whatever its size
(--local_steps), and an unweighted mean (weighting='uniform', as recipes do).
The paper's server step size is a server optimiser here, optax.sgd(eta_g). The
paper has no momentum; with it the mean step is longer than the learning rate,
and c_k would grow without bound if option 2 divided by the learning rate. Two
defects of the official codes are available as arguments: `learning_rate` and
`untuned_reference`. The control variates cover parameters only.
"""

import jax
import jax.numpy as jnp
import optax

from fedftg_jax import trees
from fedftg_jax.base import Info, Method
from fedftg_jax.data import clients

OPTIONS = (1, 2)


def scaffold(
  option: int = 2,
  learning_rate: float | None = None,
  untuned_reference: bool = False,
  batch_size: int = 50,
  by_share: bool = True,
) -> Method:
  """Builds SCAFFOLD, without the part that aggregates.

  Args:
    option: 1 or 2, how a client updates its control variate.
    learning_rate: lr in option 2; None for the mean step size of the round. The
      official codes use the first round's learning rate in every round, and so
      ignore its decay.
    untuned_reference: whether option 2 compares with the mean before
      fine-tuning instead of the received model, as the official SCAFFOLD with
      FedFTG does. The effect of fine-tuning then leaks into c_k, and the
      reference must be sent, too.
    batch_size: examples in a batch in option 1.
    by_share: whether to use s_k, as the official codes do. Without it s_k is 1
      in the client's term, and the server adds (|S| / N) sum_k p_k (c_k' -
      c_k), p_k being the weights of the models' mean over the |S| clients that
      arrived. With equal weights this is the paper's form.

  Returns:
    The method. Clients keep c_k, the server keeps c (and the reference); c is
    sent down with the model, the change of c_k is sent up.

  Raises:
    ValueError: for a wrong option or learning rate.
  """
  if option not in OPTIONS:
    raise ValueError(f'option must be one of {OPTIONS}, got {option}.')
  if learning_rate is not None and learning_rate <= 0:
    raise ValueError(f'learning_rate must be above 0, got {learning_rate}.')

  def init(key, variables):
    del key
    zero = jax.tree.map(jnp.zeros_like, variables.params)
    return (zero, variables.params if untuned_reference else ()), zero

  def penalty(variables, output, batch, view, key):
    del output, batch, key
    server, _ = view.shared
    share = jnp.where(view.share > 0, view.share, 1) if by_share else 1
    slope = jax.tree.map(lambda c, c_k: c / share - c_k, server, view.own)
    return optax.tree.vdot(variables.params, slope)

  def full_gradient(view, objective, key):
    def gradient(batch):
      return jax.grad(
        lambda params: (
          objective.loss(view.received._replace(params=params), batch, key)[
            1
          ].cross_entropy
        )
      )(view.received.params)

    return clients.mean_over_examples(gradient, view.data, batch_size)

  def mean_step(view, local):
    server, reference = view.shared
    if not untuned_reference:
      reference = view.received.params
    rate = local.step_size if learning_rate is None else learning_rate
    length = local.num_steps * rate
    length = jnp.where(length > 0, length, 1)
    return jax.tree.map(
      lambda c_k, c, w, w_k: c_k - c + (w - w_k) / length,
      view.own,
      server,
      reference,
      local.variables.params,
    )

  def upload(view, local, objective, key):
    own = (
      full_gradient(view, objective, key)
      if option == 1
      else mean_step(view, local)
    )
    own = trees.where(local.num_steps > 0, own, view.own)
    return own, optax.tree.sub(own, view.own)

  def update(variables, shared, received, key):
    del key
    server, reference = shared
    arrived = 1 if by_share else jnp.sum(received.arrived)
    server = optax.tree.add(
      server, optax.tree.scale(arrived / received.num_clients, received.summed)
    )
    if untuned_reference:
      reference = variables.params
    return variables, (server, reference), Info()

  return Method(
    init=init,
    broadcast=lambda shared: shared,
    penalty=penalty,
    upload=upload,
    summed=lambda sent: optax.tree.scale(
      sent.share if by_share else sent.weight, sent.message
    ),
    update=update,
  )
