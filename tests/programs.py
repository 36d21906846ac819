"""Runs the programs in this process, as a user calls them."""

import contextlib
import functools
import io
import json
import os
import pathlib

from absl.testing import absltest, flagsaver
import jax
from matplotlib import figure
import numpy as np

from fedftg_jax.configuration import assembly, folders
from fedftg_jax.system import cli

ROOT = pathlib.Path(__file__).parents[1]
# Flags on which no compiled part depends.
_OF_A_RUN = (
  'rounds',
  'seed',
  'eval_every',
  'partition_seed',
  'schedule',
  'schedule_seed',
  'dropout_rate',
  'straggler_rate',
  'min_availability',
  'evaluate_clients',
  'personalise',
)
# In the environment: trackers tell nobody that they are used.
QUIET = {
  'MLFLOW_DISABLE_TELEMETRY': 'true',
  'WANDB_ERROR_REPORTING': 'false',
  'WANDB_SILENT': 'true',
}
_SMALL_FTG = (
  '--ftg_iterations=1',
  '--ftg_student_steps=1',
  '--generator_width=2',
  '--noise_dim=4',
)


def write_data(folder):
  """Writes small images of three classes as a user's own arrays."""
  rng = np.random.RandomState(0)
  arrays = {}
  for split, num in (('train', 60), ('test', 30)):
    y = np.arange(num) % 3
    x = rng.randint(0, 120, (num, 8, 8, 1))
    for i, label in enumerate(y):
      x[i, label * 2 : label * 2 + 2] += 100
    arrays |= {split + '_x': x.astype(np.uint8), split + '_y': y}
  path = os.path.join(folder, 'own.npz')
  np.savez(path, **arrays)
  return path


def small(data):
  """Returns the flags of a run that takes seconds.

  It uses FedAvg, because FedFTG's programs take longest to compile. The flags
  are in a file, which may hold flags of other methods.
  """
  path = pathlib.Path(data).parent / '.small.flags'
  path.write_text(
    '\n'.join(
      [
        f'--dataset=npz:{data}',
        '--num_clients=4',
        '--cohort=2',
        '--model=mlp',
        '--rounds=3',
        '--local_epochs=1',
        '--batch_size=10',
        '--eval_every=2',
        '--dirichlet_alpha=1',
        '--method=fed_avg',
        *_SMALL_FTG,
      ]
    )
  )
  return [f'--flagfile={path}']


def call(program, *argv, draw=False):
  """Runs a program; returns (exit status, stdout, stderr).

  Runs of one configuration share what is compiled, see `forget`. Pictures take
  as long as a small run, so they are empty files unless `draw`.
  """
  out, err = io.StringIO(), io.StringIO()
  shared = functools.partial(_build, assembly.build)
  with contextlib.ExitStack() as stack:
    stack.enter_context(flagsaver.flagsaver())
    stack.enter_context(contextlib.redirect_stdout(out))
    stack.enter_context(contextlib.redirect_stderr(err))
    stack.enter_context(absltest.mock.patch.object(assembly, 'build', shared))
    stack.enter_context(absltest.mock.patch.object(jax, 'clear_caches'))
    if not draw:
      stack.enter_context(
        absltest.mock.patch.object(figure.Figure, 'savefig', _save_nothing)
      )
    try:
      rest = cli.parse(['program', *argv], program)
      cli.guarded(functools.partial(program.main, *rest[1:]))
      status = 0
    except SystemExit as stop:
      status = stop.code
  return status, out.getvalue(), err.getvalue()


def _save_nothing(figure_, where, *_, **__):
  del figure_
  if hasattr(where, 'write'):
    where.write(b'<svg></svg>')
  else:
    pathlib.Path(where).touch()


def _build(build, config, *places):
  data = config['dataset'].partition(':')[2]
  if not os.path.isfile(data):
    return build(config, *places)
  compiled = {k: v for k, v in config.items() if k not in _OF_A_RUN}
  key = (
    build,
    json.dumps(
      {**compiled, 'dataset': pathlib.Path(data).read_bytes().hex()},
      sort_keys=True,
    ),
    places,
  )
  if key not in _built:
    _built[key] = build(config, *places)
  return _built[key]._replace(
    config=config,
    contents=folders.contents(config),
    problem=assembly.make_problem(config, *places),
  )


_built = {}
forget = _built.clear  # then the next run builds and traces everything again
