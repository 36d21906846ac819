"""Adds the broadcast model as one more teacher to any part that distils.

This is our own and from no paper. Under partial participation the clients of a
round know nothing of classes that only absent clients have. The broadcast model
knows them from earlier rounds; it joins the teachers with the class counts of
those rounds, discounted. If cohorts are alike, its share of a class's weight is
about the discount; for a class that the cohort lacks, it has all the weight.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedftg_jax.base import Method, PyTree


class Slot(NamedTuple):
  """The server's slot of `remembering`."""

  inner: PyTree  # slot of the part that it wraps
  past: jax.Array  # [C] discounted class counts of earlier rounds


def remembering(part: Method, num_classes: int, decay: float) -> Method:
  """Adds the broadcast model to the teachers of `part`, as the last of them.

  Args:
    part: a method whose `stacked` is (models, class counts), such as `fed_ftg`
      and `fed_df`.
    num_classes: C.
    decay: discount of the class counts per round.

  Returns:
    The method. The server's slot of `part` is `Slot.inner`.

  Raises:
    ValueError: for a decay outside [0, 1).
  """
  if not 0 <= decay < 1:
    raise ValueError(f'memory must be at least 0 and below 1, got {decay}.')

  def init(key, variables):
    inner, own = part.init(key, variables)
    return Slot(inner, jnp.zeros(num_classes)), own

  def update(variables, shared, received, key):
    teachers, counts = received.stacked
    past = jnp.round(shared.past).astype(counts.dtype)
    teachers, counts_of_all, arrived = jax.tree.map(
      lambda cohort, one: jnp.concatenate([cohort, one[None]]),
      (teachers, counts, received.arrived),
      (received.broadcast, past, jnp.any(past)),
    )
    variables, inner, info = part.update(
      variables,
      shared.inner,
      received._replace(stacked=(teachers, counts_of_all), arrived=arrived),
      key,
    )
    past = decay * (shared.past + jnp.sum(counts, axis=0))
    return variables, Slot(inner, past), info

  return part._replace(
    init=init,
    update=update,
    broadcast=lambda shared: part.broadcast(shared.inner),
    send=lambda variables, shared, *args: part.send(
      variables, shared.inner, *args
    ),
    models=lambda shared: part.models(shared.inner),
    synthesise=part.synthesise
    and (lambda shared, *args: part.synthesise(shared.inner, *args)),  # type: ignore[misc]
  )
