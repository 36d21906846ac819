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

  total: Variables  # (1 - d) sum_i d^(t - i) w_i
  weight: jax.Array  # [] 1 - d^t


def running_average(decay: float = 0.9) -> Method:
  """Builds the part; it comes after all parts that change the model.

  After t rounds with models w_1 to w_t, the average is
  sum_i d^(t - i) w_i / sum_i d^(t - i). Rounds in which no client arrived do
  not count. `Info.models` has it as 'running_average'.

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
    return Slot(jax.tree.map(jnp.zeros_like, variables), jnp.zeros(())), ()

  def update(variables, shared, received, key):
    del received, key
    total, weight = jax.tree.map(
      lambda old, new: decay * old + (1 - decay) * new,
      shared,
      Slot(variables, jnp.ones(())),
    )
    average = jax.tree.map(lambda leaf: leaf / weight, total)
    return (
      variables,
      Slot(total, weight),
      Info(models={'running_average': average}),
    )

  return Method(init=init, update=update)
