"""Builds and checks all parts of a run from a configuration."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import hashlib
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedftg_jax import (
  base,
  client_state,
  compiling,
  curvature,
  evaluation,
  federation,
  influence,
  models,
  recipes,
  solvers,
  stacking,
  uplinks,
)
from fedftg_jax.configuration import flags, folders
from fedftg_jax.configuration.resolve import Configuration
from fedftg_jax.data import (
  augment,
  clients,
  datasets,
  flips,
  partition,
  schedules,
)
from fedftg_jax.data.parts import Parts
from fedftg_jax.methods import batch_norm
from fedftg_jax.models import modules
from fedftg_jax.system import cli, devices


@dataclasses.dataclass(frozen=True, eq=False)
class Simulation:
  """The parts that are compiled once: no seed of a run changes them."""

  model: base.Model
  method: base.Method
  federation: base.Federation
  tracked: list[int]  # clients whose influence is tracked
  client_chunk: int  # clients that are stacked at once, 0 for all

  @functools.cached_property
  def of_seeds(self) -> base.Federation:
    """The federation of several seeds at once."""
    return federation.over_seeds(self.federation)

  @functools.cached_property
  def synthesise(self) -> base.Synthesise | None:
    """The method's `synthesise`, compiled."""
    make = self.method.synthesise
    return make and compiling.jit(make, compiling.ONCE)


class Problem(NamedTuple):
  """The parts that depend on the seeds of partition and schedule."""

  dataset: datasets.Dataset  # without public and validation examples
  parts: Parts  # row indices of each client
  flipped: list[int]  # clients that train on wrong labels
  data: base.Data
  schedule: base.Cohort  # leading axis [T]
  tests: Parts  # rows of the test set by client
  # The partition as it was drawn: `parts`, unless clients keep tests of it.
  drawn: Parts


class Given(NamedTuple):
  """Objects of a Python program that take the place of names in flags."""

  dataset: datasets.Dataset | None = None
  model: Any = None  # a Flax module, see `modules.from_module`
  parts: Mapping[str, base.Method] = {}  # see `recipes.name_own`


class Images(Protocol):
  """Properties of a data set on which a model depends."""

  @property
  def image_shape(self) -> tuple[int, int, int]: ...
  @property
  def num_classes(self) -> int: ...
  @property
  def mean(self) -> Sequence[float]: ...
  @property
  def std(self) -> Sequence[float]: ...


class Experiment(NamedTuple):
  """Holds all parts of a run, built and checked."""

  config: Configuration
  contents: dict[str, str]  # fingerprints of the files that `config` names
  simulation: Simulation
  problem: Problem


def build(
  config: Mapping[str, Any],
  data_dir: str | None = None,
  manual_dir: str | None = None,
  given: Given = Given(),
) -> Experiment:
  """Loads the data and builds the simulation of a configuration.

  Args:
    config: from `resolve.config`, or a run's config.json.
    data_dir: where prepared data sets are kept, see `datasets.load`.
    manual_dir: where their original files are.
    given: objects that take the place of names in `config`.

  Returns:
    All parts of the run.

  Raises:
    cli.UsageError: if data and configuration do not fit.
  """
  config = Configuration(config)
  problem = make_problem(config, data_dir, manual_dir, given)
  simulation = _simulation(config, problem, given)
  if simulation.tracked:
    _check_tracking(config, simulation.federation, problem)
  return Experiment(config, folders.contents(config), simulation, problem)


def make_problem(
  config: Configuration,
  data_dir: str | None = None,
  manual_dir: str | None = None,
  given: Given = Given(),
) -> Problem:
  """Divides the data and draws the schedule; arguments as in `build`."""
  dataset, public, drawn = share_out(
    config, given.dataset or load(config, data_dir, manual_dir)
  )
  parts, share = drawn, config['client_test_share']
  if share:
    dataset, parts, tests = _checked(
      'client_test_share',
      config,
      datasets.with_client_tests,
      dataset,
      drawn,
      share,
      config['partition_seed'],
    )
  else:  # the classes of a client's tests are distributed as in training
    tests = partition.like(dataset.test_y, dataset.train_y, parts)
  labels, flipped = _labels(config, dataset, parts)
  left_out = ids(config, 'leave_out', len(parts))
  return Problem(
    dataset,
    parts,
    flipped,
    clients.from_partition(dataset.train_x, labels, parts, public),
    schedules.without(_schedule(config, parts), left_out),
    tests,
    drawn,
  )


def _labels(config, dataset, parts) -> tuple[np.ndarray, list[int]]:
  """Returns the labels to train on, and the clients whose labels are wrong."""
  if not config['flip_labels']:
    return dataset.train_y, []
  share, num_clients = config['flip_labels'].split(',')
  return _checked(
    'flip_labels',
    config,
    flips.flip,
    dataset.train_y,
    parts,
    dataset.num_classes,
    share=float(share),
    num_clients=int(num_clients),
    seed=config['partition_seed'],
  )


def ids(config: Configuration, flag: str, num_clients: int) -> list[int]:
  """Returns the clients that a flag names, such as 'all' or '0,3'.

  Raises:
    cli.UsageError: for a client that does not exist.
  """
  text = config[flag]
  if text == 'all':
    return list(range(num_clients))
  found = [int(word) for word in text.split(',') if word]
  if found and max(found) >= num_clients:
    raise cli.UsageError(
      flag, text, f'there are {num_clients} clients, 0 to {num_clients - 1}'
    )
  return found


def fingerprint(experiment: Experiment, given: Given) -> str:
  """Returns a digest of the computation of a round.

  It identifies a run whose model or method is an object instead of a name. The
  digest is that of the program that JAX passes to the compiler, so it changes
  with the version of JAX.
  """
  config = experiment.config.replace(client_state='device', num_devices=1)
  if config['client_chunk'] == flags.AUTO:  # must not depend on the memory
    config = config.replace(client_chunk=1)
  problem = experiment.problem
  simulation = _simulation(config, problem, given)
  fed = simulation.federation
  key = jax.random.key(0)
  row = jax.tree.map(  # of a width that does not depend on the schedule
    lambda a: jax.ShapeDtypeStruct((config['cohort'],), a.dtype),
    problem.schedule,
  )
  state = jax.eval_shape(fed.init, key)
  programs = (
    jax.jit(fed.init).lower(key),
    jax.jit(fed.round).lower(state, problem.data, row, key),
  )
  text = ''.join(program.as_text() for program in programs)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_model(
  config: Configuration, images: Images, module: Any = None
) -> base.Model:
  """Builds the model of a configuration.

  Args:
    config: from `resolve.config`, or a run's config.json.
    images: the data set, or a description of its images.
    module: a Flax module to use instead of --model, if any.

  Returns:
    The model.

  Raises:
    cli.UsageError: if the model does not fit the images.
  """
  if module is not None:
    return _checked(
      'model',
      config,
      modules.from_module,
      module,
      images.image_shape,
      images.num_classes,
      images.mean,
      images.std,
      _dtype(config),
    )
  return _checked(
    'model',
    config,
    by_name(config, images),
    config['model'],
    norm=config['norm'],
    projection_dim=config['projection_dim'],
  )


def by_name(config: Configuration, images: Images) -> Callable[..., base.Model]:
  """Returns `models.build` with the arguments that a configuration implies."""
  return functools.partial(
    models.build,
    image_shape=images.image_shape,
    num_classes=images.num_classes,
    mean=images.mean,
    std=images.std,
    conv=config['conv'],
    torch_bn=config['torch_bn'],
    dtype=_dtype(config),
  )


def _simulation(config, problem, given) -> Simulation:
  dataset, num_clients = problem.dataset, len(problem.parts)
  build = by_name(config, dataset)
  model = make_model(config, dataset, given.model)
  steps = config['local_steps'] or None
  solver = solvers.local_sgd(
    _decayed(config['learning_rate'], config),
    batch_size=config['batch_size'],
    epochs=None if steps else config['local_epochs'],
    steps=steps,
    weight_decay=config['weight_decay'],
    clip_norm=config['clip_norm'] or None,
    optimizer=_optimizer(config),
    **_augment(config, dataset),
  )
  make = functools.partial(
    federation.federation,
    model,
    solver=solver,
    num_clients=num_clients,
    weighting=config['weighting'],
    client_state='device' if config['client_state'] == 'device' else 'host',
  )
  uplink = uplinks.build(
    config['uplink'], config['uplink_rate'], config['uplink_lattice']
  )
  tracked = ids(config, 'track', num_clients)
  last = (curvature.curvature(),) if tracked else ()
  make_method = functools.partial(
    _method, config, dataset, model, build, num_clients, own=given.parts
  )
  method = make_method(*last)
  mesh, chunk = devices.mesh(config['num_devices']), config['client_chunk']
  if chunk == flags.AUTO:
    probe = make(method, uplink=uplink, client_state='device')
    chunk = _chunk_that_fits(config, probe, problem, mesh)
  elif chunk is None:  # a configuration from before this flag
    chunk = stacking.default_chunk()
  make = functools.partial(make, client_chunk=chunk, mesh=mesh)
  fed = _checked('uplink', config, make, method, uplink=uplink)
  if tracked:
    fed = _tracking(config, fed, make, make_method, uplink, tracked)
  return Simulation(model, method, fed, tracked, chunk)


def _chunk_that_fits(config, probe, problem, mesh) -> int:
  """Returns how many clients of a round fit the device's memory at once.

  It depends on the configuration and the kind of device alone, so that a run
  that goes on has the same number.

  Args:
    config: the configuration.
    probe: the simulation, with the clients' slots on the device.
    problem: the data and the schedule.
    mesh: devices that share the clients, or None.
  """
  num, cohort = len(problem.parts), problem.schedule.client_id.shape[1]
  if config['schedule'] in ('bernoulli', 'poisson') and not config['train_all']:
    # Wide enough for nearly all rounds: the more rounds are drawn, the wider is
    # the widest of them.
    mean = config['cohort']
    cohort = min(num, math.ceil(mean + 6 * math.sqrt(mean)))
  slots = (
    num
    if config['client_state'] == 'device'
    else client_state.table_size(num, config['eval_every'], cohort)
  )
  return federation.chunk_that_fits(
    probe, problem.data, cohort, slots, mesh.size if mesh else 1
  )


def _tracking(
  config, fed, make, make_method, uplink, tracked
) -> base.Federation:
  """Adds tracking of clients to `fed`."""
  at_once, kind = config['track_at_once'], config['curvature']
  if kind == 'retraining':
    return influence.retraining(fed, tracked, at_once=at_once)
  rule = {'lwet': 'blocks', 'none': 'exact'}.get(kind, kind)
  refining, through = config['through_server'], None
  if rule != 'exact' or uplink or not refining:
    through = make(
      make_method(curvature.curvature(rule), refining=refining),
      uplink=uplink
      and (uplink if kind == 'none' else influence.straight_through(uplink)),
    )
  return influence.tracking(
    fed,
    tracked,
    through=through,
    carry='identity' if kind == 'none' else 'derivative',
    truncation=config['truncation'],
    at_once=at_once,
  )


def _check_tracking(config, fed, problem) -> None:
  """Checks that a round has a derivative to carry influence with.

  Raises:
    cli.UsageError: if not.
  """
  key = jax.random.key(0)
  row = jax.tree.map(lambda a: a[0], problem.schedule)
  try:
    jax.eval_shape(
      fed.round, jax.eval_shape(fed.init, key), problem.data, row, key
    )
  except influence.NoForwardMode as error:
    raise cli.UsageError(
      'track',
      config['track'],
      f'{error} (--conv=im2col, --curvature=none or retraining)',
    ) from error


def load(
  config: Configuration, data_dir: str | None, manual_dir: str | None
) -> datasets.Dataset:
  """Loads the data set that `config` names.

  Raises:
    cli.UsageError: if that is impossible.
  """
  return _checked(
    'dataset',
    config,
    _load,
    _contents(config['dataset']),
    config['dataset'],
    data_dir,
    manual_dir,
    config['num_classes'],
  )


@functools.lru_cache(maxsize=1)
def _load(contents, *args):
  del contents  # of the files: if they change, they are read again
  return datasets.load(*args)


def _contents(dataset: str) -> tuple:
  try:
    return tuple(folders.contents({'dataset': dataset}).items())
  except OSError:  # `datasets.load` says what is wrong
    return ()


def _checked(flag, config, function, *args, **kwargs):
  try:
    return function(*args, **kwargs)
  except ValueError as error:
    raise cli.UsageError(flag, config[flag], str(error)) from error


def _dtype(config):
  return jnp.bfloat16 if config['precision'] == 'bfloat16' else None


def matmul_precision(config: Configuration):
  """Returns a context with the precision of matrix products in `config`."""
  return jax.default_matmul_precision(
    'highest' if config['precision'] == 'highest' else None
  )


def _decayed(rate, config):
  return lambda round_: rate * config['lr_decay'] ** round_


def _optimizer(config) -> optax.GradientTransformation:
  """Builds the clients' optimiser, without its learning rate."""
  if not config['momentum']:
    return optax.identity()
  return optax.trace(config['momentum'], config['nesterov'])


def _augment(config, dataset) -> dict[str, Any]:
  """Returns the solver's argument `augment`, if any."""
  if config['augment'] == 'none':
    return {}
  return {
    'augment': lambda key, x: augment.flip_crop(
      key, models.normalise(x, dataset.mean, dataset.std)
    )
  }


def _method(
  config,
  dataset,
  model,
  build_model,
  num_clients,
  *last,
  refining=True,
  own=Given().parts,
) -> base.Method:
  """Builds the method, with the policy for BatchNorm statistics."""
  options = {
    part: _options(part, config) for part in recipes.parse(config['method'])
  }
  generator = None
  if recipes.generates(config['method']):
    generator = _checked(
      'dataset',
      config,
      models.image_generator,
      dataset.image_shape,
      dataset.num_classes,
      noise_dim=config['noise_dim'],
      width=config['generator_width'],
      bias_before_norm=config['generator_bias'],
      conv=config['conv'],
      dtype=_dtype(config),
    )
  settings = recipes.Settings(
    model,
    dataset.num_classes,
    recipes.server_optimizer(
      config['server_optimizer'],
      config['server_learning_rate'],
      config['server_eps_root'],
    ),
    generator,
    options,
    config['cohort'],
    config['batch_size'],
    config['learning_rate'],
    config['weight_decay'] + _prox_decay(config),
    _privacy(config),
    build_model,
    num_clients,
    dataset.image_shape,
    own,
  )
  further = batch_norm.policy_parts(
    config['batch_norm'], model, config['batch_size']
  )
  if config['keep_momentum']:
    further += (solvers.kept_optimizer(_optimizer(config)),)
  if config['evaluate_all']:
    further += (evaluation.last_models(),)
  try:
    return recipes.build(
      config['method'], settings, *further, *last, refining=refining
    )
  except ValueError as error:
    flag, right = _of_option(config['method'], str(error))
    raise cli.UsageError(flag, config[flag], right) from error


def _of_option(method: str, message: str) -> tuple[str, str]:
  """Returns the flag of the option that a message begins with, and the rest.

  If no part of the method has such an option, or several have, it is `method`,
  and the whole message.
  """
  name, _, rest = message.partition(' ')
  found = {
    flag
    for part in recipes.parse(method)
    for flag, option in flags.of_method(part).items()
    if option == name
  }
  return (found.pop(), rest) if len(found) == 1 else ('method', message)


def _privacy(config) -> dict[str, Any]:
  """Returns the arguments of `private_fed_avg`; empty without privacy."""
  if not (config['dp_clip'] or config['secure_aggregation']):
    return {}
  return {
    'clip': config['dp_clip'],
    'noise': config['dp_noise'],
    'quantile': config['dp_quantile'],
    'secure': config['secure_aggregation'],
  }


def _prox_decay(config) -> float:
  """Returns what the official FedProx adds to weight decays.

  It is added on the server, too.
  """
  return config['prox_mu'] if config['prox_to_zero'] else 0.0


def _options(part, config) -> dict[str, Any]:
  """Returns the options of a method, from its flags."""
  values = {
    name: config[flag]
    for flag, name in flags.of_method(part).items()
    if flag in config
  }
  for name in {'student_lr', 'generator_lr'} & values.keys():
    values[name] = _decayed(values[name], config)
  if 'weight_decay' in values:
    values['weight_decay'] += _prox_decay(config)
  return values


def share_out(
  config: Configuration, loaded: datasets.Dataset
) -> tuple[datasets.Dataset, np.ndarray | tuple[()], Parts]:
  """Divides the data among the clients.

  Validation and public images are taken away before. Clients do not yet keep
  examples as tests.

  Args:
    config: from `resolve.config`.
    loaded: the whole data set.

  Returns:
    The clients' data set, the public images (or ()), and the rows of each
    client.

  Raises:
    cli.UsageError: if data and configuration do not fit.
  """
  if config['unit_pixels']:
    loaded = _checked('unit_pixels', config, datasets.with_unit_pixels, loaded)
  if config['merge_test']:
    loaded = datasets.with_test_merged(loaded)
  loaded = _checked(
    'train_examples',
    config,
    datasets.with_examples,
    loaded,
    config['train_examples'],
    config['partition_seed'],
  )
  kept = _checked(
    'validation_share',
    config,
    datasets.with_validation,
    loaded,
    config['validation_share'],
    config['partition_seed'],
  )
  dataset, public = _public(config, kept)
  return dataset, public, Parts.of(_partition(config, dataset))


def _partition(config, dataset) -> Sequence[np.ndarray]:
  kind, labels = config['partition'], dataset.train_y
  if kind.startswith('file:'):
    return _checked(
      'partition', config, partition.load, kind[len('file:') :], len(labels)
    )
  if kind == 'natural':
    return _checked(
      'partition',
      config,
      partition.natural,
      dataset.train_clients,
      dataset.num_natural,
    )
  make, arguments = flags.PARTITIONS[kind]
  _checked(
    'num_clients',
    config,
    partition.check_num_clients,
    len(labels),
    config['num_clients'],
  )
  return _checked(
    'partition',
    config,
    make,
    labels,
    config['num_clients'],
    seed=config['partition_seed'],
    **{argument: config[flag] for flag, argument in arguments.items()},
  )


def _public(config, dataset):
  """Splits off the images that become public."""
  kind, _, rest = config['public_data'].partition(':')
  if kind == 'npz':
    return dataset, _checked(
      'public_data', config, datasets.read_images, rest, dataset
    )
  if not kind:
    return dataset, ()
  num, total = int(rest), len(dataset.train_y)
  if num >= total:
    raise cli.UsageError(
      'public_data',
      config['public_data'],
      f'must be fewer than the {total} training images, so that some are left '
      'for the clients',
    )
  order = np.random.RandomState([config['partition_seed'], 1]).permutation(
    total
  )
  kept = np.sort(order[num:])
  return dataset.take(kept), dataset.train_x[order[:num]]


def _schedule(config, parts) -> base.Cohort:
  schedule = _selected(config, parts)
  if config['train_all']:
    return schedules.with_all_at_work(schedule, len(parts))
  return schedule


def _selected(config, parts) -> base.Cohort:
  """Makes the schedule of the selected clients."""
  kind, num_rounds, num_clients = (
    config['schedule'],
    config['rounds'],
    len(parts),
  )
  if kind.startswith('file:'):
    schedule = _checked(
      'schedule',
      config,
      schedules.load,
      kind[len('file:') :],
      num_rounds,
      num_clients,
    )
    return _checked(
      'schedule', config, federation.check_schedule, schedule, num_clients
    )
  make = {
    'exact': schedules.exact,
    'bernoulli': schedules.bernoulli,
    'poisson': schedules.poisson,
  }[kind]
  seed = config['schedule_seed']
  available = schedules.availability(
    num_clients, config['min_availability'], seed
  )
  schedule = _checked(
    'cohort',
    config,
    make,
    num_rounds,
    num_clients,
    config['cohort'],
    seed,
    available,
  )
  schedule = schedules.with_dropouts(
    schedule, config['dropout_rate'], seed, config['dropout_after_work']
  )
  batches = -(-parts.sizes // config['batch_size'])
  steps = config['local_steps'] or config['local_epochs'] * batches
  return schedules.with_stragglers(
    schedule,
    np.broadcast_to(steps, num_clients),
    config['straggler_rate'],
    seed,
  )
