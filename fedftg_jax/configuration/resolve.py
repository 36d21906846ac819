"""Makes the configuration from the flags: defaults and presets filled in."""

from collections.abc import Iterable, Mapping
import os
import sys
from typing import Any

import numpy as np

from fedftg_jax import models, recipes, stacking
from fedftg_jax.configuration import check, flags
from fedftg_jax.configuration.flags import FTG
from fedftg_jax.models import convolution
from fedftg_jax.system import cli, devices
from fedftg_jax.system.own_flags import FLAGS

# Where a run writes, and how it is displayed, is not part of its configuration.
PRESENTATION = (
  'workdir',
  'data_dir',
  'manual_dir',
  'tensorboard',
  'wandb',
  'mlflow',
  'checkpoint_every',
  'keep_checkpoints',
  'save_personal',
)
# Flags that change nothing at 0 or no. They are then left out, so that a folder
# that is older than the flag still fits.
_OPTIONAL = (
  'num_classes',
  'train_examples',
  'validation_share',
  'unit_pixels',
  'merge_test',
  'client_test_share',
  'momentum',
  'nesterov',
  'keep_momentum',
  'dropout_after_work',
  'train_all',
  'evaluate_all',
  'server_eps_root',
  'ftg_eps_root',
  'df_eps_root',
  'dp_clip',
  'dp_noise',
  'dp_quantile',
  'secure_aggregation',
  'scaffold_paper',
  'flip_labels',
  'leave_out',
  'track',
  'truncation',
)


class Configuration(dict):
  """The flags that a run's results depend on, by name.

  Any other flag has its default: its value makes no difference.
  """

  def __missing__(self, name: str) -> Any:
    return FLAGS[name].default

  def replace(self, **changes: Any) -> 'Configuration':
    """Returns a configuration with some values replaced."""
    return Configuration(self | changes)


def config(**changes: Any) -> Configuration:
  """Makes the configuration from the flags, checked, with presets resolved.

  Args:
    **changes: values that replace those of the flags.

  Returns:
    The flags that the run's results depend on.

  Raises:
    cli.UsageError: for a wrong value.
  """
  values: dict[str, Any] = {f.name: f.value for f in _ours()} | changes
  # First, since other defaults depend on the devices that JAX counts here.
  values['num_devices'] = _num_devices(values['num_devices'])
  around = recipes.FTG_PRESETS[values[FTG + 'preset']]
  preset = recipes.ftg_options(values[FTG + 'preset'])._asdict()
  for name in ('batch_size', 'weight_decay'):
    if name not in around:
      preset[name] = values[name]
  for name, value in preset.items():
    if values[FTG + name] is None:
      values[FTG + name] = value
  if values['generator_bias'] is None:
    values['generator_bias'] = (
      'fed_ftg' not in values['method'].split('+') or around['generator_bias']
    )
  for name in (FTG + 'batch_size', 'df_batch_size'):
    values[name] = values[name] or values['batch_size']
  if values['norm'] is None:
    values['norm'] = models.DEFAULT_NORMS[values['model']]
  if values['conv'] is None:
    values['conv'] = convolution.default()
  if values['client_chunk'] is None:
    values['client_chunk'] = stacking.default_chunk()
  elif values['client_chunk'] == flags.AUTO:
    if devices.several_processes() or values['track']:
      raise cli.UsageError(
        'client_chunk',
        flags.AUTO,
        'is for one process, without --track: give a number',
      )
  if values['truncation'] is None and values['curvature'] == 'lwet':
    values['truncation'] = 1.0
  check.check(values)
  if values['weighting'] is None:
    values['weighting'] = recipes.weighting(values['method'])
  if values['server_learning_rate'] is None:
    _, values['server_learning_rate'] = recipes.SERVER_OPTIMIZERS[
      values['server_optimizer']
    ]
  unused = _unused(values)
  return Configuration((k, v) for k, v in values.items() if k not in unused)


def _num_devices(asked: int | None) -> int:
  """Returns the number of devices that share the clients.

  It is `asked`, if there are so many devices.
  """
  if asked is None:
    return devices.default_num()
  if asked > 1:
    devices.divide_cpu(asked)
  if asked and devices.several_processes():
    raise cli.UsageError(
      'num_devices', asked, 'must be 0 (all) with several processes'
    )
  try:
    return stacking.make_mesh(asked).size
  except ValueError as error:
    raise cli.UsageError('num_devices', asked, str(error)) from error


def _unused(values: dict[str, Any]) -> set[str]:
  """Returns the flags that have no effect, given the others."""
  unused = set(PRESENTATION)
  parts = recipes.parse(values['method'])
  unused |= {flag for name in recipes.RECIPES for flag in flags.of_method(name)}
  unused -= {flag for part in parts for flag in flags.of_method(part)}
  if not recipes.generates(values['method']):
    unused |= {'generator_width', 'noise_dim', 'generator_bias'}
  if values['evaluate_clients'] == 'none':
    unused.add('personalise')
  if values['evaluate_clients'] == 'none' or not values['clients_by_class']:
    unused.add('clients_by_class')
  # At its default it is left out, so that a folder that is older than the flag
  # still fits.
  name = 'evaluated_clients'
  if values[name] == FLAGS[name].default:
    unused.add(name)
  if values['norm'] != 'batch':
    unused |= {'batch_norm', 'torch_bn'}
  unused |= _unused_by_tracking(values)
  unused |= _unused_by_partition(values)
  unused |= {name for name in _OPTIONAL if not values[name]}
  if not values['dp_noise']:
    unused.add('dp_delta')
  if values['uplink'] == 'none':
    unused |= {'uplink', 'uplink_rate'}
  if values['uplink'] != 'uveqfed':
    unused.add('uplink_lattice')
  if values['augment'] == 'none':
    unused.add('augment')
  if values['schedule'].startswith('file:'):
    unused |= {
      'cohort',
      'schedule_seed',
      'dropout_rate',
      'dropout_after_work',
      'straggler_rate',
      'min_availability',
    }
  return unused


def _unused_by_tracking(values: dict[str, Any]) -> set[str]:
  if not values['track']:
    return {'curvature', 'truncation', 'through_server', 'track_at_once'}
  unused = set()
  if values['curvature'] in ('none', 'retraining'):
    unused.add('truncation')
  if values['curvature'] == 'retraining' or not recipes.refines(
    values['method']
  ):
    unused.add('through_server')
  return unused


def _unused_by_partition(values: dict[str, Any]) -> set[str]:
  kind = values['partition']
  unused = {flag for _, used in flags.PARTITIONS.values() for flag in used}
  if kind in flags.PARTITIONS:
    unused -= flags.PARTITIONS[kind][1].keys()
  if flags.is_given(kind):
    unused.add('num_clients')
    if not (
      values['validation_share']
      or values['client_test_share']
      or values['public_data'].startswith('train:')
    ):
      unused.add('partition_seed')
  return unused


def _ours():
  """Returns the flags of a configuration."""
  return list(FLAGS.flags_by_module_dict()[flags.__name__])


def from_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
  """Checks arguments of a Python call as the values of flags.

  Args:
    arguments: by the names of flags; text, or a value of the flag's type.

  Returns:
    The values of all flags of a run, for `config`; the default of each flag
    that is not given.

  Raises:
    cli.UsageError: for a name that is not a flag, or a wrong value.
  """
  given = {}
  for name, value in arguments.items():
    if isinstance(value, str):
      value = cli.with_home(f'--{name}={value}').partition('=')[2]
    given[name] = parse_value(name, value)
  return {flag.name: flag.default for flag in _ours()} | given


def say_unused(
  configs: Iterable[Configuration], given: Mapping[str, Any] | None = None
) -> None:
  """Prints, on stderr, the given flags that have no effect.

  Args:
    configs: the configurations to run.
    given: values by the names of flags; None for those of the command line.
  """
  if given is None:
    given = {f.name: f.value for f in _ours() if f.name in cli.given()}
  used = set().union(PRESENTATION, *configs)
  idle = sorted(
    name
    for name, value in given.items()
    if name not in used and value != FLAGS[name].default
  )
  if idle and devices.is_first():
    print(
      f'note: {", ".join("--" + name for name in idle)}: used by no method of '
      'this command',
      file=sys.stderr,
    )


def parse_value(name: str, value: Any) -> Any:
  """Parses a value of flag `name`.

  Args:
    name: name of a flag of a configuration.
    value: text, as on a command line, or a value of the flag's type.

  Returns:
    The value as the flag has it.

  Raises:
    cli.UsageError: if there is no such flag, or it cannot have this value.
  """
  names = [f.name for f in _ours()]
  if name not in names:
    close = cli.suggestion(name, names)
    hint = f'; did you mean {close}?' if close else ''
    raise cli.UnknownFlag(name, value, f'no such flag{hint}')
  flag = FLAGS[name]
  if value is None and flag.default is None:
    return None
  if isinstance(value, np.generic):
    value = value.item()
  elif isinstance(value, os.PathLike):
    value = os.fspath(value)
  try:
    return flag.parser.parse(value)
  except (ValueError, TypeError) as error:
    raise cli.UsageError(name, value, cli.right(name, str(error))) from error
