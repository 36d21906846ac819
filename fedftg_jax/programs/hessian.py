"""Measures the curvature of a run's loss, and how it differs across clients.

  fedftg hessian runs/demo/fed_avg/seed0

It takes the folder of a run of any method (a comparison has one for each method
and seed), finished or not. It writes hessian.json there, and the folder's
report.html again, which then has a section about it: the largest eigenvalue of
the Hessian of the mean cross-entropy on some training examples, its trace and
that of each tensor's block, all at the last model, and, over clients that train
from this model, H_N and H_D of FedAlign (docs/curvature.md).
"""

import functools

from absl import flags as absl_flags
import jax
import jax.numpy as jnp
import numpy as np
import optax
from upath import UPath

from fedftg_jax import client_state, second_order
from fedftg_jax.base import Data, Variables
from fedftg_jax.configuration import assembly, folders
from fedftg_jax.configuration.resolve import Configuration
from fedftg_jax.results import page, rows
from fedftg_jax.runs import resume, run
from fedftg_jax.system import cli, devices, files, progress

ARGUMENT = 'FOLDER'
GROUPS = ()  # of common flags in --help: a run has its own
FLAGS = absl_flags.FLAGS

absl_flags.DEFINE_integer(
  'examples',
  500,
  'Number of training examples; 0 for all. They are evenly spaced.',
  lower_bound=0,
)
absl_flags.DEFINE_integer(
  'iterations', 50, 'Largest number of power iterations.', lower_bound=1
)
absl_flags.DEFINE_integer(
  'probes', 20, 'Number of random vectors to estimate a trace.', lower_bound=1
)
absl_flags.DEFINE_integer(
  'clients',
  5,
  'Number of clients to train; 0 for none. They are evenly spaced, and train '
  'from the last model.',
  lower_bound=0,
)


def main(folder: str) -> None:
  try:
    place = UPath(folder)
  except (ValueError, ImportError) as error:  # an unknown store
    raise cli.ArgumentError(folder, str(error)) from error
  config = _config(place)
  experiment = assembly.build(config, FLAGS.data_dir, FLAGS.manual_dir)
  with assembly.matmul_precision(config):
    found = _measure(place, experiment)
  files.write_json(place / 'hessian.json', found)
  across = found.get('clients', {})
  progress.show(
    ['measure', config['method']],
    [
      ['largest eigenvalue', str(found['top_eigenvalue'])],
      ['trace', f'{found["trace"]} ± {found["trace_error"]}'],
      *([name, str(across[name])] for name in ('H_N', 'H_D') if across),
    ],
  )
  print(f'written: {place / "hessian.json"}, {page.write(place)}')


def _config(place) -> Configuration:
  """Reads the configuration of the run in a folder, and checks its files.

  One device measures, however many have trained.
  """
  config, contents = run.read_claim(place)
  try:
    there = folders.contents(config)
  except OSError as error:
    why = f'names a file that no longer exists: {error}'
    raise cli.ArgumentError(place, why) from error
  if there != contents:
    raise cli.ArgumentError(
      place, f'used other files: {", ".join(contents)} changed since then'
    )
  return config.replace(num_devices=1)


def _measure(place, experiment) -> dict:
  """Computes the content of hessian.json."""
  config, problem = experiment.config, experiment.problem
  key_init, key_run = jax.random.split(jax.random.key(config['seed']))
  start = experiment.simulation.federation.init(key_init)
  state, done, slots = _state(place, experiment, start)
  progress.say(f'the model of round {done}')
  put = functools.partial(devices.put, num_devices=config['num_devices'])
  data, key_run = put((problem.data, key_run))
  some = _spread(problem.parts.rows, FLAGS.examples)
  sample = put(Data(data.x, data.y, jnp.asarray(some), jnp.int32(len(some))))
  product = functools.partial(
    second_order.hessian_product, experiment.simulation.model
  )

  @jax.jit
  def top(variables, sample):
    found = second_order.top_eigenvalue(
      product(variables, sample),
      variables.params,
      jax.random.key(0),
      iterations=FLAGS.iterations,
    )
    return found._replace(vector=())

  @jax.jit
  def traces(variables, sample):
    return second_order.traces(
      product(variables, sample),
      variables.params,
      jax.random.key(1),
      FLAGS.probes,
    )

  variables = put(state.variables)
  largest, whole = jax.device_get(
    (top(variables, sample), traces(variables, sample))
  )
  found = {
    'round': done,
    'examples': len(some),
    'top_eigenvalue': rows.number(largest.value),
    'iterations': int(largest.iterations),
    'trace': rows.number(whole.total),
    'trace_error': rows.number(whole.error),
    'probes': FLAGS.probes,
    'per_tensor': {
      jax.tree_util.keystr(path, simple=True, separator='/'): rows.number(value)
      for path, value in jax.tree.leaves_with_path(whole.per_tensor)
    },
  }
  if FLAGS.clients:
    of_variables = lambda variables: traces(variables, sample).per_tensor
    across = _across_clients(
      experiment, state, data, key_run, put, of_variables
    )
    if across:
      found['clients'] = {'slots': slots, **across}
  return found


def _across_clients(experiment, state, data, key, put, traces) -> dict:
  """Measures how curvature differs between the clients' models.

  Each client trains from the model, by its own local training. If none moves
  the model, as in FedDM, there is nothing to compare, and the result is {}.
  """
  fed, parts = experiment.simulation.federation, experiment.problem.parts
  ids = _spread(np.flatnonzero(parts.sizes), FLAGS.clients)
  slots = client_state.read(state.clients, ids)
  state = put(state._replace(clients=slots))
  personalise = jax.jit(lambda *args: fed.personalise(*args)[1])
  vectors, moved = [], False
  for i, client in enumerate(ids):
    models = personalise(state, data, jnp.int32(client), jnp.int32(i), key)
    local = models['personalised'].variables
    change = optax.tree.sub(local.params, state.variables.params)
    moved |= bool(optax.tree.norm(change) > 0)
    of_client = traces(local)
    vectors.append(jnp.stack(jax.tree.leaves(of_client)))
    progress.say(f'client {client}, {i + 1} of {len(ids)}')
  if not moved:
    progress.say('the clients train no model: H_N and H_D are left out')
    return {}
  stacked = jnp.stack(vectors)  # [K, J]
  return {
    'ids': ids.tolist(),
    'trace': [*map(rows.number, jnp.sum(stacked, axis=1))],
    **{
      name: rows.number(value)
      for name, value in second_order.across_clients(stacked).items()
    },
  }


def _spread(values: np.ndarray, num: int) -> np.ndarray:
  """Returns `num` evenly spaced values; all if `num` is 0 or too large."""
  if not 0 < num < len(values):
    return values
  return values[np.linspace(0, len(values) - 1, num).round().astype(int)]


def _state(place, experiment, start):
  """Returns the last state in the folder, the rounds done, and its slots' age.

  The last value is 'kept' if the clients' slots are of that round, or 'initial'
  if they are those of the beginning.
  """
  seed = experiment.config['seed']
  done, (state,) = resume.newest([place], experiment, [seed], [start])
  finished = folders.rounds_finished(place)
  if finished <= done:
    if not done:
      raise cli.ArgumentError(
        place, 'has no model yet: neither a checkpoint nor params.npz'
      )
    return resume.put_back(experiment, done, start, state), done, 'kept'
  arrays = files.read_arrays(place / 'params.npz')
  variables = jax.tree.map_with_path(
    lambda path, leaf: arrays[
      jax.tree_util.keystr(path, simple=True, separator='/')
    ],
    start.variables._asdict(),
  )
  return (
    start._replace(variables=Variables(**variables), round=jnp.int32(finished)),
    finished,
    'initial',
  )
