"""Loads image data sets as NumPy arrays, by name."""

from collections.abc import Mapping, Sequence
import hashlib
import os
import re
from typing import Any, NamedTuple

import numpy as np

from fedftg_jax.data import arrays as arrays_lib
from fedftg_jax.data import image_folder, partition, synthetic
from fedftg_jax.data.parts import Parts

_NPZ_ARRAYS = ('train_x', 'train_y', 'test_x', 'test_y')
_CLIENTS = 'train_client_id'
_NAMES = 'class_names'
# Customary means and standard deviations, as in the official FedFTG code; other
# data sets are normalised by those of their train split.
_CUSTOMARY = {
  'cifar10': ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262)),
  'cifar100': ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
# Names that the original files do not hold.
_CLASS_NAMES = {
  'cifar10': (
    'airplane automobile bird cat deer dog frog horse ship truck'.split()
  ),
  'fashion_mnist': (
    'T-shirt Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Boot'.split()
  ),
}


class Dataset(NamedTuple):
  """A train and a test split, and the constants to normalise them."""

  train_x: np.ndarray  # [M, H, W, channels] uint8 or float32
  train_y: np.ndarray  # [M] int32
  test_x: np.ndarray
  test_y: np.ndarray
  num_classes: int
  mean: tuple[float, ...]  # per channel, of pixels in [0, 1]; for uint8 only
  std: tuple[float, ...]
  # If the data name the client of each example: its index, 0 to num_natural -
  # 1, in the order of the sorted names.
  train_clients: np.ndarray | None = None  # [M] int32
  num_natural: int = 0
  # The part of the train split that `with_validation` holds out.
  validation_x: np.ndarray | None = None
  validation_y: np.ndarray | None = None
  class_names: tuple[str, ...] = ()  # C names; () if the data have none

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(height, width, channels)."""
    return self.train_x.shape[1:]

  def take(self, rows: np.ndarray) -> 'Dataset':
    """Returns the data set with only these rows of the train split."""
    clients = self.train_clients
    return self._replace(
      train_x=self.train_x[rows],
      train_y=self.train_y[rows],
      train_clients=None if clients is None else clients[rows],
    )


def check_name(
  name: str, data_dir: str | None = None, manual_dir: str | None = None
) -> None:
  """Checks that `load` will find the data set.

  Raises:
    ValueError: if not.
  """
  kind, _, path = name.partition(':')
  if kind == 'npz':
    if not os.path.isfile(path):
      raise ValueError(
        f'no such file: {path!r}; npz:PATH names an .npz with the arrays '
        f'{", ".join(_NPZ_ARRAYS)}'
      )
  elif kind == 'folder':
    image_folder.classes(path)
  elif kind == 'synthetic':
    synthetic.parse(path)
  elif kind != 'arrays':  # these are known only to the program that has them
    _prepared().check(name, data_dir, manual_dir)


def load(
  name: str,
  data_dir: str | None = None,
  manual_dir: str | None = None,
  num_classes: int = 0,
) -> Dataset:
  """Loads a data set.

  Args:
    name: the name of an image-classification set of TensorFlow Datasets, or
      'mnist5k' (see `prepared`); 'npz:PATH' for your own arrays: train_x and
      test_x [M, H, W, channels] uint8 or float32, train_y and test_y [M]
      integers, and train_client_id [M], integers or strings, if the client of
      each example is known; 'folder:PATH' for images in folders (see
      `image_folder`); 'synthetic' or 'synthetic:NAME=VALUE,...' for synthetic
      images (see `synthetic`).
    data_dir: where TensorFlow Datasets keeps prepared data; None for its
      default.
    manual_dir: folder with a data set's original files, from which it is
      prepared; None for the usual places.
    num_classes: C; 0 for one more than the largest training label.

  Returns:
    The data set. For uint8 images it has the mean and standard deviation per
    channel that are customary for the data set, or else those of the train
    split; float images are taken to be normalised.

  Raises:
    ValueError: for an unknown name or a file that does not fit, with what would
      be right.
  """
  check_name(name, data_dir, manual_dir)
  kind, _, path = name.partition(':')
  if kind == 'npz':
    arrays, where = _read_npz(path), path
  elif kind == 'folder':
    arrays, where = image_folder.read(path), path
  elif kind == 'synthetic':
    spec = synthetic.parse(path)
    arrays, where = synthetic.make(spec), name
    num_classes = num_classes or spec.classes
  elif kind == 'arrays':
    raise ValueError('arrays are known only to the program that has them')
  else:
    arrays, where = _prepared().read(name, data_dir, manual_dir), name
  base = re.split('[:/]', name)[0]
  if base in _CLASS_NAMES:
    arrays = {**arrays, _NAMES: _CLASS_NAMES[base]}
  return _dataset(arrays, where, num_classes, base)


def from_arrays(
  arrays: Sequence[Any] | Mapping[str, Any] | Dataset, num_classes: int = 0
) -> Dataset:
  """Makes a data set from arrays.

  Args:
    arrays: (train_x, train_y, test_x, test_y), or a mapping with these names
      and optionally train_client_id, see `load`; or a data set, which is
      returned as it is.
    num_classes: C; 0 for one more than the largest training label.

  Returns:
    The data set, as `load` would return it from a file with these arrays.

  Raises:
    ValueError: for arrays that do not fit, with what would be right.
  """
  if isinstance(arrays, Dataset):
    return arrays
  if not isinstance(arrays, Mapping):
    arrays = dict(zip(_NPZ_ARRAYS, arrays)) if len(arrays) == 4 else {}
  if not {*_NPZ_ARRAYS} <= arrays.keys() <= {*_NPZ_ARRAYS, _CLIENTS}:
    raise ValueError(
      f'arrays: must be ({", ".join(_NPZ_ARRAYS)}), or a mapping with these '
      f'names and perhaps {_CLIENTS}'
    )
  arrays = {name: np.asarray(array) for name, array in arrays.items()}
  return _dataset(arrays, 'arrays', num_classes)


def fingerprint(dataset: Dataset) -> str:
  """Returns a digest of a data set's arrays, classes and normalisation."""
  digest = hashlib.sha256()
  for part in dataset:
    array = np.ascontiguousarray(part if part is not None else ())
    digest.update(f'{array.dtype} {array.shape} '.encode())
    digest.update(array.tobytes())
  return digest.hexdigest()[:16]


def _dataset(arrays, where, num_classes, name='') -> Dataset:
  """Checks arrays and adds normalisation, the customary one of set `name`."""
  names = arrays.pop(_NAMES, ())
  arrays = _checked(arrays, where, num_classes)
  num_classes = num_classes or 1 + int(arrays['train_y'].max())
  clients, num_natural = _natural(arrays.pop(_CLIENTS, None))
  mean, std = _CUSTOMARY.get(name) or _moments(arrays['train_x'])
  return Dataset(
    **arrays,
    num_classes=num_classes,
    mean=mean,
    std=std,
    train_clients=clients,
    num_natural=num_natural,
    class_names=_class_names(names, num_classes),
  )


def _class_names(names, num_classes) -> tuple[str, ...]:
  """Returns C names; () if there are none, or only numbers."""
  numbers = [str(c) for c in range(num_classes)]
  names = [*names, *numbers[len(names) :]][:num_classes]
  return () if names == numbers else tuple(names)


def fingerprints(dataset: Dataset) -> dict[str, dict[str, Any]]:
  """Returns the size and a digest of each split, which identify the data.

  Returns:
    By split, 'examples': how many, and 'sha256': the digest of the images and
    labels.
  """
  found = {}
  for split, *arrays in (
    ('train', dataset.train_x, dataset.train_y),
    ('test', dataset.test_x, dataset.test_y),
  ):
    digest = hashlib.sha256()
    for array in arrays:
      digest.update(np.ascontiguousarray(array).data)
    found[split] = {'examples': len(arrays[0]), 'sha256': digest.hexdigest()}
  return found


def with_validation(dataset: Dataset, share: float, seed: int) -> Dataset:
  """Holds out a part of the train split for validation.

  The share is the same for every class, up to rounding. `mean` and `std` remain
  those of the whole train split.

  Args:
    dataset: the data set.
    share: in [0, 1); 0 holds out nothing.
    seed: seed of the draw.

  Returns:
    The data set with a validation split.

  Raises:
    ValueError: if that leaves nothing on one side.
  """
  if not 0 <= share < 1:
    raise ValueError(f'share must be at least 0 and below 1, got {share}.')
  if not share:
    return dataset
  labels = dataset.train_y
  if not 0 < round(share * len(labels)) < len(labels):
    raise ValueError(
      f'share must leave some of the {len(labels)} training examples on both '
      f'sides, got {share}.'
    )
  kept = _stratified(labels, share, np.random.RandomState([seed, 2]))
  return dataset.take(np.setdiff1d(np.arange(len(labels)), kept))._replace(
    validation_x=dataset.train_x[kept], validation_y=labels[kept]
  )


def with_unit_pixels(dataset: Dataset) -> Dataset:
  """Leaves uint8 images in [0, 1]: mean 0 and standard deviation 1.

  Raises:
    ValueError: for float images, which are not normalised anyway.
  """
  if dataset.train_x.dtype != np.uint8:
    raise ValueError('needs uint8 images; float images are taken as they are')
  channels = dataset.image_shape[-1]
  return dataset._replace(mean=(0.0,) * channels, std=(1.0,) * channels)


def with_test_merged(dataset: Dataset) -> Dataset:
  """Appends the test split to the train split.

  The clients of the examples are then unknown. `mean` and `std` do not change.
  """
  return dataset._replace(
    train_x=np.concatenate([dataset.train_x, dataset.test_x]),
    train_y=np.concatenate([dataset.train_y, dataset.test_y]),
    train_clients=None,
  )


def with_client_tests(
  dataset: Dataset, parts: Sequence[np.ndarray], share: float, seed: int
) -> tuple[Dataset, Parts, Parts]:
  """Splits off a share of every client's examples, at random, as its test set.

  The number is rounded up, as in scikit-learn's `train_test_split`, but at
  least one example remains to train on.

  Args:
    dataset: its test split is dropped.
    parts: rows of the train split that each client holds.
    share: in (0, 1).
    seed: seed of the draw.

  Returns:
    The data set, whose test split is all clients' tests; each client's rows of
    its train split; each client's rows of its test split.

  Raises:
    ValueError: for another share, or if no client has an example to spare.
  """
  if not 0 < share < 1:
    raise ValueError(f'share must be above 0 and below 1, got {share}.')
  parts = Parts.of(parts)
  rng = np.random.RandomState([seed, 4])
  tested = np.zeros(len(dataset.train_y), bool)
  for part in parts:
    num = min(int(np.ceil(share * len(part) - 1e-9)), len(part) - 1)
    tested[rng.permutation(part)[: max(num, 0)]] = True
  if not tested.any():
    raise ValueError('no client has an example to spare for a test.')
  place = np.where(tested, np.cumsum(tested), np.cumsum(~tested)) - 1
  apart = dataset.take(np.flatnonzero(~tested))._replace(
    test_x=dataset.train_x[tested], test_y=dataset.train_y[tested]
  )
  is_test, owners = tested[parts.rows], parts.owners()
  train, test = (
    Parts(
      place[parts.rows[chosen]],
      np.bincount(owners[chosen], minlength=len(parts)),
    )
    for chosen in (~is_test, is_test)
  )
  return apart, train, test


def with_examples(dataset: Dataset, num: int, seed: int) -> Dataset:
  """Keeps `num` training examples, with the same share of every class.

  The share is the same up to rounding; 0 keeps all examples. Normalisation
  remains that of the whole.

  Raises:
    ValueError: if there are fewer examples.
  """
  total = len(dataset.train_y)
  if not 0 <= num <= total:
    raise ValueError(
      f'{num} training examples were requested, but there are only {total}.'
    )
  if not num:
    return dataset
  return dataset.take(
    _stratified(dataset.train_y, num / total, np.random.RandomState([seed, 3]))
  )


def _stratified(labels, share, rng) -> np.ndarray:
  """Draws rows of an equal share of every class, ascending."""
  order = rng.permutation(len(labels))
  sizes = partition.largest_remainders(share * np.bincount(labels))
  return np.sort(
    np.concatenate(
      [order[labels[order] == c][:size] for c, size in enumerate(sizes)]
    )
  )


def _prepared():
  # Importing it takes a second, and npz users do not need it.
  from fedftg_jax.data import prepared

  return prepared


def _moments(x: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Computes mean and standard deviation per channel.

  They are 0 and 1 for float images.
  """
  if x.dtype != np.uint8:
    return (0.0,) * x.shape[-1], (1.0,) * x.shape[-1]
  # Sums of integers are exact and need no float copy of the images.
  axes, num = (0, 1, 2), x[..., 0].size
  mean = x.sum(axes, dtype=np.int64) / num / 255
  square = sum(
    (some.astype(np.int32) ** 2).sum(axes, dtype=np.int64)
    for some in np.array_split(x, len(x) // 1024 + 1)
  )
  std = np.sqrt(np.maximum(square / num / 255**2 - mean**2, 1e-12))
  return tuple(map(float, mean)), tuple(map(float, std))


def _natural(ids: np.ndarray | None) -> tuple[np.ndarray | None, int]:
  """Numbers the clients 0 to N - 1; returns each example's client, and N."""
  if ids is None:
    return None, 0
  if ids.dtype.kind in 'iu' and ids.min() >= 0 and ids.max() < len(ids):
    num = int(ids.max()) + 1
    if np.bincount(ids.astype(int)).all():  # numbered already
      return ids.astype(np.int32, copy=False), num
  names, clients = np.unique(ids, return_inverse=True)
  return clients.astype(np.int32), len(names)


def _read_npz(path: str) -> dict[str, np.ndarray]:
  file = arrays_lib.read(path)
  missing = [name for name in _NPZ_ARRAYS if name not in file]
  if missing:
    raise ValueError(
      f'{path}: lacks the array(s) {", ".join(missing)}; it has '
      f'{", ".join(file) or "none"}'
    )
  return {name: file[name] for name in (*_NPZ_ARRAYS, _CLIENTS) if name in file}


def _checked(
  arrays: dict[str, np.ndarray], path: str, num_classes: int
) -> dict[str, np.ndarray]:
  """Returns the arrays, with labels as int32, after checking that they fit.

  Raises:
    ValueError: says what does not fit.
  """
  for split in ('train', 'test'):
    x, y = arrays[split + '_x'], arrays[split + '_y']
    if x.ndim != 4 or x.dtype not in (np.uint8, np.float32):
      hint = ''
      if x.ndim == 3:
        hint = '; grey images get their channel by x[..., None]'
      raise ValueError(
        f'{path}: {split}_x must be [examples, height, width, channels] of '
        f'uint8 or float32, got {list(x.shape)} of {x.dtype}{hint}'
      )
    if not x.size:
      raise ValueError(f'{path}: {split}_x has no pixels: {list(x.shape)}')
    if x.shape[1] in (1, 3, 4) and x.shape[2] == x.shape[3] > 4:
      raise ValueError(
        f'{path}: {split}_x must be [examples, height, width, channels]; '
        f'{list(x.shape)} looks like channels first; convert it by '
        'x.transpose(0, 2, 3, 1)'
      )
    if y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer):
      raise ValueError(
        f'{path}: {split}_y must be one integer for each of the {len(x)} '
        f'images of {split}_x, got {list(y.shape)} of {y.dtype}'
      )
    if y.min() < 0:
      raise ValueError(f'{path}: {split}_y must be at least 0, has {y.min()}')
    _check_classes(arrays['train_y'], y, f'{path}: {split}_y', num_classes)
    if x.dtype == np.float32 and not np.isfinite(x).all():
      raise ValueError(f'{path}: {split}_x has values that are not finite')
    arrays[split + '_y'] = y.astype(np.int32)
  ids, num = arrays.get(_CLIENTS), len(arrays['train_x'])
  if ids is not None and (ids.shape != (num,) or ids.dtype.kind not in 'iuSU'):
    raise ValueError(
      f'{path}: {_CLIENTS} must be one integer or string for each of the {num} '
      f'training images, got {list(ids.shape)} of {ids.dtype}'
    )
  train, test = arrays['train_x'], arrays['test_x']
  if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
    raise ValueError(
      f'{path}: train_x and test_x differ in image shape or type: '
      f'{list(train.shape[1:])} {train.dtype}, '
      f'{list(test.shape[1:])} {test.dtype}'
    )
  return arrays


def _check_classes(train_y, labels, where, num_classes):
  """Checks that the labels are plausible classes.

  Raises:
    ValueError: names a label that is not.
  """
  largest = int(labels.max())
  if num_classes:
    if largest >= num_classes:
      raise ValueError(
        f'{where} has the label {largest}; must be below --num_classes='
        f'{num_classes}'
      )
    return
  present = np.unique(train_y)
  seen = len(present)
  if largest > 9 and largest >= 2 * seen:
    raise ValueError(
      f'{where} has the label {largest}, but the training labels have only '
      f'{seen} different values; if there are that many classes, set '
      '--num_classes'
    )
  alone = np.setdiff1d(labels, present)
  if len(alone):
    raise ValueError(
      f'{where} has the class {alone[0]}, which is not in the training labels; '
      'if that is intended, set --num_classes'
    )


def read_images(path: str, like: Dataset) -> np.ndarray:
  """Reads unlabelled images like those of a data set: the array `x` of an .npz.

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
      f'{want.dtype}, got {list(x.shape)} of {x.dtype}'
    )
  return x
