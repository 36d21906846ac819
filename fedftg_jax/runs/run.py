"""Opens the folder of a finished run: metrics, trained model, pictures."""

import base64
from collections.abc import Sequence
import functools
import html
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from upath import UPath

from fedftg_jax import evaluation
from fedftg_jax.base import Model, Variables
from fedftg_jax.configuration import assembly
from fedftg_jax.configuration.resolve import Configuration
from fedftg_jax.data import datasets
from fedftg_jax.data import images as images_lib
from fedftg_jax.results import page, styles
from fedftg_jax.results import rows as rows_lib
from fedftg_jax.runs import personal, writer
from fedftg_jax.system import cli, files

SPLITS = ('test', 'train')


class _Images(NamedTuple):
  """The images that a run's model takes; see `writer.describe`."""

  image_shape: tuple[int, int, int]
  dtype: str
  num_classes: int
  mean: Sequence[float]
  std: Sequence[float]


class Run:
  """A finished run, read from its folder.

  Attributes:
    folder: folder of the run, with all of its files.
    config: the flags on which the results depend, by name.
    rows: rows of metrics.jsonl, one for each evaluation.
    summary: values of summary.json, such as 'final_accuracy'.
  """

  def __init__(self, folder: files.PathLike, module: Any = None):
    """Reads the folder.

    Args:
      folder: folder of one run; a comparison has one in METHOD/seedK.
      module: the Flax module that was trained, if the model has no name.

    Raises:
      cli.ArgumentError: if it is not the folder of a finished run, or if a file
        is damaged.
    """
    self.folder = UPath(folder)
    self.config = read_config(self.folder)
    self._module = module
    if not (self.folder / 'summary.json').exists():
      raise cli.ArgumentError(folder, 'is not finished yet')
    try:
      self.rows = files.read_jsonl(self.folder / 'metrics.jsonl')
      self.summary = files.read_json(self.folder / 'summary.json')
    except (OSError, ValueError) as error:
      raise cli.ArgumentError(folder, str(error)) from error

  def __repr__(self) -> str:
    return (
      f'Run({self._title}: {100 * self.summary["final_accuracy"]:.2f} % after '
      f'{self.summary["rounds"]} rounds, in {self.folder})'
    )

  def _repr_html_(self) -> str:
    """Returns what a notebook shows: figures, and curves of the accuracy."""
    figures = {
      'final accuracy': f'{100 * self.summary["final_accuracy"]:.2f} %',
      'best accuracy': f'{100 * self.summary["best_accuracy"]:.2f} %',
      'rounds': str(self.summary['rounds']),
      'sent up': f'{self.summary["bytes_up"] / 1e6:.1f} MB',
      'training': f'{self.summary["train_seconds"]:.0f} s',
      'folder': str(self.folder),
    }
    cells = ''.join(
      f'<tr><th>{name}</th><td>{html.escape(value)}</td></tr>'
      for name, value in figures.items()
    )
    picture = self.folder / 'curves.png'
    image = ''
    if picture.exists():
      data = base64.b64encode(picture.read_bytes()).decode()
      image = (
        '<img alt="test accuracy by round and by megabytes" style="max-width: '
        f'100%" src="data:image/png;base64,{data}">'
      )
    title = html.escape(self._title)
    return f'<table><caption>{title}</caption>{cells}</table>{image}'

  @property
  def _title(self) -> str:
    return f'{self.config["method"]} on {self.config["dataset"]}'

  @property
  def metrics(self) -> Any:
    """The rows without values by class, as a pandas DataFrame.

    A list of dictionaries if pandas is not installed.
    """
    flat = [*map(rows_lib.flat, self.rows)]
    try:
      import pandas  # slow to import
    except ImportError:
      return flat
    return pandas.DataFrame(flat)

  @functools.cached_property
  def model(self) -> Model:
    """The classifier, as a pair of pure functions."""
    if self.config['model'].startswith('module:') and self._module is None:
      raise cli.ArgumentError(
        self.folder,
        f'was trained with a module of its program ({self.config["model"]}); '
        'pass the module: load_run(folder, model=...)',
      )
    return assembly.make_model(self.config, self._images, self._module)

  @functools.cached_property
  def variables(self) -> Variables:
    """The variables of the trained model, which the server broadcasts last."""
    models = self._read('params.npz')
    if '' not in models:
      raise cli.ArgumentError(self.folder, 'has a params.npz without a model')
    return models['']

  @functools.cached_property
  def models(self) -> dict[str, personal.Saved]:
    """Further models that the server kept by name, for `predict`.

    See `base.ServerModels`; the method `running_average` has one.
    """
    if not (self.folder / writer.MODELS).exists():
      return {}
    return {
      name: self._saved(variables)
      for name, variables in self._read(writer.MODELS).items()
    }

  def _read(self, name: str) -> dict[str, Variables]:
    """Reads a file of models by the prefix of their arrays, such as ''."""
    like = jax.eval_shape(self.model.init, jax.random.key(0))._asdict()
    try:
      arrays = files.read_arrays(self.folder / name)
      prefixes = {re.split('params/|stats/', array)[0] for array in arrays}
      models = {
        prefix.rstrip('/'): jax.tree.map_with_path(
          lambda path, leaf: arrays[
            prefix + jax.tree_util.keystr(path, simple=True, separator='/')  # noqa: B023
          ],
          like,
        )
        for prefix in sorted(prefixes)
      }
    except (OSError, ValueError, KeyError) as error:
      raise cli.ArgumentError(
        self.folder, f'has a {name} that does not fit its model: {error}'
      ) from error
    for variables in models.values():
      if jax.tree.map(np.shape, variables) != jax.tree.map(np.shape, like):
        raise cli.ArgumentError(self.folder, f'has a {name} of another model')
    return {prefix: Variables(**tree) for prefix, tree in models.items()}

  @functools.cached_property
  def _images(self) -> _Images:
    path, config = self.folder / writer.IMAGES, self.config
    try:
      if path.exists():
        said = files.read_json(path)
      else:  # a run from before this file existed
        said = writer.describe(
          datasets.load(config['dataset'], num_classes=config['num_classes'])
        )
      said = {name: said[name] for name in _Images._fields}
      return _Images(**{**said, 'image_shape': tuple(said['image_shape'])})
    except (OSError, ValueError, TypeError, KeyError) as error:
      raise cli.ArgumentError(
        self.folder, f'has no {writer.IMAGES} that can be read: {error}'
      ) from error

  def predict(
    self, x: np.ndarray, model: personal.Saved | None = None
  ) -> np.ndarray:
    """Computes the probability of each class.

    With batch_norm='local', clients keep their statistics, and BatchNorm
    normalises by the batch, as in the run's evaluations.

    Args:
      x: [M, H, W, channels] images like those of the data set, such as raw
        uint8.
      model: a model from `models`, or a client's personal model from
        `personal`; None for the model that the server broadcasts.

    Returns:
      [M, C] float32; rows sum to 1.

    Raises:
      ValueError: for images of another shape or type.
    """
    x, (classifier, saved) = self._checked(x), self._chosen(model)
    with assembly.matmul_precision(self.config):
      return evaluation.predict(
        classifier, saved.variables, x, batch_stats=saved.batch_stats
      )

  def _chosen(self, model: personal.Saved | None) -> tuple[Model, Any]:
    """Returns a classifier and its variables; those of broadcast for None."""
    if model is None:
      return self.model, self._saved(self.variables)
    if model.model == self.config['model']:
      return self.model, model
    return assembly.by_name(self.config, self._images)(model.model), model

  def _saved(self, variables: Variables) -> personal.Saved:
    """Returns a model of the server; its statistics mean nothing if local."""
    is_local = self.config['batch_norm'] == 'local'
    return personal.Saved(self.config['model'], variables, is_local)

  def _checked(self, x) -> np.ndarray:
    x, want = np.asarray(x), self._images
    if x.shape[1:] != want.image_shape or x.dtype != want.dtype or not len(x):
      raise ValueError(
        f'images must be [M, {", ".join(map(str, want.image_shape))}] of '
        f'{want.dtype} as in training, got {list(x.shape)} of {x.dtype}'
      )
    return x

  def evaluate(
    self,
    data: str | tuple[Any, Any] | None = None,
    split: str = 'test',
    model: personal.Saved | None = None,
    *,
    num_classes: int = 0,
    data_dir: str | None = None,
    manual_dir: str | None = None,
  ) -> dict[str, Any]:
    """Scores the trained model on a data set.

    Args:
      data: name of a data set; (images, labels); or None for the data set of
        the training, as published.
      split: 'test' or 'train', for a data set by name.
      model: as for `predict`.
      num_classes: C, for a data set by name; 0 for one more than the largest
        training label.
      data_dir: where prepared data sets are kept, see `datasets.load`.
      manual_dir: where their original files are.

    Returns:
      accuracy, loss, class_accuracy [C] (None for a class without examples),
      calibration_error and brier (see `evaluation.calibration`), confusion
      [C, C] (rows are true classes; None for more than 100 classes), and the
      number of examples.

    Raises:
      ValueError: for images of another shape or type, or other classes.
    """
    if data is None or isinstance(data, str):
      name, want = data or self.config['dataset'], self._images.num_classes
      dataset = datasets.load(name, data_dir, manual_dir, num_classes)
      if dataset.num_classes != want:
        raise ValueError(
          f'has {dataset.num_classes} classes, the model {want}; if the labels '
          f'mean the same classes, set --num_classes={want}'
        )
      x, y = (
        (dataset.test_x, dataset.test_y)
        if split == 'test'
        else (dataset.train_x, dataset.train_y)
      )
    else:
      x, y = data
    x, y = self._checked(x), np.asarray(y)
    if (
      y.shape != x.shape[:1]
      or not np.issubdtype(y.dtype, np.integer)
      or not 0 <= y.min() <= y.max() < self._images.num_classes
    ):
      raise ValueError(
        f'labels must be one integer from 0 to {self._images.num_classes - 1} '
        f'for each of the {len(x)} images'
      )
    return self._score(x, y, model)

  def _score(self, x, y, model) -> dict[str, Any]:
    classifier, saved = self._chosen(model)
    with assembly.matmul_precision(self.config):
      scores = evaluation.evaluate(
        classifier, saved.variables, x, y, batch_stats=saved.batch_stats
      )
    confusion, probabilities = scores.get('confusion'), self.predict(x, model)
    return {
      'examples': len(y),
      'accuracy': rows_lib.number(scores['accuracy']),
      'loss': rows_lib.number(scores['loss']),
      **{
        name: rows_lib.number(value)
        for name, value in evaluation.calibration(probabilities, y).items()
      },
      'class_accuracy': [
        *map(rows_lib.number, np.asarray(scores['per_class']))
      ],
      'confusion': None if confusion is None else confusion.tolist(),
    }

  @property
  def images(self) -> np.ndarray | None:
    """Generated images of each class, [C, n, H, W, channels] uint8.

    Each is scaled to its own range. None if the method has no generator.
    """
    path = self.folder / 'images.npz'
    if not path.exists():
      return None
    made = files.read_arrays(path)['x']
    flat = images_lib.scaled(made.reshape(-1, *made.shape[2:]))
    return np.round(255 * flat).astype(np.uint8).reshape(made.shape)

  def personal(self, client: int) -> dict[str, personal.Saved]:
    """Returns the personal models of a client by name, for `predict`.

    Args:
      client: number of the client.

    Raises:
      ValueError: if the run has no personal models, or no such client.
    """
    return personal.load(self.folder, client)

  def plot(self, axes: Any = None) -> Any:
    """Draws the test accuracy of the run's models by round.

    Args:
      axes: matplotlib's, to draw into; None for new ones.

    Returns:
      The axes.
    """
    if axes is None:
      # With the user's backend: a window, or a notebook.
      from matplotlib import pyplot

      _, axes = pyplot.subplots(layout='constrained')
    models, method = rows_lib.different_models(self.rows), self.config['method']
    like = styles.of_models(models, method)
    for title, style in styles.of(models, like).items():
      points = rows_lib.curve(self.rows, models[title])
      axes.plot(
        [done for done, _, _ in points],
        [accuracy for _, _, accuracy in points],
        style.dashes,
        color=style.color,
        marker=style.marker,
        label=f'{method}: {title}',
      )
    axes.set(xlabel='round', ylabel='test accuracy, percent')
    axes.grid(alpha=0.3)
    axes.legend()
    return axes

  def report(self) -> UPath:
    """Writes report.html, unless it exists, and returns its path."""
    path = self.folder / 'report.html'
    return path if path.exists() else page.write(self.folder)


def read_config(folder: UPath) -> Configuration:
  """Reads the configuration of the run in a folder.

  Raises:
    cli.ArgumentError: if the folder holds none, or several runs.
  """
  return read_claim(folder)[0]


def read_claim(folder: UPath) -> tuple[Configuration, dict[str, str]]:
  """Reads a run's configuration and the fingerprints of the files it names.

  Raises:
    cli.ArgumentError: as for `read_config`.
  """
  path = folder / 'config.json'
  if not path.exists():
    raise cli.ArgumentError(folder, 'must be the folder of a run')
  try:
    saved = files.read_json(path)
    config, contents = Configuration(saved['config']), dict(saved['contents'])
  except (ValueError, LookupError, TypeError) as error:
    why = f'has a damaged config.json ({error})'
    raise cli.ArgumentError(folder, why) from error
  if 'program' in config:
    raise cli.ArgumentError(
      folder,
      'holds several runs; must be the folder of one run, such as METHOD/seedK '
      'in it',
    )
  return config, contents
