"""Saves and loads the personal models of a finished run, by client."""

from collections.abc import Iterable
import itertools
from typing import Any, NamedTuple
import zipfile

import jax
import numpy as np
from upath import UPath

from fedftg_jax.base import Personal, Variables
from fedftg_jax.data import arrays as arrays_lib
from fedftg_jax.system import files

NAME = 'personal.npz'  # in a run's folder


class Saved(NamedTuple):
  """A model of a finished run."""

  model: str  # the architecture, a name for `models.build`, as is --model
  variables: Variables  # NumPy arrays
  batch_stats: bool = False  # whether BatchNorm normalises by each batch


def save(
  folder: UPath, clients: Iterable[tuple[int, dict[str, Personal]]], model: str
) -> None:
  """Writes clients' models, one client at a time; without models, no file.

  Arrays are called CLIENT/NAME/params/... and CLIENT/NAME/stats/...; the string
  CLIENT/NAME/model is the architecture.

  Args:
    folder: the run's.
    clients: numbers and models by name, see `evaluation.personal_models`.
    model: the common architecture.
  """
  clients = iter(clients)
  first = next(clients, None)
  if first is None:
    return
  with files.replacing(folder / NAME) as temporary:
    with zipfile.ZipFile(temporary, 'w') as archive:
      for client, models in itertools.chain([first], clients):
        for name, one in models.items():
          for place, array in _arrays(one, model).items():
            # As NumPy writes it, with the time of no day.
            with archive.open(
              f'{client:06d}/{name}/{place}.npy', 'w', force_zip64=True
            ) as file:
              np.lib.format.write_array(file, array, allow_pickle=False)


def _arrays(one: Personal, model: str) -> dict[str, np.ndarray]:
  """Names a model's arrays by their path in the tree of its architecture."""
  variables = one.variables
  if one.kinds:
    model, unpack = one.kinds[int(one.kind)]  # type: ignore[arg-type]
    variables = unpack(variables)
  leaves, _ = jax.tree.flatten_with_path(variables._asdict())
  return {
    'model': np.array(model),
    **{
      jax.tree_util.keystr(place, simple=True, separator='/'): np.asarray(leaf)
      for place, leaf in leaves
    },
  }


def load(folder: files.PathLike, client: int) -> dict[str, Saved]:
  """Reads a client's personal models from the folder of a finished run.

  Example:
    theta = personal.load('runs/p_fed_me', 3)['theta']
    model = models.build(theta.model, dataset.image_shape, dataset.num_classes,
                         mean=dataset.mean, std=dataset.std)
    logits = model.apply(theta.variables, dataset.test_x[:10]).logits

  Args:
    folder: the run's.
    client: its number.

  Returns:
    The models by name, as in clients.json.

  Raises:
    ValueError: if the run has none, for a client that it does not have, or for
      a damaged file.
  """
  path = UPath(folder) / NAME
  if not path.exists():
    raise ValueError(
      f'{folder} has no {NAME}: its method has no personal models, it is not '
      'finished, or --nosave_personal was given.'
    )
  prefix = f'{client:06d}/'
  with path.open('rb') as file:
    found = arrays_lib.read(file, prefix=prefix)
  trees: dict[str, Any] = {}
  for name, array in found.items():
    *places, leaf = name.removeprefix(prefix).split('/')
    tree = trees
    for place in places:
      tree = tree.setdefault(place, {})
    tree[leaf] = array
  if not trees:
    raise ValueError(f'{path} has no client {client}.')
  return {
    name: Saved(
      str(tree['model']),
      Variables(tree.get('params', {}), tree.get('stats', {})),
    )
    for name, tree in trees.items()
  }
