"""Reads the folder of a run."""

from typing import Any, NamedTuple

import numpy as np
from upath import UPath

from fedftg_jax.system import files


class Recorded(NamedTuple):
  """What a run's folder says, up to some round; {} where a file is missing."""

  config: dict[str, Any]
  versions: dict[str, str]
  rows: list[dict[str, Any]]  # metrics.jsonl, at least one
  timings: list[dict[str, Any]]
  clients: dict[str, Any]
  classes: dict[str, Any]
  counts: dict[str, np.ndarray]
  images: dict[int, np.ndarray]  # by round
  nearest: dict[str, np.ndarray]  # see `scoring.nearest_real`
  # 'x': [C, n, H, W, channels] floats, see `scoring.of_each_class`.
  of_classes: dict[str, np.ndarray] = {}
  hessian: dict[str, Any] = {}  # see the program of that name


def read(folder: UPath, rounds: int | None = None) -> Recorded:
  """A run's files, up to `rounds` (None: all).

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
    path = folder / name
    value = files.read_json(path) if path.exists() else {}
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


def _arrays(path):
  return files.read_arrays(path) if path.exists() else {}
