"""Evaluates a running average of the broadcast models beside the last of them.

Averages of iterates are due to Polyak and Juditsky (SIAM J. Control Optim.,
1992); this one discounts earlier rounds, and is divided by its weights as in
Adam (Kingma and Ba, ICLR 2015). Clients never see it: the training is the same
to the byte, with it or without.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedftg_jax.base import Info, Method, Variables


class Slot(NamedTuple):
  """The server's slot of `running_average`."""

  average: Variables  # the initial model before the first round
  weight: jax.Array  # [] 1 - d^t


def running_average(decay: float = 0.9) -> Method:
  """Builds the part; it comes after all parts that change the model.

  After t rounds with models w_1 to w_t, the average is
  sum_i d^(t - i) w_i / sum_i d^(t - i). Rounds in which no client arrived do
  not count. It is evaluated as 'running_average'.

  Args:
    decay: d, discount per round of earlier models in the average.

  Returns:
    The method.

  Raises:
    ValueError: for a decay outside [0, 1).
  """
  if not 0 <= decay < 1:
    raise ValueError(f'decay must be at least 0 and below 1, got {decay}.')

  def init(key, variables):
    del key
    return Slot(variables, jnp.zeros(())), ()

  def update(variables, shared, received, key):
    del received, key
    weight = decay * shared.weight + (1 - decay)
    share = (1 - decay) / weight  # of the new model
    average = jax.tree.map(
      lambda old, new: old + share * (new - old), shared.average, variables
    )
    return variables, Slot(average, weight), Info()

  return Method(
    init=init,
    update=update,
    models=lambda shared: {'running_average': shared.average},
  )
