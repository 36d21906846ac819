"""Compares FedFTG with kept models of earlier clients as teachers.

KEPT=R python -m experiments.candidates, flags of compare. A trial of
docs/when_it_pays.md, "What was tried to make it last". The models of the
clients of the last R rounds are teachers for the classes that the clients of
the round lack; they take the place of the broadcast model (`remembering`).
"""

import os

import jax
import jax.numpy as jnp

from fedftg_jax import recipes
from fedftg_jax.methods import remembering as remembering_lib
from fedftg_jax.programs import command

ROUNDS, COHORT = int(os.environ.get('KEPT', '2')), 5
ALWAYS = bool(os.environ.get('ALWAYS'))  # for all classes, discounted


def kept(part, num_classes, decay):
  """Adds the models of the last rounds' clients to the teachers of `part`."""
  num = ROUNDS * COHORT

  def init(key, variables):
    inner, own = part.init(key, variables)
    models = jax.tree.map(lambda a: jnp.stack([a] * num), variables)
    return (inner, models, jnp.zeros((num, num_classes), jnp.int32)), own

  def update(variables, shared, received, key):
    inner, models, past = shared
    teachers, counts = received.stacked
    here = received.arrived[:, None] * counts
    if ALWAYS:
      ages = jnp.arange(num) // COHORT + 1
      old = jnp.round(past * decay ** ages[:, None]).astype(counts.dtype)
    else:
      old = past * (jnp.sum(here, axis=0) == 0)
    join = lambda new, before: jnp.concatenate([new, before])
    variables, inner, info = part.update(
      variables,
      inner,
      received._replace(
        stacked=(jax.tree.map(join, teachers, models), join(counts, old)),
        arrived=join(received.arrived, jnp.any(old > 0, axis=1)),
      ),
      key,
    )
    models, past = jax.tree.map(
      lambda new, before: join(new, before)[:num],
      (teachers, here.astype(past.dtype)),
      (models, past),
    )
    return variables, (inner, models, past), info

  return part._replace(
    init=init,
    update=update,
    broadcast=lambda shared: part.broadcast(shared[0]),
    send=lambda variables, shared, *args: part.send(
      variables, shared[0], *args
    ),
    models=lambda shared: part.models(shared[0]),
    synthesise=part.synthesise
    and (lambda shared, *args: part.synthesise(shared[0], *args)),
  )


if ROUNDS:
  remembering_lib.remembering = kept

if __name__ == '__main__':
  command.launch('compare')
