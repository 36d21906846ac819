"""Reads images from folders PATH/train/CLASS and PATH/test/CLASS.

TFDS's own ImageFolder reads through TensorFlow, which is not needed here.
"""

import pathlib
from typing import Any

import numpy as np

from fedftg_jax.data import images as images_lib


def classes(path: str) -> list[str]:
  """Returns the classes: the sorted names of the folders in PATH/train.

  Raises:
    ValueError: if PATH is not a folder of that form.
  """
  root = pathlib.Path(path)
  found = {}
  for split in ('train', 'test'):
    folder = root / split
    if not folder.is_dir():
      raise ValueError(
        f'no such folder: {str(folder)!r}; folder:PATH names one with images '
        'in train/CLASS/ and test/CLASS/'
      )
    found[split] = sorted(p.name for p in _visible(folder) if p.is_dir())
    if not found[split]:
      raise ValueError(f'{folder}: must have a folder of images for each class')
  unknown = set(found['test']) - set(found['train'])
  if unknown:
    raise ValueError(
      f'{root / "test"}: classes must be those of {root / "train"}, has also '
      f'{", ".join(sorted(unknown))}'
    )
  return found['train']


def files(
  path: str | pathlib.Path, split: str, name: str
) -> list[pathlib.Path]:
  """Lists the files that are read as images of a class, sorted.

  Links are followed.
  """
  folder = pathlib.Path(path, split, name)
  return _visible(folder) if folder.is_dir() else []


def read(path: str) -> dict[str, Any]:
  """Reads train_x, train_y, test_x, test_y, sorted by class and file name.

  It also returns class_names, the names of the folders.

  Every file counts, except those whose names begin with a dot. If some images
  have colours, grey ones get three channels.

  Raises:
    ValueError: for a file that is not an image, or images of different sizes.
  """
  names, images, labels, counts = classes(path), [], [], []
  for split in ('train', 'test'):
    before = len(images)
    for label, name in enumerate(names):
      for file in files(path, split, name):
        if not file.is_file():  # reading a pipe would wait
          raise ValueError(f'{file}: must be a file with an image')
        images.append(images_lib.decode(file))
        labels.append(label)
    counts.append(len(images) - before)
    if not counts[-1]:
      raise ValueError(f'{pathlib.Path(path, split)}: has no images')
  try:
    train_x, test_x = np.split(images_lib.stack(images), counts[:1])
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error
  train_y, test_y = np.split(np.array(labels, np.int32), counts[:1])
  return {
    'train_x': train_x,
    'train_y': train_y,
    'test_x': test_x,
    'test_y': test_y,
    'class_names': names,
  }


def _visible(folder):
  return sorted(p for p in folder.iterdir() if not p.name.startswith('.'))
