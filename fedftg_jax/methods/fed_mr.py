"""FedMR: K models on the server, recombined layer by layer in every round.

Layer-wise model recombination, KDD 2024, arXiv:2305.10730 (its first form is
arXiv:2208.07677); not the method for manifold reshaping that has the same name.
Each of K models is trained by one client of the round. Then, independently for
every layer l,

  w_i^l <- w_pi(i)^l   with a random permutation pi of the K models.

The plain, unweighted mean of the models is broadcast: it is deployed and
evaluated, but no client trains it. Recombination does not change it. Before
round `first_rounds` all models become their mean instead, which is FedAvg with
uniform weights: bit for bit, if the federation weights clients uniformly and
all of them arrive.

A client gets the model of its position in the cohort; after uniform
permutations that is a random one. The model of a client that does not arrive
stays, and counts in the mean (the official code has no such clients). Parts
that refine the mean move every model by the same amount as the mean.
"""

import math
import re
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from fedftg_jax import trees
from fedftg_jax.base import Info, Method, PyTree, Variables

Unit = Literal['leaf', 'module']
# The norm after a convolution belongs to the convolution's module. The two are
# siblings or nested.
_WITHIN = re.compile(r'/(conv|linear|norm|batch|group)$')


class Slot(NamedTuple):
  """The server's slot of FedMR."""

  models: Variables  # every leaf [K, ...]
  mean: Variables  # their mean, before other parts moved it


def fed_mr(
  cohort: int, first_rounds: int = 0, unit: Unit = 'leaf', segment: float = 0.0
) -> Method:
  """Builds FedMR, model recombination; it aggregates.

  Args:
    cohort: K, the number of clients in every round.
    first_rounds: number of rounds of plain averaging before recombination
      begins (0 in the official code; its README has 50 or 100 for VGG).
    unit: what is permuted as one: an array ('leaf', the official code) or all
      arrays of a layer with its norm ('module', a reading of the paper).
    segment: share of consecutive units that use the same permutation: 0 for one
      permutation per unit, 1 for a single one, which exchanges whole models.

  Returns:
    The method. Its server slot has the K models. Info has 'fed_mr/spread', the
    sum over the models of their squared distance from the mean, in the
    parameters; recombination does not change it.

  Raises:
    ValueError: for a number out of range or another unit; in the first round,
      if its cohort has another size.
  """
  if cohort < 1 or first_rounds < 0 or not 0 <= segment <= 1:
    raise ValueError(
      'cohort must be at least 1, first_rounds at least 0 and segment between '
      f'0 and 1, got {cohort}, {first_rounds} and {segment}.'
    )
  if unit not in get_args(Unit):
    raise ValueError(f'unit must be one of {get_args(Unit)}, got {unit!r}.')

  def init(key, variables):
    del key
    return Slot(trees.stack(variables, cohort), variables), ()

  def send(variables, shared, position, key):
    del key
    one = jax.tree.map(lambda a: a[position], shared.models)
    refined = optax.tree.sub(variables, shared.mean)
    return optax.tree.add(one, refined)

  def update(variables, shared, received, key):
    if len(received.arrived) != cohort:
      raise ValueError(
        f'FedMR keeps {cohort} models and needs as many clients in each round, '
        f'got {len(received.arrived)}.'
      )
    refined = optax.tree.sub(variables, shared.mean)
    kept = jax.vmap(lambda one: optax.tree.add(one, refined))(shared.models)
    models = jax.vmap(trees.where)(received.arrived, received.stacked, kept)
    # One model was sent to all, so FedAvg's mean is the same but for rounding.
    mean = trees.where(
      (received.round < first_rounds) & jnp.all(received.arrived),
      received.average,
      jax.tree.map(lambda a: jnp.mean(a, axis=0), models),
    )
    distance = optax.tree.sub(models.params, mean.params)
    spread = optax.tree.norm(distance, squared=True)
    models = trees.where(
      received.round < first_rounds,
      trees.stack(mean, cohort),
      recombine(models, permutations(key, models, cohort, unit, segment)),
    )
    return mean, Slot(models, mean), Info({'fed_mr/spread': spread})

  return Method(
    init=init,
    send=send,
    stacked=lambda sent: sent.model,
    update=update,
    aggregates=True,
  )


def recombine(models: PyTree, permutation: PyTree) -> PyTree:
  """Recombines K models: leaf by leaf, model i gets that of permutation[i].

  Args:
    models: every leaf [K, ...].
    permutation: a tree of the same structure, every leaf [K] int.

  Returns:
    The models, in the structure of `models`.
  """
  return jax.tree.map(lambda a, order: a[order], models, permutation)


def permutations(
  key: jax.Array,
  models: PyTree,
  num_models: int,
  unit: Unit = 'leaf',
  segment: float = 0.0,
) -> PyTree:
  """Draws a permutation for each leaf; arguments as in `fed_mr`.

  Returns:
    A tree in the structure of `models`, every leaf [K] int32.
  """
  paths, structure = jax.tree.flatten_with_path(models)
  names = [
    jax.tree_util.keystr(place, simple=True, separator='/')
    for place, _ in paths
  ]
  units = names if unit == 'leaf' else [_module(name) for name in names]
  number = {name: i for i, name in enumerate(dict.fromkeys(units))}
  length = max(1, math.ceil(segment * len(number)))
  drawn = [
    jax.random.permutation(jax.random.fold_in(key, i), num_models)
    for i in range(-(-len(number) // length))
  ]
  return jax.tree.unflatten(
    structure, [drawn[number[name] // length] for name in units]
  )


def _module(name: str) -> str:
  """Names an array's layer: block0/conv1 for params/block0/conv1/norm/scale."""
  name = name.partition('/')[2].rpartition('/')[0]
  while _WITHIN.search(name):
    name = _WITHIN.sub('', name)
  return re.sub(r'norm(\d*)$', r'conv\1', name)
