"""From a configuration to a finished run: build, train, evaluate, write."""

import functools
import hashlib
import json
import os
import pathlib
import re
from typing import Any, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments import devices
from experiments import files
from experiments import flags
from experiments import plots
from experiments import progress
from fedftg_jax import base
from fedftg_jax import evaluation
from fedftg_jax import federation
from fedftg_jax import models
from fedftg_jax import recipes
from fedftg_jax import solvers
from fedftg_jax import trees
from fedftg_jax.data import clients
from fedftg_jax.data import datasets
from fedftg_jax.data import partition
from fedftg_jax.data import schedules
from fedftg_jax.methods import batch_norm, fed_df, fed_ftg

FINAL_ROUNDS = 10  # the final accuracy is the mean over so many last rounds


class Experiment(NamedTuple):
  """All parts of a run, built and checked."""
  config: dict[str, Any]
  loaded: datasets.Dataset
  dataset: datasets.Dataset  # without what became public
  parts: list[np.ndarray]  # row indices of each client
  data: base.Data
  schedule: base.Cohort    # leading axis [T]
  model: base.Model
  method: base.Method
  federation: base.Federation


def build(config: dict[str, Any], data_dir: str | None = None) -> Experiment:
  """Loads the data and builds the federation that `config` asks for.

  Raises:
    flags.UsageError: where data and configuration do not fit.
  """
  loaded = _checked('dataset', config, _load, config['dataset'], data_dir)
  dataset, public = _public(config, loaded)
  parts = _partition(config, dataset)
  schedule = _schedule(config, parts)
  model = _checked(
      'model', config, models.build, config['model'], dataset.image_shape,
      dataset.num_classes, mean=dataset.mean, std=dataset.std,
      norm=config['norm'], conv=config['conv'],
      projection_dim=config['projection_dim'],
      torch_bn=config.get('torch_bn', True))
  method = _method(config, dataset, model)
  steps = config['local_steps'] or None
  solver = solvers.local_sgd(
      _decayed(config['learning_rate'], config),
      batch_size=config['batch_size'],
      epochs=None if steps else config['local_epochs'], steps=steps,
      weight_decay=config['weight_decay'],
      clip_norm=config['clip_norm'] or None)
  fed = federation.federation(
      model, method, solver, len(parts), weighting=config['weighting'],
      client_chunk=config['client_chunk'],
      mesh=devices.mesh(config['num_devices']))
  data = clients.from_partition(
      dataset.train_x, dataset.train_y, parts, public)
  return Experiment(
      config, loaded, dataset, parts, data, schedule, model, method, fed)


_load = functools.lru_cache(maxsize=1)(datasets.load)


def _checked(flag, config, function, *args, **kwargs):
  try:
    return function(*args, **kwargs)
  except ValueError as error:
    raise flags.UsageError(flag, config[flag], str(error)) from error


def _decayed(rate, config):
  return lambda round_: rate * config['lr_decay'] ** round_


def _method(config, dataset, model) -> base.Method:
  """The method under the policy for BatchNorm statistics."""
  options = {part: _options(part, config)
             for part in recipes.parse(config['method'])}
  generator = None
  if recipes.generates(config['method']):
    _check_num_labels(config, len(dataset.train_y))
    ftg = options.get('fed_ftg', {'options': fed_ftg.Options()})['options']
    generator = _checked(
        'dataset', config, fed_ftg.make_generator, ftg, dataset.image_shape,
        dataset.num_classes, noise_dim=config['noise_dim'],
        width=config['generator_width'], conv=config['conv'])
  settings = recipes.Settings(
      model, dataset.num_classes, recipes.server_optimizer(
          config['server_optimizer'], config['server_learning_rate']),
      generator, options)
  method = batch_norm.with_policy(
      config.get('batch_norm', 'aggregate'),
      recipes.build(config['method'], settings), model, config['batch_size'])
  if config.get('evaluate_all'):
    method = base.chain(method, evaluation.last_models())
  return method


def _options(part, config) -> dict[str, Any]:
  """The arguments of a method's function, from its flags."""
  prefix = flags.PREFIXES.get(part)
  values = {k[len(prefix):]: v for k, v in config.items()
            if prefix and k.startswith(prefix)}
  if part == 'scaffold':
    return {
        'option': values['option'], 'batch_size': config['batch_size'],
        'untuned_reference': values['ref_untuned'],
        'learning_rate': config['learning_rate'] if values['lr0'] else None}
  if part == 'q_fed_avg':
    return {**values, 'batch_size': config['batch_size']}
  kind = {'fed_ftg': fed_ftg.Options, 'fed_df': fed_df.Options,
          'fed_df_public': fed_df.Options}.get(part)
  if kind is None:
    return values
  chosen = {k: v for k, v in values.items() if k in kind._fields}
  for name in {'student_lr', 'generator_lr'} & chosen.keys():
    chosen[name] = _decayed(chosen[name], config)
  return {'options': kind(**chosen, weight_decay=config['weight_decay'])}


def _check_num_labels(config, num_examples) -> None:
  """Refuses more steps than labels can be counted for, see `distillation`."""
  for flag, batch, of_all in (
      ('ftg_iterations', 'ftg_batch_size', 1),
      ('df_generator_steps', 'df_batch_size', 2),
      ('df_student_steps', 'df_batch_size', 2)):
    if flag in config:
      most = (2**32 - 1) // (of_all * num_examples * config[batch])
      if config[flag] > most:
        raise flags.UsageError(
            flag, config[flag], f'must be at most {most} with {num_examples} '
            f'examples and batches of {config[batch]}')


def _partition(config, dataset) -> list[np.ndarray]:
  kind, labels = config['partition'], dataset.train_y
  if kind.startswith('file:'):
    return _checked('partition', config, partition.load, kind[len('file:'):],
                    len(labels))
  shared = dict(seed=config['partition_seed'], sigma=config['size_sigma'])
  if kind == 'iid':
    return _checked('num_clients', config, partition.iid, labels,
                    config['num_clients'], **shared)
  return _checked('num_clients', config, partition.dirichlet, labels,
                  config['num_clients'], config['dirichlet_alpha'], **shared)


def _public(config, dataset):
  """The data set without the images that become public, and those."""
  kind, _, rest = config.get('public_data', '').partition(':')
  if kind == 'npz':
    return dataset, _checked(
        'public_data', config, datasets.read_images, rest, dataset)
  if not kind:
    return dataset, ()
  num, total = int(rest), len(dataset.train_y)
  if num >= total:
    raise flags.UsageError(
        'public_data', config['public_data'],
        f'must leave some of the {total} training images to the clients')
  order = np.random.RandomState([config.get('partition_seed', 0), 1]).permutation(
      total)
  kept = np.sort(order[num:])
  return dataset._replace(
      train_x=dataset.train_x[kept], train_y=dataset.train_y[kept]
      ), dataset.train_x[order[:num]]


def _schedule(config, parts) -> base.Cohort:
  kind, num_rounds, num_clients = (
      config['schedule'], config['rounds'], len(parts))
  if kind.startswith('file:'):
    schedule = _checked('schedule', config, schedules.load, kind[len('file:'):],
                        num_rounds, num_clients)
    return _checked('schedule', config, federation.check_schedule, schedule,
                    num_clients)
  make = schedules.exact if kind == 'exact' else schedules.bernoulli
  seed = config['schedule_seed']
  available = schedules.availability(
      num_clients, config['min_availability'], seed)
  schedule = _checked('cohort', config, make, num_rounds, num_clients,
                      config['cohort'], seed, available)
  schedule = schedules.with_dropouts(schedule, config['dropout_rate'], seed)
  batches = -(-np.array([len(part) for part in parts]) // config['batch_size'])
  steps = config['local_steps'] or config['local_epochs'] * batches
  return schedules.with_stragglers(
      schedule, np.broadcast_to(steps, num_clients), config['straggler_rate'],
      seed)


def with_seeds(experiment: Experiment, config: dict[str, Any]) -> Experiment:
  """The same compiled parts with the partition and schedule of `config`."""
  dataset, public = _public(config, experiment.loaded)
  parts = _partition(config, dataset)
  return experiment._replace(
      config=config, dataset=dataset, parts=parts,
      schedule=_schedule(config, parts), data=clients.from_partition(
          dataset.train_x, dataset.train_y, parts, public))


# Folders of runs


def contents(config: dict[str, Any]) -> dict[str, str]:
  """Fingerprints of the files that the configuration names."""
  named = {}
  for flag in ('dataset', 'partition', 'schedule', 'public_data'):
    _, _, path = config.get(flag, '').partition(':')
    if path and not config[flag].startswith('train:'):
      digest = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
      named[f'{flag} file'] = digest[:16]
  return named


def identity(config: dict[str, Any]) -> dict[str, Any]:
  """What tells runs apart: all but the number of rounds."""
  return {k: v for k, v in {**config, **contents(config)}.items()
          if k != 'rounds'}


def folder_name(text: str) -> str:
  """`text` as the name of a folder; a long one is cut and made unique."""
  name = re.sub(r'[^\w+=.,-]', '_', text)
  digest = hashlib.sha256(text.encode()).hexdigest()[:8]
  return name if len(name) <= 80 else f'{name[:70]}-{digest}'


def default_folder(config: dict[str, Any], *words: str) -> pathlib.Path:
  """A folder in runs/ named after the configuration."""
  digest = hashlib.sha256(
      json.dumps([identity(config), words], sort_keys=True).encode()).hexdigest()
  words = words or (config['method'], config['dataset'].split(':')[0],
                    f'seed{config["seed"]}')
  return pathlib.Path('runs') / f'{folder_name("-".join(words))}-{digest[:8]}'


def is_finished(folder: pathlib.Path, config: dict[str, Any]) -> bool:
  """Whether `folder` holds this run with at least so many rounds, finished.

  Raises:
    flags.UsageError: if it holds anything else.
  """
  check_folder(folder, identity(config))
  summary = folder / 'summary.json'
  return summary.exists() and (
      json.loads(summary.read_text())['rounds'] >= config['rounds'])


def check_folder(folder: pathlib.Path, ours: dict[str, Any]) -> None:
  """Refuses a folder that one cannot write to, or that holds something else.

  Args:
    folder: where to write.
    ours: what is going to be written there, as in its config.json.

  Raises:
    flags.UsageError: with what it holds.
  """
  nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
  if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
    raise flags.UsageError(
        'workdir', folder, f'cannot be written: {nearest} must be a folder that '
        'one may write to')
  path = folder / 'config.json'
  if not path.exists():
    if folder.exists() and any(p.name[0] != '.' for p in folder.iterdir()):
      raise flags.UsageError(
          'workdir', folder, 'holds other files; choose an empty or a new folder')
    return
  try:
    saved = json.loads(path.read_text())
    there = {**saved['config'], **saved['contents']}
  except (ValueError, KeyError, TypeError) as error:
    raise flags.UsageError(
        'workdir', folder, 'its config.json cannot be read; remove the folder or '
        'choose another') from error
  if there.get('program') != ours.get('program'):
    raise flags.UsageError(
        'workdir', folder, 'holds a comparison; choose another folder'
        if 'program' in there else 'holds a single run; choose another folder')
  for name in sorted((ours.keys() | there.keys()) - {'rounds'}):
    if there.get(name) != ours.get(name):
      raise flags.UsageError(
          'workdir', folder, f'holds another configuration ({name}: '
          f'{there.get(name)}, not {ours.get(name)}); choose another folder')


def claim_folder(folder: pathlib.Path, config: dict[str, Any]) -> None:
  """Writes config.json, by which `check_folder` knows the folder again."""
  files.write_json(folder / 'config.json', {
      'config': config, 'contents': contents(config),
      'versions': progress.versions()})


# Training


def train(
    experiment: Experiment,
    seeds: Sequence[int],
    folders: Sequence[pathlib.Path],
    label: str,
) -> None:
  """Trains once per seed, all at once, and writes each run into its folder.

  Args:
    experiment: from `build`.
    seeds: of the training; several are a mapped axis of one program.
    folders: one per seed.
    label: what to call the run on the screen.
  """
  put = functools.partial(
      devices.put, num_devices=experiment.config['num_devices'])
  experiment = experiment._replace(data=put(experiment.data))
  several = len(seeds) > 1
  fed = experiment.federation
  fed = _over_seeds(fed) if several else fed
  key = jnp.stack([jax.random.key(s) for s in seeds]) if several else (
      jax.random.key(seeds[0]))
  key_init, key_run = jnp.moveaxis(_split(key), -1, 0) if several else _split(key)
  clock = progress.Clock()
  state, key_run = put((fed.init(key_init), key_run))
  traffic = experiment.federation.traffic(
      _one_seed(state, 0, several), experiment.data)
  runs = [Run(experiment, folder, seed, traffic)
          for folder, seed in zip(folders, seeds)]
  test = put((experiment.dataset.test_x, experiment.dataset.test_y))
  num_rounds = experiment.config['rounds']
  # The mean of statistics that clients keep to themselves says nothing.
  local = experiment.config.get('batch_norm') == 'local'
  client_test = local and put(clients.from_partition(
      experiment.dataset.test_x, experiment.dataset.test_y, partition.like(
          experiment.dataset.test_y, experiment.dataset.train_y,
          experiment.parts)))

  with progress.Progress(label, num_rounds) as bar:
    def evaluate(done, state, info):
      jax.block_until_ready(state)
      clock.lap('train')
      variants = {'broadcast': state.variables, **info.models}
      if experiment.config.get('evaluate_all'):
        variants['all'] = _mean_of_all(experiment, state, several)
      for r, run in enumerate(runs):
        scores = {
            name: jax.tree.map(float, evaluation.evaluate(
                experiment.model, _one_seed(v, r, several), *test, 500, local))
            for name, v in variants.items()}
        if local:
          scores['own_statistics'] = _with_own_statistics(
              experiment, _one_seed(state, r, several), client_test)
        metrics = {k: v[r] if several else v for k, v in info.metrics.items()}
        run.add(done, metrics, scores)
      clock.lap('evaluate')
      timing = clock.row(done)
      for run in runs:
        run.add_timing(timing)
      bar.update(done, np.mean([run.accuracy for run in runs]), clock.rate(done))

    state, _ = federation.run(
        fed, state, experiment.data, experiment.schedule, key_run,
        every=min(experiment.config['eval_every'], num_rounds),
        callback=evaluate)
  for r, run in enumerate(runs):
    run.finish(_one_seed(state, r, several), clock)


def _mean_of_all(experiment, state, several):
  """The mean over all clients' last models, as the federation weighs them."""
  count = experiment.data.count
  if experiment.config['weighting'] == 'uniform':
    count = jnp.ones_like(count)
  mean = functools.partial(
      evaluation.mean_of_last_models, weight=count.astype(float))
  (_, last), _ = state.clients
  return jax.vmap(mean)(last) if several else mean(last)


def _with_own_statistics(experiment, state, client_test):
  """Mean scores of the broadcast model over clients, each with its own
  statistics on a test split like its training data."""
  slots, _ = state.clients
  if experiment.config.get('evaluate_all'):
    slots, _ = slots
  (stats, seen), _ = slots
  stats = jax.vmap(trees.where, (0, 0, None))(
      seen, stats, state.variables.stats)
  scores = evaluation.evaluate_clients(
      experiment.model, state.variables.params, stats, client_test)
  return {name: float(jnp.nanmean(value)) for name, value in scores.items()}


# Kept, so that a second group of seeds finds the program compiled.
_over_seeds = functools.lru_cache(maxsize=8)(federation.over_seeds)


def _split(key):
  return jax.vmap(jax.random.split)(key) if key.ndim else jax.random.split(key)


def _one_seed(tree, r, several):
  return jax.tree.map(lambda a: a[r], tree) if several else tree


class Run:
  """What one seed's run writes into its folder."""

  def __init__(self, experiment: Experiment, folder: pathlib.Path, seed: int,
               traffic: tuple[int, int]):
    """`traffic`: bits down and up for one client and round."""
    self._experiment, self._folder, self._seed = experiment, folder, seed
    self._bits_down, self._bits_up = traffic
    self._rows, self._timings = [], []
    self._down = self._up = 0  # bytes so far
    config = {**experiment.config, 'seed': seed}
    claim_folder(folder, config)
    if devices.is_first():
      (folder / 'summary.json').unlink(missing_ok=True)
    with files.replacing(folder / 'partition.npz') as temporary:
      partition.save(temporary, experiment.parts)
    with files.replacing(folder / 'schedule.npz') as temporary:
      schedules.save(temporary, experiment.schedule, len(experiment.parts))

  @property
  def accuracy(self) -> float:
    return self._rows[-1]['test_accuracy']

  @property
  def rounds(self) -> int:
    return self._rows[-1]['round'] if self._rows else 0

  def add(self, done, metrics, scores) -> None:
    """Adds the evaluation after `done` rounds and rewrites metrics.jsonl.

    `metrics` are those of the rounds since the last evaluation.
    """
    if not np.isfinite(scores['broadcast']['loss']):
      raise flags.RunError(
          f'{self._folder}: the model is no longer finite after a round between '
          f'{self.rounds + 1} and {done}; the rows up to round {self.rounds} are '
          'kept. A smaller --learning_rate or --clip_norm may help')
    self._down += int(metrics.pop('num_selected').sum()) * self._bits_down // 8
    self._up += int(metrics.pop('num_arrived').sum()) * self._bits_up // 8
    losses = {k: _number(np.nanmean(v) if np.isfinite(v).any() else np.nan)
              for k, v in metrics.items()}
    self._rows.append({
        'round': done, 'train_loss': losses.pop('train_loss'),
        'test_loss': _number(scores['broadcast']['loss']),
        'test_accuracy': _number(scores['broadcast']['accuracy']),
        'accuracy': {k: _number(v['accuracy']) for k, v in scores.items()},
        'bytes_up': self._up, 'bytes_down': self._down, **losses})
    files.write_jsonl(self._folder / 'metrics.jsonl', self._rows)

  def add_timing(self, timing) -> None:
    self._timings.append(timing)
    files.write_jsonl(self._folder / 'timings.jsonl', self._timings)

  def finish(self, state, clock) -> None:
    """Writes the model, the pictures and, last, the summary."""
    experiment, folder = self._experiment, self._folder
    files.write_tree(folder / 'params.npz', state.variables._asdict())
    if experiment.method.synthesise is not None:
      with files.replacing(folder / 'generated.png') as temporary:
        plots.generated(
            temporary, experiment.method.synthesise, state.shared,
            experiment.dataset.num_classes)
    with files.replacing(folder / 'curves.png') as temporary:
      plots.curves(temporary, {
          name: [[(row['round'], megabytes(row), row['accuracy'][name])
                  for row in self._rows]]
          for name in self._rows[-1]['accuracy']}, 'test accuracy')
    files.write_json(folder / 'summary.json', {
        'method': experiment.config['method'], 'seed': self._seed,
        **summarise(self._rows),
        'bits_down_per_client': self._bits_down,
        'bits_up_per_client': self._bits_up, **clock.total()})


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
  """The figures of a run, from the rows of its metrics.jsonl."""
  last = rows[-1]
  tail = [r for r in rows if r['round'] > last['round'] - FINAL_ROUNDS]
  return {
      'rounds': last['round'],
      'final_accuracy': _number(np.mean([r['test_accuracy'] for r in tail])),
      'best_accuracy': max(r['test_accuracy'] for r in rows),
      'final_accuracy_of': {
          name: _number(np.mean([r['accuracy'][name] for r in tail]))
          for name in last['accuracy']},
      'bytes_up': last['bytes_up'], 'bytes_down': last['bytes_down']}


def megabytes(row: dict[str, Any]) -> float:
  """What has been sent, up and down, by a row of metrics.jsonl."""
  return (row['bytes_up'] + row['bytes_down']) / 1e6


def _number(value) -> float | None:
  """A float of six digits, None (JSON's null) if it is not finite."""
  return float(f'{value:.6g}') if np.isfinite(value) else None
