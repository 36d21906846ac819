"""Checks configurations beyond the types and bounds of single flags."""

import importlib.util
import os
from typing import Any

import numpy as np

from fedftg_jax import recipes, uplinks
from fedftg_jax.configuration.flags import FTG, PARTITIONS, SCHEDULES, is_given
from fedftg_jax.data import datasets
from fedftg_jax.system import cli, files

_LARGEST = float(np.finfo(np.float32).max)


def check(values: dict[str, Any]) -> None:
  """Checks the values of all flags together.

  Raises:
    cli.UsageError: names the flag, its value, and what would be right.
  """

  def require(flag, condition, right):
    if not condition:
      raise cli.UsageError(flag, values[flag], right)

  for name, value in values.items():
    if isinstance(value, float):
      require(name, abs(value) <= _LARGEST, 'must be a finite number')
  folder = values['data_dir']
  require(
    'data_dir',
    folder is None or not os.path.exists(folder) or os.path.isdir(folder),
    'must be a folder',
  )
  folder = values['manual_dir']
  require(
    'manual_dir', folder is None or os.path.isdir(folder), 'must be a folder'
  )
  _check_by(
    'dataset',
    values,
    datasets.check_name,
    values['data_dir'],
    values['manual_dir'],
  )
  _check_by('method', values, recipes.parse)
  for flag, allowed in (('partition', PARTITIONS), ('schedule', SCHEDULES)):
    value = values[flag]
    if value.startswith('file:'):
      require(flag, os.path.isfile(value[len('file:') :]), 'no such file')
    else:
      require(flag, value in allowed, 'must be one of ' + ', '.join(allowed))
  require(
    'evaluate_all',
    not values['evaluate_all'] or values['client_state'] == 'device',
    'needs --client_state=device',
  )
  require(
    'tensorboard',
    not values['tensorboard'] or files.is_local(values['workdir'] or '.'),
    'needs a --workdir on this machine',
  )
  for name in 'wandb', 'mlflow':
    require(
      name,
      not values[name] or importlib.util.find_spec(name),
      f"needs {name}: pip install 'fedftg_jax[{name}]'",
    )
  require('rounds', values['rounds'] <= 10**7, 'must be at most 10000000')
  require('momentum', values['momentum'] < 1, 'must be below 1')
  for name in 'nesterov', 'keep_momentum':
    require(
      name,
      not values[name] or values['momentum'] > 0,
      'needs a --momentum above 0',
    )
  _check_tracking(values, require)
  require('dropout_rate', values['dropout_rate'] < 1, 'must be below 1')
  require('validation_share', values['validation_share'] < 1, 'must be below 1')
  share = values['client_test_share']
  require('client_test_share', share < 1, 'must be below 1')
  merged = values['merge_test']
  require(
    'merge_test',
    not merged or share,
    'needs a --client_test_share above 0, since no test set would be left',
  )
  require(
    'merge_test',
    not merged or values['partition'] != 'natural',
    'must be false with --partition=natural: the clients of the test examples '
    'are unknown',
  )
  require(
    'partition',
    values['partition'] != 'quantity'
    or values['size_sigma']
    or values['size_power'],
    'needs --size_sigma or --size_power above 0',
  )
  for name in FTG + 'memory', 'df_memory':
    require(name, values[name] < 1, 'must be below 1')
  # Only for the methods in use: for the others, their batch size may be that of
  # --batch_size, which can be large.
  parts = recipes.parse(values['method'])
  for name, batch, users in (
    (FTG + 'iterations', FTG + 'batch_size', {'fed_ftg'}),
    ('df_generator_steps', 'df_batch_size', {'fed_df'}),
    ('df_student_steps', 'df_batch_size', {'fed_df', 'fed_df_public'}),
  ):
    most = 2**30 // values[batch]
    require(
      name,
      values[name] <= most or users.isdisjoint(parts),
      f'must be at most {most} with batches of {values[batch]}',
    )
  for name, value in values.items():
    require(name, not name.endswith('_tau') or value > 0, 'must be above 0')
  for part in parts:
    for flag, allowed, why in recipes.recipe(part).needs:
      right = ' or '.join(str(value) for value in allowed if value is not None)
      require(
        flag, values[flag] in allowed, f'must be {right} with {part}: {why}'
      )
    require(
      'norm',
      not part.startswith('fed_zda')
      or values['norm'] == 'batch'
      or values['zda_bn_term'] == 'none',
      f'must be batch with {part}, whose images match its statistics; or '
      '--zda_bn_term=none, a variant without',
    )
  _check_personal(values, parts, require)
  require(
    'scaffold_lr0',
    not values['scaffold_lr0'] or values['learning_rate'] > 0,
    'needs a --learning_rate above 0',
  )
  require(
    'scaffold_lr0',
    not values['scaffold_lr0'] or not values['momentum'],
    'needs --momentum=0: with momentum a step is longer than a learning rate',
  )
  _check_privacy(values, require)
  _check_public(values, require)
  _check_uplink(values)
  rate = values['server_learning_rate']
  require('server_learning_rate', rate is None or rate > 0, 'must be above 0')
  require(
    'server_eps_root',
    not values['server_eps_root'] or values['server_optimizer'] == 'adam',
    'needs --server_optimizer=adam',
  )
  require(
    'norm',
    values['norm'] == 'none' or values['model'] not in ('mlp', 'softmax'),
    f'must be none with --model={values["model"]}, which has no convolutions',
  )
  require('dirichlet_alpha', values['dirichlet_alpha'] > 0, 'must be above 0')
  if not (
    values['schedule'].startswith('file:') or is_given(values['partition'])
  ):
    require(
      'cohort',
      values['cohort'] <= values['num_clients'],
      f'must be at most --num_clients={values["num_clients"]}',
    )


def _check_privacy(values, require):
  noise, quantile = values['dp_noise'], values['dp_quantile']
  require('dp_quantile', quantile < 1, 'must be below 1')
  for name in ('dp_noise', 'dp_quantile'):
    require(
      name, not values[name] or values['dp_clip'], 'needs a --dp_clip above 0'
    )
  require(
    'dp_noise',
    not (noise and quantile) or noise < values['cohort'] / 10,
    'must be below --cohort / 10 with --dp_quantile',
  )
  require(
    'dp_noise',
    not noise or importlib.util.find_spec('dp_accounting'),
    "needs dp-accounting: pip install 'fedftg_jax[dp]'",
  )
  require('dp_delta', 0 < values['dp_delta'] < 1, 'must be between 0 and 1')
  require(
    'schedule',
    not noise or values['schedule'] == 'poisson',
    'must be poisson with --dp_noise: its accounting assumes that every client '
    'takes part with the same probability',
  )
  for name in ('dp_clip', 'secure_aggregation'):
    if values[name]:
      _check_by(name, values, lambda _: recipes.check_private(values['method']))
      require(
        'norm',
        values['norm'] != 'batch',
        f'must not be batch with --{name}: statistics are sent unprotected',
      )


def _check_personal(values, parts, require):
  """Checks the flags of methods with personal models, if they are in use."""
  if not {'p_fed_me', 'p_fed_bred'}.isdisjoint(parts):
    for name in 'me_lam', 'me_lr_p', 'me_prox_steps':
      require(name, values[name] > 0, 'must be above 0')
    require(
      'me_lr_p',
      values['me_lr_p'] * values['me_lam'] <= 2,
      f'must be at most 2 / --me_lam={values["me_lam"]}, or the steps of the '
      'personal models diverge',
    )
  if 'kd_lwof' in parts:
    for name in 'lwof_alpha', 'lwof_gamma':
      require(name, values[name] <= 1, 'must be at most 1')
    num_clients = values['num_clients']
    _check_by(
      'lwof_models',
      values,
      lambda names: recipes.check_architectures(
        names.split(','), None if is_given(values['partition']) else num_clients
      ),
    )


def _check_tracking(values, require):
  for flag in 'track', 'leave_out':
    text = values[flag]
    ids = text.split(',') if text and (flag, text) != ('track', 'all') else []
    others = 'all, or ' if flag == 'track' else ''
    require(
      flag,
      all(word.isdecimal() for word in ids) and len(set(ids)) == len(ids),
      f'must be {others}different ids of clients, separated by commas',
    )
    if not is_given(values['partition']):
      require(
        flag,
        all(int(word) < values['num_clients'] for word in ids),
        f'must be below --num_clients={values["num_clients"]}; ids begin at 0',
      )
  require(
    'flip_labels',
    not values['flip_labels'] or _is_share_and_number(values['flip_labels']),
    'must be SHARE,CLIENTS, with SHARE above 0 and at most 1 and CLIENTS at '
    'least 1',
  )
  if not values['track']:
    return
  require(
    'track', values['client_state'] == 'device', 'needs --client_state=device'
  )
  require(
    'evaluate_all', not values['evaluate_all'], 'must be false with --track'
  )
  require(
    'track',
    not values['secure_aggregation'],
    'must be empty with --secure_aggregation, whose rounding has no '
    'derivative, and which hides what single clients send',
  )
  require(
    'curvature',
    values['uplink'] != 'top_k'
    or values['curvature'] in ('none', 'retraining'),
    'must be none or retraining with --uplink=top_k: what it does not send has '
    'no derivative',
  )
  require(
    'curvature',
    values['curvature'] != 'fisher' or values['norm'] != 'batch',
    'needs a --norm other than batch, with which an example has no gradient of '
    'its own',
  )


def _is_share_and_number(text):
  share, _, number = text.partition(',')
  try:
    return 0 < float(share) <= 1 and int(number) > 0
  except ValueError:
    return False


def _check_public(values, require):
  kind, _, rest = values['public_data'].partition(':')
  if kind == 'npz':
    require('public_data', os.path.isfile(rest), 'no such file')
  elif kind == 'train':
    require(
      'public_data',
      rest.isdecimal() and int(rest) > 0,
      'train: must be followed by a number of images',
    )
  else:
    require(
      'public_data', not values['public_data'], 'must be train:NUM or npz:PATH'
    )
  if 'fed_df_public' in recipes.parse(values['method']):
    require(
      'public_data',
      values['public_data'],
      'fed_df_public needs images: give train:NUM or npz:PATH',
    )


def _check_uplink(values):
  try:
    uplinks.build(
      values['uplink'], values['uplink_rate'], values['uplink_lattice']
    )
  except ValueError as error:  # the others are enumerations
    raise cli.UsageError(
      'uplink_rate', values['uplink_rate'], str(error)
    ) from error


def _check_by(flag, values, function, *args):
  try:
    function(values[flag], *args)
  except ValueError as error:
    raise cli.UsageError(flag, values[flag], str(error)) from error
