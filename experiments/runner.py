"""Training: rounds, evaluation between them, and a record of both."""

import functools
import pathlib
import shutil
from typing import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments import assembly
from experiments import devices
from experiments import progress
from experiments import scoring
from experiments.assembly import Experiment
from experiments.records import Run
from fedftg_jax import federation

CLIENTS = '.clients'  # in a run's folder: slots of clients, mapped


def train(
    experiment: Experiment,
    seeds: Sequence[int],
    folders: Sequence[pathlib.Path],
    label: str,
    tensorboard: bool = False,
) -> None:
  """Trains once per seed, all at once, and writes each run into its folder.

  Args:
    experiment: from `build`.
    seeds: of the training; several are a mapped axis of one program.
    folders: one per seed.
    label: what to call the run on the screen.
    tensorboard: whether each run also writes for TensorBoard.
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
  state = _initial_state(fed, key_init, experiment.config, folders[0])
  key_run = put(key_run)
  traffic = experiment.federation.traffic(
      _one_seed(state, 0, several), experiment.data)
  runs = [Run(experiment, folder, seed, traffic, tensorboard)
          for folder, seed in zip(folders, seeds)]
  score = scoring.scorer(experiment, put)
  num_rounds = experiment.config['rounds']

  with (assembly.matmul_precision(experiment.config),
        progress.Progress(label, num_rounds) as bar):
    def evaluate(done, state, info):
      jax.block_until_ready(state)
      clock.lap('train')
      for r, run in enumerate(runs):
        scores = score(done, *_one_seed(
            (state, info.models, key_run), r, several))
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
  shutil.rmtree(folders[0] / CLIENTS, ignore_errors=True)


def _initial_state(fed, key, config, folder):
  if config['client_state'] == 'disk':
    return fed.init(key, folder / CLIENTS / str(jax.process_index()))
  return fed.init(key)


# Kept, so that a second group of seeds finds the program compiled.
_over_seeds = functools.lru_cache(maxsize=8)(federation.over_seeds)


def _split(key):
  return jax.vmap(jax.random.split)(key) if key.ndim else jax.random.split(key)


def _one_seed(tree, r, several):
  return jax.tree.map(lambda a: a[r], tree) if several else tree
