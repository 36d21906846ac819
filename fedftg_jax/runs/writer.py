"""Writes the files of a run into its folder."""

from typing import Any

import numpy as np
from upath import UPath

from fedftg_jax import base, evaluation, influence, privacy
from fedftg_jax.configuration import folders
from fedftg_jax.configuration.assembly import Experiment
from fedftg_jax.data import datasets, partition, schedules, skew
from fedftg_jax.results import crate, plots, rows, styles
from fedftg_jax.runs import callbacks, personal, scoring
from fedftg_jax.system import cli, clock, devices, files

IMAGES = 'model_input.json'  # in a run's folder, see `describe`
MODELS = 'models.npz'  # in a run's folder: other models of the server
_KEPT_IMAGES = 12  # evaluations of which generated images are kept, at most
_LISTED = 10_000  # clients, at most, whose scores are listed in clients.json
_SCORES = 'clients.npz'  # the scores of more clients


class RunWriter:
  """Writes the files of one seed's run.

  Its state is that of its files: `_rows` of metrics.jsonl, `_timings` of
  timings.jsonl, `_clients` of clients.json, `_images` of generated.npz.
  """

  def __init__(
    self, experiment: Experiment, folder: UPath, seed: int, done: int = 0
  ):
    """Prepares the folder: keeps only what is of the first `done` rounds."""
    self._experiment, self._folder, self._seed = experiment, folder, seed
    self._rows, self._timings, self._clients, self._images = [], [], {}, {}
    self._down = self._up = 0  # bytes so far
    config = {**experiment.config, 'seed': seed}
    folders.claim_folder(folder, config)
    if devices.is_first():
      files.remove_parts(folder)
      if done:
        try:
          self._read(done)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
          raise cli.RunError(
            f'{folder}: a file of the run is damaged '
            f'({type(error).__name__}: {error}); put it right, or delete it to '
            'go on without what it says'
          ) from error
      stale = [
        'summary.json',
        'report.html',
        crate.NAME,
        'nearest.npz',
        'images.npz',
        personal.NAME,
        MODELS,
      ]
      if not done:
        stale += ['clients.json', _SCORES, 'generated.npz']
      for name in stale:
        (folder / name).unlink(missing_ok=True)
    with files.replacing(folder / 'partition.npz') as temporary:
      partition.save(temporary, experiment.problem.drawn)
    with files.replacing(folder / 'schedule.npz') as temporary:
      schedules.save(
        temporary, experiment.problem.schedule, len(experiment.problem.parts)
      )
    self._counts = label_counts(experiment)
    files.write_tree(folder / 'counts.npz', self._counts, compressed=True)
    self._evaluated = scoring.evaluated_clients(experiment)
    files.write_json(folder / IMAGES, describe(experiment.problem.dataset))

  def _read(self, done: int) -> None:
    """Reads the files of the first `done` rounds."""
    folder = self._folder
    self._rows, self._timings = (
      [row for row in files.read_jsonl(folder / name) if row['round'] <= done]
      for name in ('metrics.jsonl', 'timings.jsonl')
    )
    self._up, self._down = (
      self._rows[-1][name] for name in ('bytes_up', 'bytes_down')
    )
    if (folder / 'clients.json').exists():
      clients = files.read_json(folder / 'clients.json')
      self._clients = clients if clients['round'] <= done else {}
    if (folder / 'generated.npz').exists():
      images = files.read_arrays(folder / 'generated.npz')
      rounds = {name: int(name.rpartition('_')[2]) for name in images}
      self._images = {
        t: images[name] for name, t in rounds.items() if t <= done
      }

  @property
  def accuracy(self) -> float:
    return self._rows[-1]['test_accuracy'] if self._rows else np.nan

  @property
  def rounds(self) -> int:
    return self._rows[-1]['round'] if self._rows else 0

  def add(self, done: int, metrics, scores: scoring.Scores) -> None:
    """Adds the evaluation after `done` rounds and rewrites the files.

    Args:
      done: number of rounds.
      metrics: metrics of the rounds since the last evaluation, one row each.
      scores: of the evaluation.

    Raises:
      cli.Diverged: if the loss or the state is not finite; it names the rounds
        in which that happened.
    """
    broadcast = scores.models['broadcast']
    if not (scores.finite and np.isfinite(broadcast['loss'])):
      *rates, last = (
        f'--{name}'
        for name in self._experiment.config
        if name == 'learning_rate'
        or name.endswith(('_lr', '_clip', 'clip_norm'))
      )
      raise cli.Diverged(
        f'{self._folder}: the model is no longer finite after a round between '
        f'{self.rounds + 1} and {done}; the rows up to round {self.rounds} and '
        f'the checkpoints are kept. A smaller {", ".join(rates)} or {last} may '
        'help (a clip of 0 is none)'
      )
    self._down += int(metrics.pop('bits_down').sum()) // 8
    self._up += int(metrics.pop('bits_up').sum()) // 8
    del metrics['num_selected'], metrics['num_arrived']
    measured = {
      k: rows.number(np.nanmean(v) if np.isfinite(v).any() else np.nan)
      for k, v in metrics.items()
    }
    row: dict[str, Any] = {
      'round': done,
      'train_loss': measured.pop('train_loss'),
      'test_loss': rows.number(broadcast['loss']),
      'test_accuracy': rows.number(broadcast['accuracy']),
      'accuracy': {
        k: rows.number(v['accuracy'])
        for k, v in scores.models.items()
        if k != 'broadcast'
      },
      'same_models': scores.same,
      'class_accuracy': [*map(rows.number, broadcast['per_class'])],
      **{
        f'validation_{k}': rows.number(scores.validation[k])
        for k in ('loss', 'accuracy')
        if scores.validation
      },
      'bytes_up': self._up,
      'bytes_down': self._down,
    }
    if scores.influence:
      row['influence'] = {
        name: [*map(rows.number, values)]
        for name, values in scores.influence.items()
      }
    row = base.merged('metric', row, measured | self._privacy(done))
    self._rows.append({**row, **_class_change(scores)})
    self._add_classes(done, scores.models)
    if scores.clients:
      self._add_clients(done, scores.clients)
    if scores.images is not None:
      self._add_images(done, scores.images)
    files.write_csv(self._folder / 'metrics.csv', [*map(rows.flat, self._rows)])
    files.write_jsonl(self._folder / 'metrics.jsonl', self._rows)

  def _privacy(self, done):
    """Returns epsilon so far; nothing without noise."""
    config = self._experiment.config
    if not config['dp_noise']:
      return {}
    rate = config['cohort'] / len(self._experiment.problem.parts)
    found = privacy.epsilon(done, rate, config['dp_noise'], config['dp_delta'])
    return {'dp/epsilon': rows.number(found)}

  def _add_classes(self, done, models) -> None:
    """Writes each model's accuracy on each class, and the confusion matrix.

    Both are those of the last evaluation; the matrix is that of the broadcast
    model.
    """
    confusion = models['broadcast'].get('confusion')
    files.write_json(
      self._folder / 'classes.json',
      {
        'round': done,
        'test_examples': np.bincount(
          self._experiment.problem.dataset.test_y,
          minlength=self._experiment.problem.dataset.num_classes,
        ).tolist(),
        'accuracy': {
          name: [*map(rows.number, v['per_class'])]
          for name, v in models.items()
          if 'per_class' in v
        },
        **({} if confusion is None else {'confusion': confusion.tolist()}),
      },
    )

  def _add_clients(self, done, scores) -> None:
    """Writes the clients' scores of the last evaluation of clients.

    The scores of many clients are arrays in a file of their own. The rows of
    metrics.jsonl have their summary only if clients are evaluated every time:
    the rows of a run must be the first rows of a longer run.
    """
    counts, which = self._counts, {}
    if self._evaluated is not None:
      counts = {split: of[self._evaluated] for split, of in counts.items()}
      which = {'ids': self._evaluated}
    summary = {
      name: {
        k: x if isinstance(x, int) else rows.number(x)
        for k, x in {
          **evaluation.fairness(v['accuracy'], counts['test'].sum(1)),
          **_distributions(v, counts['train']),
        }.items()
      }
      for name, v in scores.items()
    }
    if self._experiment.config['evaluate_clients'] == 'every':
      self._rows[-1]['clients'] = summary
    self._clients = {'round': done, 'summary': summary}
    of_clients = {
      **which,
      **{f'{split}_examples': of.sum(1) for split, of in counts.items()},
      **{
        score: {name: v[score] for name, v in scores.items()}
        for score in ('accuracy', 'loss')
      },
    }
    if self._experiment.config['clients_by_class']:
      of_clients['class_accuracy'] = {
        name: v['per_class'] for name, v in scores.items()
      }
    if len(counts['train']) <= _LISTED:
      self._clients |= _listed(of_clients)
    else:
      files.write_tree(
        self._folder / _SCORES, {'round': np.int32(done), **of_clients}
      )
    files.write_json(self._folder / 'clients.json', self._clients)

  def _add_images(self, done, images) -> None:
    """Adds the images of an evaluation, and drops some of earlier ones."""
    kept = kept_rounds([row['round'] for row in self._rows])
    self._images = {t: a for t, a in self._images.items() if t in kept}
    self._images[done] = images
    files.write_tree(
      self._folder / 'generated.npz',
      {f'round_{t:06d}': a for t, a in self._images.items()},
    )

  def add_timing(self, timing) -> None:
    self._timings.append(timing)
    files.write_jsonl(self._folder / 'timings.jsonl', self._timings)

  def context(self, variables=()) -> callbacks.Context:
    """Returns the run for callbacks, with the broadcast model's variables."""
    return callbacks.Context(
      self._folder,
      self._experiment.config,
      self._seed,
      self._experiment.simulation.model,
      variables,
      self._rows,
      self._timings,
      self._images,
    )

  def finish(self, state, personal_models=()) -> None:
    """Writes the model, the pictures and, last, the summary.

    Args:
      state: after the last round.
      personal_models: of the clients, see `personal.save`.
    """
    experiment, folder = self._experiment, self._folder
    state = influence.untracked(state)
    files.write_tree(folder / 'params.npz', state.variables._asdict())
    others = {
      name: variables._asdict()
      for name, variables in experiment.simulation.method.models(
        state.shared
      ).items()
    }
    if others:
      files.write_tree(folder / MODELS, others)
    personal.save(folder, personal_models, experiment.config['model'])
    if experiment.simulation.method.synthesise is not None:
      images = scoring.of_each_class(experiment, state)
      files.write_tree(
        folder / 'images.npz', {'round': np.int32(self.rounds), 'x': images}
      )
      with files.replacing(folder / 'generated.png') as temporary:
        plots.generated(
          temporary, images, experiment.problem.dataset.class_names
        )
      if len(experiment.problem.dataset.train_x) > 1:
        files.write_tree(
          folder / 'nearest.npz',
          {
            'round': np.int32(self.rounds),
            **scoring.nearest_real(experiment, state),
          },
        )
    if not devices.is_first():
      return  # the rest is made of rows, which the first process has
    models = rows.different_models(self._rows)
    like = styles.of_models(models, experiment.config['method'])
    with files.replacing(folder / 'curves.png') as temporary:
      plots.curves(
        temporary,
        {title: [rows.curve(self._rows, m)] for title, m in models.items()},
        'test accuracy, percent',
        styles=styles.of(models, like),
      )
    clients = self._clients and {'clients': self._clients['summary']}
    files.write_json(
      folder / 'summary.json',
      {
        'method': experiment.config['method'],
        'seed': self._seed,
        **rows.summarise(self._rows),
        **clients,
        **_bits_per_client(experiment.problem, self._rows[-1]),
        **{
          f'{stage}_seconds': round(
            sum(row.get(f'{stage}_seconds', 0.0) for row in self._timings), 2
          )
          for stage in clock.STAGES
        },
      },
    )


def describe(dataset: datasets.Dataset) -> dict[str, Any]:
  """Describes the images that a model takes, its classes, and the data."""
  return {
    'image_shape': list(dataset.image_shape),
    'dtype': str(dataset.train_x.dtype),
    'num_classes': dataset.num_classes,
    'mean': list(dataset.mean),
    'std': list(dataset.std),
    'class_names': list(dataset.class_names),
    'data': datasets.fingerprints(dataset),
  }


def _bits_per_client(problem, row) -> dict[str, float]:
  """Returns the mean bits of a client and round, down and up."""
  ids, arrived = (
    a[: row['round']]
    for a in (problem.schedule.client_id, problem.schedule.arrived)
  )
  sizes = np.append(problem.parts.sizes, 0)
  counts = {
    'down': np.sum(ids < len(problem.parts)),
    'up': np.sum(arrived & (sizes[ids] > 0)),
  }
  return {
    f'bits_{way}_per_client': 8 * row[f'bytes_{way}'] / max(int(count), 1)
    for way, count in counts.items()
  }


def label_counts(experiment: Experiment) -> dict[str, np.ndarray]:
  """Counts the training and test examples of each client and class, [N, C]."""
  dataset = experiment.problem.dataset
  return {
    split: skew.class_counts(labels, parts, dataset.num_classes).astype(
      np.int32
    )
    for split, labels, parts in (
      ('train', dataset.train_y, experiment.problem.parts),
      ('test', dataset.test_y, experiment.problem.tests),
    )
  }


def _distributions(scores, counts):
  """Returns the mean accuracy in and out of the clients' distributions.

  Empty if the accuracy on each class is not known.
  """
  if 'per_class' not in scores:
    return {}
  found = evaluation.by_distribution(scores['per_class'], counts)
  return {f'{name}_distribution': np.nanmean(v) for name, v in found.items()}


def _listed(values):
  """Lists arrays for JSON: integers, or floats of six digits."""
  if isinstance(values, dict):
    return {name: _listed(value) for name, value in values.items()}
  values = np.asarray(values)
  if np.issubdtype(values.dtype, np.integer):
    return values.tolist()
  if values.ndim > 1:
    return [_listed(row) for row in values]
  return [*map(rows.number, values)]


def kept_rounds(rounds: list[int]) -> set[int]:
  """Chooses the evaluated rounds whose generated images are kept.

  These are the last one, and others at equal distances. A round that is chosen
  later on was chosen at every earlier time, too.
  """
  stride = 1
  while len(rounds) > stride * _KEPT_IMAGES:
    stride *= 2
  return {*rounds[::stride], rounds[-1]}


def _class_change(scores) -> dict[str, list[float | None]]:
  """Returns the change of the accuracy on each class by fine-tuning."""
  after, before = (
    scores.models.get(scores.same.get(name, name))
    for name in ('fine_tuned', 'aggregated')
  )
  if not after:
    return {}
  change = np.subtract(after['per_class'], before['per_class'])
  return {'class_change': [*map(rows.number, change)]}
