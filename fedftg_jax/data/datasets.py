"""Image data sets as NumPy arrays, by name."""

import functools
import io
import os
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from fedftg_jax.data import arrays as arrays_lib

NAMES = ('mnist5k', 'npz:PATH')
_NPZ_ARRAYS = ('train_x', 'train_y', 'test_x', 'test_y')


class Dataset(NamedTuple):
  """A train and a test split, and how to normalise them."""
  train_x: np.ndarray  # [M, H, W, channels] uint8 or float32
  train_y: np.ndarray  # [M] int32
  test_x: np.ndarray
  test_y: np.ndarray
  num_classes: int
  mean: tuple[float, ...]  # per channel, of pixels in [0, 1]; for uint8 only
  std: tuple[float, ...]

  @property
  def image_shape(self) -> tuple[int, int, int]:
    return self.train_x.shape[1:]


def check_name(name: str) -> None:
  """Raises ValueError unless `name` is a data set whose file, if any, is there."""
  if name.startswith('npz:'):
    path = name[len('npz:'):]
    if not os.path.isfile(path):
      raise ValueError(
          f'no such file: {path!r}; npz:PATH names an .npz with the arrays '
          f'{", ".join(_NPZ_ARRAYS)}')
  elif name not in NAMES:
    raise ValueError(f'must be one of {", ".join(NAMES)}')


def load(name: str, data_dir: str | None = None) -> Dataset:
  """Loads a data set.

  Args:
    name: 'mnist5k', or 'npz:PATH' for arrays of one's own: train_x and test_x
      [M, H, W, channels] uint8 or float32, train_y and test_y [M] integers.
    data_dir: where TensorFlow Datasets keeps prepared data; None for its
      default.

  Returns:
    The data set. uint8 images carry the train split's mean and standard
    deviation per channel; float images are taken as normalised.

  Raises:
    ValueError: for an unknown name or an unfit file, saying what would be right.
  """
  check_name(name)
  if name.startswith('npz:'):
    arrays = _read_npz(name[len('npz:'):])
  else:
    arrays = _read_mnist5k(data_dir)
  train_x = arrays['train_x']
  if train_x.dtype == np.uint8:
    # Integer sums: exact, and without a float copy of the images.
    axes, num = (0, 1, 2), train_x[..., 0].size
    mean = train_x.sum(axes, dtype=np.int64) / num / 255
    square = sum((x.astype(np.int64)**2).sum((0, 1)) for x in train_x)
    std = np.sqrt(np.maximum(square / num / 255**2 - mean**2, 1e-12))
  else:
    mean, std = np.zeros(train_x.shape[-1]), np.ones(train_x.shape[-1])
  num_classes = 1 + max(arrays['train_y'].max(), arrays['test_y'].max())
  return Dataset(**arrays, num_classes=int(num_classes),
                 mean=tuple(map(float, mean)), std=tuple(map(float, std)))


def _read_mnist5k(data_dir: str | None) -> dict[str, Any]:
  # Imported here: it takes a second, and npz users do not need it.
  # pylint: disable=g-import-not-at-top
  import tensorflow_datasets as tfds
  from fedftg_jax.data import mnist5k
  # pylint: enable=g-import-not-at-top
  tfds.disable_progress_bar()
  make = functools.partial(
      mnist5k.Mnist5k, data_dir=data_dir, file_format='array_record')
  builder = make()
  try:
    builder.download_and_prepare()
  except OSError:
    builder = make()  # another process may have been first to put it there
    if not builder.is_prepared():
      raise
  arrays = {}
  for split in ('train', 'test'):
    try:
      examples = list(builder.as_data_source(
          split, decoders={'image': tfds.decode.SkipDecoding()}))
      images = np.stack([
          np.asarray(Image.open(io.BytesIO(e['image'])))[..., None]
          for e in examples])
    except Exception as error:  # whatever the reader makes of a damaged file
      raise ValueError(
          f'{builder.data_dir}: cannot read the {split} split '
          f'({type(error).__name__}: {error}); delete this folder to have it '
          'prepared again') from error
    # TFDS stores examples in a shuffled order; ours is the label's, so that no
    # partition depends on it.
    labels = np.array([e['label'] for e in examples], np.int32)
    order = np.lexsort((_digest(images), labels))
    arrays[split + '_x'], arrays[split + '_y'] = images[order], labels[order]
  return arrays


def _digest(images: np.ndarray) -> np.ndarray:
  """One integer per image that tells different images apart."""
  flat = images.reshape(len(images), -1).astype(np.uint64)
  powers = np.cumprod(np.full(flat.shape[1], 1_099_511_628_211, np.uint64))
  return flat @ powers


def _read_npz(path: str) -> dict[str, np.ndarray]:
  file = arrays_lib.read(path)
  missing = [name for name in _NPZ_ARRAYS if name not in file]
  if missing:
    raise ValueError(
        f'{path}: lacks the array(s) {", ".join(missing)}; it has '
        f'{", ".join(file) or "none"}')
  arrays = {name: file[name] for name in _NPZ_ARRAYS}
  for split in ('train', 'test'):
    x, y = arrays[split + '_x'], arrays[split + '_y']
    if x.ndim != 4 or x.dtype not in (np.uint8, np.float32):
      raise ValueError(
          f'{path}: {split}_x must be [examples, height, width, channels] of '
          f'uint8 or float32, got {list(x.shape)} of {x.dtype}')
    if (y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer)
        or not len(y) or y.min() < 0):
      raise ValueError(
          f'{path}: {split}_y must be one non-negative integer for each of the '
          f'{len(x)} images (at least one), got {list(y.shape)} of {y.dtype}')
    if x.dtype == np.float32 and not np.isfinite(x).all():
      raise ValueError(f'{path}: {split}_x has values that are not finite')
    arrays[split + '_y'] = y.astype(np.int32)
  train, test = arrays['train_x'], arrays['test_x']
  if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
    raise ValueError(
        f'{path}: train_x and test_x differ in image shape or type: '
        f'{list(train.shape[1:])} {train.dtype}, '
        f'{list(test.shape[1:])} {test.dtype}')
  return arrays


def read_images(path: str, like: Dataset) -> np.ndarray:
  """Unlabelled images, the array `x` of an .npz, in the form of a data set's.

  Raises:
    ValueError: for an unreadable file, or images of another shape or type.
  """
  file = arrays_lib.read(path)
  if 'x' not in file:
    raise ValueError(f'{path}: lacks the array x; it has {", ".join(file)}')
  x, want = file['x'], like.train_x
  if x.shape[1:] != want.shape[1:] or x.dtype != want.dtype or not len(x):
    raise ValueError(
        f'{path}: x must be [images, {", ".join(map(str, want.shape[1:]))}] of '
        f'{want.dtype}, got {list(x.shape)} of {x.dtype}')
  return x
