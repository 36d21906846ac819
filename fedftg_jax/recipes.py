"""Named methods and how they combine: what flags and most readers use.

`build('scaffold+fed_ftg', settings)` puts the named parts in the order in which
a server works, whatever the order of the names: one part aggregates, others
correct the mean, others refine the model. Without an aggregating part `fed_avg`
is added.
"""

from typing import Any, Callable, Mapping, NamedTuple

import optax

from fedftg_jax import base
from fedftg_jax.base import Generator, Method, Model
from fedftg_jax.methods import fed_avg as fed_avg_lib
from fedftg_jax.methods import fed_df as fed_df_lib
from fedftg_jax.methods import fed_dyn as fed_dyn_lib
from fedftg_jax.methods import fed_ftg as fed_ftg_lib
from fedftg_jax.methods import fed_nova as fed_nova_lib
from fedftg_jax.methods import fed_prox as fed_prox_lib
from fedftg_jax.methods import moon as moon_lib
from fedftg_jax.methods import q_fed_avg as q_fed_avg_lib
from fedftg_jax.methods import scaffold as scaffold_lib

# 'local' parts add to local training only; the server runs the others in this
# order.
KINDS = ('local', 'aggregates', 'corrects', 'refines')


class Settings(NamedTuple):
  """What the named methods are made of.

  Attributes:
    model: the classifier.
    num_classes: C.
    server_optimizer: of the aggregating part; None for the plain mean.
    generator: for methods that generate images.
    options: by method, the keyword arguments of its function that differ from
      their defaults (for fed_df and fed_ftg: 'options').
  """
  model: Model
  num_classes: int
  server_optimizer: optax.GradientTransformation | None = None
  generator: Generator | None = None
  options: Mapping[str, Mapping[str, Any]] = {}


class Recipe(NamedTuple):
  """How one name becomes a method."""
  kind: str        # one of KINDS
  build: Callable  # (Settings, **options) -> Method
  help: str
  weighting: str = 'examples'  # how it wants clients to count in means
  generates: bool = False      # whether it needs a generator


def _aggregator(make):
  return lambda s, **options: make(
      server_optimizer=s.server_optimizer, **options)


def _generating(make):
  return lambda s, **options: make(
      s.model, s.generator, s.num_classes, **options)


RECIPES = {
    'fed_avg': Recipe(
        'aggregates', _aggregator(fed_avg_lib.fed_avg),
        'weighted mean, or FedOpt with --server_optimizer'),
    'fed_nova': Recipe(
        'aggregates', _aggregator(fed_nova_lib.fed_nova),
        'mean normalised by local steps'),
    'q_fed_avg': Recipe(
        'aggregates', _aggregator(q_fed_avg_lib.q_fed_avg),
        'fair mean, clients with a larger loss count more'),
    'fed_prox': Recipe(
        'local', lambda s, **options: fed_prox_lib.fed_prox(**options),
        'local models are pulled to the received one'),
    'moon': Recipe(
        'local', lambda s, **options: moon_lib.moon(s.model, **options),
        'features are contrasted with the client\'s last model'),
    'fed_dyn': Recipe(
        'corrects', lambda s, **options: fed_dyn_lib.fed_dyn(**options),
        'dynamic regularisation', weighting='uniform'),
    'scaffold': Recipe(
        'corrects', lambda s, **options: scaffold_lib.scaffold(**options),
        'control variates', weighting='uniform'),
    'fed_df': Recipe(
        'refines', _generating(fed_df_lib.fed_df),
        'ensemble distillation on generated images', generates=True),
    'fed_df_public': Recipe(
        'refines',
        lambda s, **options: fed_df_lib.fed_df_public(s.model, **options),
        'ensemble distillation on unlabelled --public_data'),
    'fed_ftg': Recipe(
        'refines', _generating(fed_ftg_lib.fed_ftg),
        'data-free fine-tuning of the mean on the server', generates=True),
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
  """The method called `name`, e.g. 'fed_avg', 'fed_ftg' or 'a+b'.

  Raises:
    ValueError: for a wrong name or option.
  """
  return base.chain(*(
      RECIPES[part].build(settings, **settings.options.get(part, {}))
      for part in parse(name)))


def weighting(name: str) -> str:
  """How the method called `name` wants clients to count in means."""
  wanted = [RECIPES[part].weighting for part in parse(name)]
  return 'uniform' if 'uniform' in wanted else 'examples'


def generates(name: str) -> bool:
  """Whether the method called `name` needs a generator."""
  return any(RECIPES[part].generates for part in parse(name))


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
