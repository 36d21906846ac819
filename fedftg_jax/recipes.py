"""Named methods and how they combine: what flags and most readers use.

`build('fed_avg+fed_ftg', settings)` puts the named parts in the order in which
a server works, whatever the order of the names: one part aggregates, others
correct the mean, others refine the model. Without an aggregating part `fed_avg`
is added.
"""

from typing import Callable, NamedTuple

import optax

from fedftg_jax.base import Generator, Method, Model, chain
from fedftg_jax.methods import fed_avg as fed_avg_lib
from fedftg_jax.methods import fed_ftg as fed_ftg_lib

KINDS = ('aggregates', 'corrects', 'refines')


class Settings(NamedTuple):
  """What the named methods are made of.

  Attributes:
    model: the classifier.
    num_classes: C.
    server_optimizer: of the aggregating part; None for the plain mean.
    generator: for methods that generate images.
    ftg: options of FedFTG.
  """
  model: Model
  num_classes: int
  server_optimizer: optax.GradientTransformation | None = None
  generator: Generator | None = None
  ftg: fed_ftg_lib.Options = fed_ftg_lib.Options()


class Recipe(NamedTuple):
  """How one name becomes a method."""
  kind: str        # one of KINDS
  build: Callable  # (Settings) -> Method
  help: str
  weighting: str = 'examples'  # how it wants clients to count in means


RECIPES = {
    'fed_avg': Recipe(
        'aggregates', lambda s: fed_avg_lib.fed_avg(s.server_optimizer),
        'weighted mean, or FedOpt with --server_optimizer'),
    'fed_ftg': Recipe(
        'refines',
        lambda s: fed_ftg_lib.fed_ftg(
            s.model, s.generator, s.num_classes, s.ftg),
        'data-free fine-tuning of the mean on the server'),
}

# With default learning rates; those of the last three are not tuned.
SERVER_OPTIMIZERS = {
    'sgd': (optax.sgd, 1.),
    'momentum': (lambda rate: optax.sgd(rate, momentum=.9), 1.),
    'adam': (lambda rate: optax.adam(rate, eps=1e-3), .01),
    'yogi': (optax.yogi, .01),
    'adagrad': (optax.adagrad, .1),
}


def parse(name: str) -> list[str]:
  """The parts of 'a+b' in the order in which the server runs them.

  Raises:
    ValueError: for an unknown or repeated part, or two that aggregate.
  """
  parts = name.split('+')
  for part in parts:
    if part not in RECIPES:
      raise ValueError(
          f'no method {part!r}: must be one of {", ".join(sorted(RECIPES))}, or '
          'several joined with +')
    if parts.count(part) > 1:
      raise ValueError(f'{part} is named twice')
  kinds = [RECIPES[part].kind for part in parts]
  if kinds.count('aggregates') > 1:
    both = [p for p, k in zip(parts, kinds) if k == 'aggregates']
    raise ValueError(f'only one part can aggregate, got {" and ".join(both)}')
  if 'aggregates' not in kinds:
    parts.append('fed_avg')
  return sorted(parts, key=lambda part: KINDS.index(RECIPES[part].kind))


def build(name: str, settings: Settings) -> Method:
  """The method called `name`, e.g. 'fed_avg', 'fed_ftg' or 'a+b'."""
  return chain(*(RECIPES[part].build(settings) for part in parse(name)))


def weighting(name: str) -> str:
  """How the method called `name` wants clients to count in means."""
  wanted = [RECIPES[part].weighting for part in parse(name)]
  return 'uniform' if 'uniform' in wanted else 'examples'


def server_optimizer(
    name: str, learning_rate: float | None = None
) -> optax.GradientTransformation | None:
  """A server optimiser by name; None (the plain mean) for SGD of rate 1.

  Raises:
    ValueError: for an unknown name.
  """
  if name not in SERVER_OPTIMIZERS:
    raise ValueError(
        f'server optimiser must be one of {sorted(SERVER_OPTIMIZERS)}, got '
        f'{name!r}.')
  make, default = SERVER_OPTIMIZERS[name]
  rate = default if learning_rate is None else learning_rate
  return None if (name, rate) == ('sgd', 1.) else make(rate)
