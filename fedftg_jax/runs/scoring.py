"""Evaluates models, clients and generated images between rounds."""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedftg_jax import evaluation, influence
from fedftg_jax import models as models_lib
from fedftg_jax.base import Data
from fedftg_jax.configuration import flags
from fedftg_jax.configuration.assembly import Experiment
from fedftg_jax.data import clients
from fedftg_jax.data import images as images_lib

_BATCH = 500  # examples at once
_PICTURED = 10  # classes, at most, of which an image is kept per evaluation
_PER_CLASS = 8  # images of each class in the end
_COMPARED = 100  # training images whose nearest other ones are looked for


class Scores(NamedTuple):
  """Scores of one evaluation of one seed, on the host."""

  # Of each different model: loss, accuracy and, but for a mean of clients,
  # per_class and, of few classes, confusion.
  models: Mapping[str, Mapping[str, Any]]
  same: Mapping[str, str]  # of other names the model that they are
  # See `evaluation.evaluate_clients`; {} if not asked for.
  clients: Mapping[str, Mapping[str, np.ndarray]]
  # Loss and accuracy of the broadcast model on what is kept apart; {} if
  # nothing is.
  validation: Mapping[str, Any]
  # Of each tracked client, see `influence.on_test` (on what is kept apart, if
  # anything is); and own_loss, the broadcast model's on the client's training
  # examples. {} without tracked clients.
  influence: Mapping[str, np.ndarray]
  finite: bool  # whether all of the model and of the server's slot is
  # [C', H, W, channels] uint8, of each class the same noise every time; None
  # without a generator.
  images: np.ndarray | None


def at_once(experiment: Experiment) -> int:
  """Returns how many clients are evaluated at once.

  With --client_chunk=auto it is one: the chunk was made to fit training, and
  the batches here are larger.
  """
  if experiment.config['client_chunk'] == flags.AUTO:
    return 1
  cohort = experiment.problem.schedule.client_id.shape[1]
  return experiment.simulation.client_chunk or cohort


def evaluated_clients(experiment: Experiment) -> np.ndarray | None:
  """Returns the clients that are evaluated, ascending; None for all.

  In a large federation they are spread evenly over the clients that have test
  examples, as many as `--evaluated_clients` says.
  """
  tests = experiment.problem.tests
  most = experiment.config['evaluated_clients']
  if not 0 < most < len(tests):
    return None
  able = np.flatnonzero(tests.sizes)
  if not len(able):
    able = np.arange(len(tests))
  if most < len(able):
    able = able[np.linspace(0, len(able) - 1, most).round().astype(int)]
  return able


def scorer(experiment: Experiment, data: Data, put: Callable) -> Callable:
  """Prepares the evaluations of a run.

  Args:
    experiment: from `assembly.build`.
    data: its data, on the devices.
    put: puts a tree on the devices in use.

  Returns:
    A function (rounds done, state, models of the round, which of them are one,
    base key) -> Scores, of one seed; all processes have to call it.
  """
  config, dataset = experiment.config, experiment.problem.dataset
  simulation = experiment.simulation
  model = simulation.model
  test = put(
    clients.from_partition(
      dataset.test_x, dataset.test_y, experiment.problem.tests
    )
  )
  validation = dataset.validation_x is not None and put(
    (dataset.validation_x, dataset.validation_y)
  )
  # The mean of statistics that clients keep to themselves says nothing.
  local = config['batch_norm'] == 'local'
  when = config['evaluate_clients']
  of_clients = functools.partial(
    evaluation.evaluate_clients,
    simulation.federation,
    chunk=at_once(experiment),
    batch_size=_BATCH,
  )
  some = evaluated_clients(experiment)
  draw = simulation.synthesise

  def of_tracked(state, key):
    x, y = validation or (test.x, test.y)
    found = influence.on_test(model, state, x, y, _BATCH, local)
    own = of_clients(state, data, data, key)['broadcast']['loss']
    return {**found, 'own_loss': own[np.array(simulation.tracked)]}

  def score(done, state, models, same, key):
    same = dict(same)
    by_tracked = of_tracked(state, key) if simulation.tracked else {}
    state = influence.untracked(state)
    variants = {'broadcast': state.variables, **models}
    if config['evaluate_all']:
      variants['all'] = _mean_of_all(experiment, state)
    scores = {
      name: evaluation.evaluate(model, variables, test.x, test.y, _BATCH, local)
      for name, variables in variants.items()
      if name not in same
    }
    kept_apart = (
      validation
      and evaluation.evaluate(
        model, state.variables, *validation, _BATCH, local
      )
      or {}
    )
    asked = when == 'every' or when == 'final' and done == config['rounds']
    by_client = {}
    if asked or local:
      by_client = jax.device_get(
        of_clients(
          state,
          data,
          test,
          key,
          ids=some,
          personalise=asked and config['personalise'],
          by_class=asked and config['clients_by_class'],
        )
      )
    if local:
      scores['own_statistics'] = {
        name: np.nanmean(by_client['broadcast'][name])
        for name in ('loss', 'accuracy')
      }
    scores, by_client, kept_apart, by_tracked = jax.device_get(
      (scores, by_client if asked else {}, kept_apart, by_tracked)
    )
    return Scores(
      scores,
      same,
      by_client,
      kept_apart,
      by_tracked,
      _all_finite((state.variables, state.shared)),
      draw and _images(draw, state.shared, dataset.num_classes),
    )

  return score


# On the host, where nothing has to be compiled first.
def _all_finite(tree) -> bool:
  return all(np.isfinite(a).all() for a in jax.tree.leaves(tree))


def _mean_of_all(experiment, state):
  """Returns the mean of all clients' last models, weighted as in a round."""
  count = experiment.problem.data.count
  if experiment.config['weighting'] == 'uniform':
    count = jnp.ones_like(count)
  (*_, last), _ = state.clients
  return evaluation.mean_of_last_models(last, count.astype(float))


def _images(draw, shared, num_classes):
  """Draws one image of each of the first classes, as bytes."""
  return _as_bytes(_drawn(draw, shared, num_classes))


def _drawn(draw, shared, num_classes):
  return _of_labels(draw, shared, jnp.arange(min(num_classes, _PICTURED)))


def _of_labels(draw, shared, labels):
  return np.asarray(draw(shared, labels, jax.random.key(0)))


def _as_bytes(images):
  images = np.nan_to_num(
    images, posinf=0, neginf=0
  )  # a generator that diverged
  return np.round(255 * images_lib.scaled(images)).astype(np.uint8)


def of_each_class(experiment: Experiment, state) -> np.ndarray:
  """Draws images of every class, [C, n, H, W, channels].

  They are in the space of the model's float inputs.
  """
  num_classes = experiment.problem.dataset.num_classes
  labels = jnp.repeat(jnp.arange(num_classes), _PER_CLASS)
  images = _of_labels(experiment.simulation.synthesise, state.shared, labels)
  return images.reshape(num_classes, _PER_CLASS, *images.shape[1:])


def nearest_real(experiment: Experiment, state) -> dict[str, np.ndarray]:
  """Finds the training images that are nearest to some generated images.

  Only a simulation can do this: no real server has the clients' images.
  Distances are root mean squares over pixels, after the model's normalisation.

  Returns:
    generated and real, [C', H, W, channels] uint8, each scaled to its own
    range; label and distance of the real ones, [C']; and between_real, the
    median distance of a training image from the nearest other one.
  """
  dataset = experiment.problem.dataset
  draw = experiment.simulation.synthesise
  made = _drawn(draw, state.shared, dataset.num_classes)

  def seen(x):
    return np.asarray(models_lib.normalise(x, dataset.mean, dataset.std))

  nearest, distance = _nearest(made, dataset.train_x, seen)
  some = np.unique(
    np.linspace(0, len(dataset.train_x) - 1, _COMPARED).astype(int)
  )
  between = _nearest(seen(dataset.train_x[some]), dataset.train_x, seen, some)[
    1
  ]
  return {
    'generated': _as_bytes(made),
    'real': _as_bytes(seen(dataset.train_x[nearest])),
    'label': dataset.train_y[nearest],
    'distance': distance,
    'between_real': np.median(between),
  }


def _nearest(images, real, seen, without=None):
  """Returns the index in `real` and the distance of the nearest images.

  With `without`, image i is not compared with row without[i] of `real`.
  """
  flat = images.reshape(len(images), -1)
  squares = []
  for first in range(0, len(real), _BATCH):
    part = seen(real[first : first + _BATCH]).reshape(-1, flat.shape[1])
    squares.append(
      np.sum(flat**2, 1)[:, None] - 2 * flat @ part.T + np.sum(part**2, 1)
    )
  square = np.concatenate(squares, axis=1)
  if without is not None:
    square[np.arange(len(flat)), without] = np.inf
  found = np.argmin(square, axis=1)
  least = np.maximum(square[np.arange(len(flat)), found], 0)
  return found, np.sqrt(least / flat.shape[1])
