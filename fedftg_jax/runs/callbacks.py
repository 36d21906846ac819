"""Calls functions and experiment trackers after each evaluation of a run.

A callback is any function of a row of metrics.jsonl and the run's `Context`:

  def show_worst_class(row, run):
    print(row['round'], min(row['class_accuracy']))

A `Tracker` is a callback that is also called when a run starts and ends. The
trackers for TensorBoard, Weights & Biases and MLflow import their packages when
a run starts. They log the same numbers as metrics.jsonl and timings.jsonl.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import importlib
import time
import types
from typing import Any, NamedTuple

import numpy as np
from upath import UPath

from fedftg_jax import base
from fedftg_jax.results import rows as rows_lib
from fedftg_jax.system import cli, files

# File in a run's folder: the run's id in each tracker, for a run that resumes.
IDS = 'trackers.json'


class Context(NamedTuple):
  """The state of a run at an evaluation.

  Attributes:
    folder: folder of the run.
    config: the flags on which the results depend, by name.
    seed: seed of the training.
    model: the classifier.
    variables: variables of the broadcast model; () before the first evaluation.
      The next rounds reuse their memory: copy what you keep.
    rows: rows of metrics.jsonl so far.
    timings: rows of timings.jsonl so far.
    images: generated images by round, as in generated.npz.
  """

  folder: UPath
  config: Mapping[str, Any]
  seed: int
  model: base.Model
  variables: base.Variables | tuple[()]
  rows: Sequence[Mapping[str, Any]]
  timings: Sequence[Mapping[str, Any]]
  images: Mapping[int, np.ndarray]


Callback = Callable[[Mapping[str, Any], Context], None]


class Tracker:
  """A callback that is also called when a run starts and ends."""

  def start(self, run: Context) -> None:
    """Begins to follow a run, which starts now.

    If the run resumes from a checkpoint, `run.rows` has the rows before it.
    """

  def __call__(self, row: Mapping[str, Any], run: Context) -> None:
    """Takes the row of an evaluation."""

  def finish(self, run: Context, failed: bool) -> None:
    """Ends the tracking of a run; `failed` is True after an exception."""


@contextlib.contextmanager
def following(
  callbacks: Sequence[Callback], begun: Context, now: Callable[[], Context]
) -> Iterator[None]:
  """Starts the trackers of a run, and finishes them when the context is left.

  Args:
    callbacks: the callbacks of one run, trackers among them.
    begun: the run at its start.
    now: returns the run at present.
  """
  started: list[Tracker] = []
  try:
    for tracker in callbacks:
      if isinstance(tracker, Tracker):
        tracker.start(begun)
        started.append(tracker)
    yield
  except BaseException:
    for tracker in started:
      tracker.finish(now(), True)
    raise
  for tracker in started:
    tracker.finish(now(), False)


class TensorBoard(Tracker):
  """Writes scalars and generated images for TensorBoard into the run's folder.

  A run that resumes writes the event file again, with all earlier rows. It uses
  tensorboardX and does not need TensorFlow.
  """

  FOLDER = 'tensorboard'

  def start(self, run):
    import tensorboardX  # slow to import

    folder = run.folder / self.FOLDER
    for old in folder.glob('events.out.tfevents.*'):
      old.unlink()
    self._writer = tensorboardX.SummaryWriter(str(folder))
    for row in [*map(rows_lib.flat, run.rows), *run.timings]:
      self._add(row)
    for done, images in run.images.items():
      self._add({'round': done}, images)

  def __call__(self, row, run):
    self._add(rows_lib.flat(row), run.images.get(row['round']))
    self._add(run.timings[-1])

  def finish(self, run, failed):
    self._writer.close()

  def _add(self, row, images=None):
    for name, value in _numbers(row).items():
      self._writer.add_scalar(name, value, row['round'])
    if images is not None:
      self._writer.add_images(
        'generated', images, row['round'], dataformats='NHWC'
      )
    self._writer.flush()


class WandB(Tracker):
  """Logs configuration, rows, images and summary to Weights & Biases.

  A run that resumes from a checkpoint keeps its id.
  """

  def __init__(self, project: str, **settings: Any):
    """Makes the tracker; a run starts it.

    Args:
      project: name of the project.
      **settings: further arguments of `wandb.init`, such as mode='offline'.
    """
    self._project, self._settings = project, settings

  def start(self, run):
    self._wandb = _package('wandb')
    known = _known(run, 'wandb')
    with _as_run_error('wandb', self._wandb.Error):
      self._run = self._wandb.init(
        **{
          'project': self._project,
          'name': _name(run),
          'config': {**run.config, 'seed': run.seed},
          'id': known,
          'resume': 'allow' if known else None,
          'reinit': 'create_new',  # several seeds may train at once
          **self._settings,
        }
      )
    self._run.define_metric('round')
    self._run.define_metric('*', step_metric='round')
    if not known:
      _remember(run, 'wandb', self._run.id)
      for row in run.rows:
        self._run.log(_numbers(rows_lib.flat(row)))

  def __call__(self, row, run):
    logged = _numbers({**rows_lib.flat(row), **run.timings[-1]})
    images = run.images.get(row['round'])
    if images is not None:
      logged['generated'] = self._wandb.Image(_side_by_side(images))
    self._run.log(logged)

  def finish(self, run, failed):
    self._run.summary.update(_figures(run))
    self._run.finish(exit_code=int(failed))


class MLflow(Tracker):
  """Logs configuration, rows, images and summary to MLflow.

  A run that resumes from a checkpoint keeps its id.
  """

  def __init__(self, experiment: str, uri: str | None = None):
    """Makes the tracker; a run starts it.

    Args:
      experiment: name of the experiment, which is created if it does not exist.
      uri: URI of the tracking server or store; None for MLflow's default, which
        MLFLOW_TRACKING_URI sets.
    """
    self._experiment, self._uri = experiment, uri

  def start(self, run):
    self._entities = _package('mlflow').entities
    with _as_run_error('mlflow', _package('mlflow').MlflowException):
      self._client = _package('mlflow').MlflowClient(self._uri)
      known = _known(run, 'mlflow')
      if known:
        self._id = known
        self._client.update_run(known, 'RUNNING')
        return
      there = self._client.get_experiment_by_name(self._experiment)
      self._id = self._client.create_run(
        there.experiment_id
        if there
        else self._client.create_experiment(self._experiment),
        run_name=_name(run),
      ).info.run_id
    _remember(run, 'mlflow', self._id)
    config = {**run.config, 'seed': run.seed}
    params = [self._entities.Param(k, str(v)[:500]) for k, v in config.items()]
    for first in range(0, len(params), 100):  # as many as it takes at once
      self._client.log_batch(self._id, params=params[first : first + 100])
    for row in run.rows:
      self._log(_numbers(rows_lib.flat(row)), row['round'])

  def __call__(self, row, run):
    logged = _numbers({**rows_lib.flat(row), **run.timings[-1]})
    self._log(logged, row['round'])
    images = run.images.get(row['round'])
    if images is not None:
      self._client.log_image(
        self._id, _side_by_side(images), key='generated', step=row['round']
      )

  def finish(self, run, failed):
    last = rows_lib.flat(run.rows[-1]) if run.rows else {'round': 0}
    new = {k: v for k, v in _figures(run).items() if k not in last}
    self._log(new, last['round'])
    self._client.set_terminated(self._id, 'FAILED' if failed else 'FINISHED')

  def _log(self, numbers, step):
    now = int(1000 * time.time())
    metrics = [
      self._entities.Metric(name, float(value), now, step)
      for name, value in numbers.items()
      if name != 'round'
    ]
    self._client.log_batch(self._id, metrics=metrics)


def _name(run: Context) -> str:
  """Returns the name of a run; in a comparison, that of its folders."""
  several = run.folder.name == f'seed{run.seed}'
  what = run.folder.parent.name if several else run.config['method']
  return f'{what} seed {run.seed}'


def _package(name: str) -> types.ModuleType:
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise cli.RunError(
      f"{name} is not installed: pip install 'fedftg_jax[{name}]'"
    ) from error


@contextlib.contextmanager
def _as_run_error(name: str, kind: type[Exception]) -> Iterator[None]:
  try:
    yield
  except kind as error:
    raise cli.RunError(f'{name}: {error}') from error


def _known(run: Context, name: str) -> str | None:
  """Returns the id of a run that resumes, None for a new one."""
  path = run.folder / IDS
  return files.read_json(path).get(name) if run.rows and path.exists() else None


def _remember(run: Context, name: str, identifier: str) -> None:
  path = run.folder / IDS
  others = files.read_json(path) if path.exists() else {}
  files.write_json(path, {**others, name: identifier})


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
  """Removes missing values (None) from a flat row."""
  return {name: value for name, value in row.items() if value is not None}


def _figures(run: Context) -> dict[str, float]:
  """Returns the numbers of summary.json, none if the run failed."""
  path = run.folder / 'summary.json'
  summary = files.read_json(path) if path.exists() else {}
  return _numbers(rows_lib.flat(summary))


def _side_by_side(images: np.ndarray) -> np.ndarray:
  """Joins images [C, H, W, channels] into one row, [H, C * W, 3]."""
  row = np.concatenate(list(images), axis=1)
  return np.broadcast_to(row, (*row.shape[:2], 3)) if row.shape[2] == 1 else row
