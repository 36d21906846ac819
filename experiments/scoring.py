"""What is looked at between chunks of rounds: models, clients, generated images."""

import functools
from typing import Any, Callable, Mapping, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import plots
from experiments.assembly import Experiment
from fedftg_jax import evaluation
from fedftg_jax.data import clients
from fedftg_jax.data import partition

_BATCH = 500     # examples at once
_PICTURED = 10   # classes, at most, of which an image is kept per evaluation


class Scores(NamedTuple):
  """What one evaluation of one seed gives, on the host."""
  models: Mapping[str, Mapping[str, Any]]  # of each variant: loss, accuracy and,
                                           # but for a mean of clients, per_class
  clients: Mapping[str, Mapping[str, np.ndarray]]  # see
                                # `evaluation.evaluate_clients`; {} if not asked for
  validation: Mapping[str, Any]  # loss and accuracy of the broadcast model on what
                                 # is kept apart; {} if nothing is
  finite: bool  # whether all of the model and of the server's slot is
  images: np.ndarray | None  # [C', H, W, channels] uint8, of each class the same
                             # noise every time; None without a generator


def scorer(experiment: Experiment, put: Callable) -> Callable:
  """Prepares the evaluations of a run.

  Args:
    experiment: from `assembly.build`, its data on the devices.
    put: puts a tree on the devices in use.

  Returns:
    A function (rounds done, state, models of the round, base key) -> Scores, of
    one seed; all processes have to call it.
  """
  config, dataset, model = experiment.config, experiment.dataset, experiment.model
  test = put(clients.from_partition(
      dataset.test_x, dataset.test_y, test_parts(experiment)))
  validation = dataset.validation_x is not None and put(
      (dataset.validation_x, dataset.validation_y))
  # The mean of statistics that clients keep to themselves says nothing.
  local = config.get('batch_norm') == 'local'
  when = config['evaluate_clients']
  chunk = config['client_chunk'] or experiment.schedule.client_id.shape[1]
  of_clients = functools.partial(
      evaluation.evaluate_clients, model, experiment.federation, chunk=chunk,
      batch_size=_BATCH)
  draw = experiment.method.synthesise and jax.jit(experiment.method.synthesise)

  def score(done, state, models, key):
    variants = {'broadcast': state.variables, **models}
    if config.get('evaluate_all'):
      variants['all'] = _mean_of_all(experiment, state)
    scores = {name: evaluation.evaluate(
        model, variables, test.x, test.y, _BATCH, local)
              for name, variables in variants.items()}
    kept_apart = validation and evaluation.evaluate(
        model, state.variables, *validation, _BATCH, local) or {}
    asked = when == 'every' or when == 'final' and done == config['rounds']
    by_client = {}
    if asked or local:
      by_client = jax.device_get(of_clients(
          state, experiment.data, test, key,
          personalise=asked and config['personalise']))
    if local:
      scores['own_statistics'] = {
          name: np.nanmean(v) for name, v in by_client['broadcast'].items()}
    return Scores(
        *jax.device_get((scores, by_client if asked else {}, kept_apart)),
        bool(_all_finite((state.variables, state.shared))),
        draw and _images(draw, state.shared, dataset.num_classes))

  return score


@jax.jit
def _all_finite(tree):
  return jnp.array([jnp.isfinite(a).all() for a in jax.tree.leaves(tree)]).all()


def test_parts(experiment: Experiment) -> list[np.ndarray]:
  """Each client's rows of the test set: classes fall to clients as in training."""
  dataset = experiment.dataset
  return partition.like(dataset.test_y, dataset.train_y, experiment.parts)


def _mean_of_all(experiment, state):
  """The mean over all clients' last models, as the federation weighs them."""
  count = experiment.data.count
  if experiment.config['weighting'] == 'uniform':
    count = jnp.ones_like(count)
  (_, last), _ = state.clients
  return evaluation.mean_of_last_models(last, count.astype(float))


def _images(draw, shared, num_classes):
  """One image of each of the first classes, as bytes."""
  labels = jnp.arange(min(num_classes, _PICTURED))
  images = plots.scaled(np.asarray(draw(shared, labels, jax.random.key(0))))
  return np.round(255 * images).astype(np.uint8)
