"""Training: rounds, evaluation between them, and a record of both."""

import functools
import pathlib
from typing import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments import devices
from experiments import progress
from experiments.assembly import Experiment
from experiments.records import Run
from fedftg_jax import evaluation
from fedftg_jax import federation
from fedftg_jax import trees
from fedftg_jax.data import clients
from fedftg_jax.data import partition


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
  dataset = experiment.dataset
  validation = dataset.validation_x is not None and put(
      (dataset.validation_x, dataset.validation_y))
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
        if validation:
          metrics |= {f'validation_{k}': v for k, v in evaluation.evaluate(
              experiment.model, _one_seed(state.variables, r, several),
              *validation, 500, local).items()}
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
