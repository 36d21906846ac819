"""Reads the folder of a run."""

from typing import Any, NamedTuple

import numpy as np
from upath import UPath

from fedftg_jax.system import files


class Recorded(NamedTuple):
  """The files of a run's folder, up to some round; {} for a missing one.

  Attributes:
    config: the flags that its results depend on.
    versions: of packages, by name.
    rows: of metrics.jsonl, at least one.
    timings: rows of timings.jsonl.
    clients: clients.json, if it is of the last round.
    classes: classes.json, if it is of the last round.
    counts: by split, examples [N, C] of each client and class.
    images: generated images [C, H, W, channels] by round.
    nearest: see `scoring.nearest_real`.
    of_classes: 'x', [C, n, H, W, channels] floats, see
      `scoring.of_each_class`.
    hessian: see the program of that name.
    data: model_input.json, see `writer.describe`.
  """

  config: dict[str, Any]
  versions: dict[str, str]
  rows: list[dict[str, Any]]
  timings: list[dict[str, Any]]
  clients: dict[str, Any]
  classes: dict[str, Any]
  counts: dict[str, np.ndarray]
  images: dict[int, np.ndarray]
  nearest: dict[str, np.ndarray]
  of_classes: dict[str, np.ndarray] = {}
  hessian: dict[str, Any] = {}
  data: dict[str, Any] = {}

  def class_names(self, num: int) -> list[str]:
    """Returns the names of so many classes, or their numbers."""
    names = [str(name) for name in self.data.get('class_names', ())][:num]
    return names + [str(c) for c in range(len(names), num)]


def read(folder: UPath, rounds: int | None = None) -> Recorded:
  """Reads a run's files, up to `rounds` (None: all).

  Raises:
    OSError, ValueError, KeyError: if config.json or metrics.jsonl cannot be
      read.
  """
  saved = files.read_json(folder / 'config.json')

  def lines(name):
    path = folder / name
    rows = files.read_jsonl(path) if path.exists() else []
    return [row for row in rows if rounds is None or row['round'] <= rounds]

  rows = lines('metrics.jsonl')
  if not rows:
    raise ValueError(f'{folder}: no evaluation yet')

  def last(name):
    value = _json(folder / name)
    return value if value.get('round') == rows[-1]['round'] else {}

  def last_arrays(name):
    arrays = _arrays(folder / name)
    return arrays if arrays.get('round') == rows[-1]['round'] else {}

  clients = last('clients.json')
  if clients and 'accuracy' not in clients:  # of many clients
    clients |= _nested(last_arrays('clients.npz'))
  images = {
    int(name.removeprefix('round_')): a
    for name, a in _arrays(folder / 'generated.npz').items()
  }
  return Recorded(
    saved['config'],
    saved['versions'],
    rows,
    lines('timings.jsonl'),
    clients,
    last('classes.json'),
    _arrays(folder / 'counts.npz'),
    {t: a for t, a in images.items() if t <= rows[-1]['round']},
    last_arrays('nearest.npz'),
    last_arrays('images.npz'),
    last('hessian.json'),
    _json(folder / 'model_input.json'),
  )


def _nested(arrays):
  """Makes dictionaries of 'accuracy/broadcast' and the like."""
  tree = {}
  for name, array in arrays.items():
    if name == 'round':
      continue
    place, _, model = name.partition('/')
    if model:
      tree.setdefault(place, {})[model] = array
    else:
      tree[place] = array
  return tree


def _json(path):
  return files.read_json(path) if path.exists() else {}


def _arrays(path):
  return files.read_arrays(path) if path.exists() else {}
