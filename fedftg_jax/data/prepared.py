"""Reads data sets of TensorFlow Datasets without TensorFlow.

TFDS can read array_record files at random positions (`as_data_source`) without
TensorFlow. The data sets of `BUILDERS` can also be prepared without it; others
must have been prepared where TensorFlow is installed.
"""

import json
import pathlib
import re
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants, read_only_builder

from fedftg_jax.data import cifar, idx, mnist5k, originals
from fedftg_jax.data import images as images_lib

BUILDERS = {
  builder.name: builder
  for builder in (
    mnist5k.Mnist5k,
    idx.Mnist,
    idx.FashionMnist,
    idx.Kmnist,
    idx.Emnist,
    cifar.Cifar10,
    cifar.Cifar100,
  )
}
# Features that name the client of an example; the first one that exists counts.
CLIENT_FEATURES = ('client_id', 'writer_id', 'user_id')


def check(name: str, data_dir: str | None, manual_dir: str | None) -> None:
  """Checks that `read` will find what it needs.

  Raises:
    ValueError: if not.
  """
  builder = _find(name, data_dir)
  if builder is not None:
    _check_features(builder)
  else:
    _original_folder(name, data_dir, manual_dir)


def read(
  name: str, data_dir: str | None, manual_dir: str | None
) -> dict[str, Any]:
  """Reads the splits of a data set, and prepares it first if necessary.

  TFDS stores examples in a shuffled order. Here they are sorted by label, and
  within a label by a digest of the image, so that nothing depends on how TFDS
  shuffles.

  Args:
    name: NAME, NAME/CONFIG or NAME:VERSION, as in TFDS.
    data_dir: where TFDS keeps prepared data; None for its default.
    manual_dir: where the original files are; None for the usual places.

  Returns:
    train_x, train_y, test_x, test_y, and train_client_id if a feature names the
    client of an example. Without a test split, `validation` is used. And
    class_names, if the data set names its classes.

  Raises:
    ValueError: says what is missing and where it belongs.
  """
  builder = _find(name, data_dir) or _prepare(name, data_dir, manual_dir)
  image, label = _check_features(builder)
  arrays = {}
  for split, stored in zip(originals.SPLITS, _splits(builder)):
    try:
      examples = _examples(builder, stored, image)
    except Exception as error:  # the reader raises many types for damaged files
      raise ValueError(
        f'{builder.data_dir}: cannot read the {stored} split '
        f'({type(error).__name__}: {error}); delete this folder to prepare it '
        'again'
      ) from error
    images = images_lib.stack([example[image] for example in examples])
    labels = np.array([example[label] for example in examples], np.int32)
    keys = [_digest(images), labels]
    clients = _clients(builder, examples) if split == 'train' else None
    if clients is not None:
      keys.insert(0, clients)
    order = np.lexsort(keys)
    arrays[split + '_x'], arrays[split + '_y'] = images[order], labels[order]
    if clients is not None:
      arrays['train_client_id'] = clients[order]
  feature = builder.info.features[label]
  if getattr(feature, 'num_classes', None):
    arrays['class_names'] = feature.names
  return arrays


def _find(name, data_dir):
  """Returns the builder of a data set that is already prepared, or None.

  Raises:
    ValueError: if it is prepared in a form that needs TensorFlow.
  """
  if not re.fullmatch(r'\w+(/[\w.+-]+)?(:[\d.*]+)?', name):
    return None
  _refuse_code(pathlib.Path(data_dir or constants.DATA_DIR, name.split(':')[0]))
  try:
    builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError:
    return None
  formats = {f.value for f in builder.info.available_file_formats()}
  if 'array_record' not in formats:
    raise ValueError(
      f'{builder.data_dir}: is prepared as {", ".join(sorted(formats))}, which '
      'only TensorFlow can read; where it is installed, prepare the data with '
      '--file_format=array_record in another folder, and name that folder in '
      '--data_dir'
    )
  return builder


def _refuse_code(folder: pathlib.Path) -> None:
  """Refuses features of foreign classes, because TFDS imports their code.

  Raises:
    ValueError: names the file and the class.
  """

  def classes(value):
    if isinstance(value, dict):
      for key in ('type', 'pythonClassName', 'python_class_name'):
        if isinstance(value.get(key), str):
          yield value[key]
    if isinstance(value, dict | list):
      for part in value.values() if isinstance(value, dict) else value:
        yield from classes(part)

  for path in folder.rglob('features.json'):
    try:
      found = classes(json.loads(path.read_text()))
      foreign = [
        name
        for name in found
        if '.' in name and not name.startswith('tensorflow_datasets.')
      ]
    except (OSError, ValueError, RecursionError) as error:
      raise ValueError(f'{path}: cannot be read ({error})') from error
    if foreign:
      raise ValueError(
        f'{path}: names {foreign[0]}; must have only features of '
        'tensorflow_datasets, since others would execute code'
      )


def _original_folder(name, data_dir, manual_dir) -> pathlib.Path | None:
  """Finds the folder from which a data set can be prepared, see `find_folder`.

  It is None for mnist5k, which needs none.
  """
  base, _, config = name.partition('/')
  builder = BUILDERS.get(base)
  root = data_dir or constants.DATA_DIR
  if builder is None:
    _explain(name, root)
  configs = [c.name for c in builder.BUILDER_CONFIGS]  # type: ignore[union-attr]
  if configs and config not in configs:
    raise ValueError(f'must be {base}/ and one of {", ".join(configs)}')
  if config and not configs:
    raise ValueError(
      f'{base} has no configurations; did you mean --dataset={base}?'
    )
  if not issubclass(builder, originals.FromFiles):  # type: ignore[arg-type]
    return None
  return originals.find_folder(
    builder,  # type: ignore[arg-type]
    config or None,
    manual_dir,
    f'{root}/downloads/manual',  # type: ignore[arg-type]
  )


def _explain(name, root):
  """Explains what to do about a data set that is not there.

  Raises:
    ValueError: always.
  """
  base = re.split('[/:]', name)[0]
  if base not in BUILDERS and base not in tfds.list_builders(
    with_community_datasets=False
  ):
    path = pathlib.Path(name)
    kind = 'folder' if path.is_dir() else 'npz' if path.is_file() else ''
    hint = f'did you mean {kind}:{name}? ' if kind else ''
    raise ValueError(
      f'{hint}must be one of {", ".join(BUILDERS)}, npz:PATH, folder:PATH, '
      'synthetic, or another image-classification set of TensorFlow Datasets'
    )
  raise ValueError(
    f'is not prepared in {root}; where TensorFlow is installed, run "tfds '
    f'build {name} --file_format=array_record", and name the resulting '
    'folder in --data_dir'
  )


def _prepare(name, data_dir, manual_dir):
  """Writes the data set into `data_dir`, and returns its builder."""
  folder = _original_folder(name, data_dir, manual_dir)
  base, _, config = name.partition('/')
  tfds.disable_progress_bar()

  def make():
    return BUILDERS[base](
      data_dir=data_dir,
      file_format='array_record',
      **({'config': config} if config else {}),
    )

  builder = make()
  try:
    builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(manual_dir=folder)
    )
  except OSError:
    builder = make()  # another process may have prepared it meanwhile
    if not builder.is_prepared():
      raise
  return builder


def _check_features(builder) -> tuple[str, str]:
  """Returns the names of the image and the label.

  Raises:
    ValueError: if this is not an image classification, or lacks a split.
  """
  features = builder.info.features
  image, label = builder.info.supervised_keys or ('image', 'label')
  try:
    fits = (
      len(features[image].shape) == 3
      and features[label].shape == ()
      and np.issubdtype(features[label].np_dtype, np.integer)
    )
  except (KeyError, TypeError, AttributeError):
    fits = False
  if not fits:
    raise ValueError(
      f'{builder.data_dir}: is not an image-classification set (one image and '
      'one label per example)'
    )
  _splits(builder)
  return image, label


def _splits(builder) -> tuple[str, str]:
  """Returns the names of the train and the test split."""
  names = list(builder.info.splits)
  test = next((name for name in ('test', 'validation') if name in names), None)
  if 'train' not in names or test is None:
    raise ValueError(
      f'{builder.data_dir}: must have the splits train and test (or '
      f'validation), has {", ".join(names)}'
    )
  return 'train', test


def _examples(builder, split, image):
  """Returns all examples of a split, with images decoded."""
  if not isinstance(builder.info.features[image], tfds.features.Image):
    return list(builder.as_data_source(split))
  source = builder.as_data_source(
    split, decoders={image: tfds.decode.SkipDecoding()}
  )
  # Reading all together is five times faster than one by one.
  return [
    {**example, image: images_lib.decode(example[image])}
    for example in source.__getitems__(range(len(source)))
  ]


def _clients(builder, examples) -> np.ndarray | None:
  """Returns the client of each example, or None if no feature names it."""
  for name in CLIENT_FEATURES:
    if name in builder.info.features:
      values = [example[name] for example in examples]
      return np.array(
        [v.decode() if isinstance(v, bytes) else v for v in values]
      )
  return None


def _digest(images: np.ndarray) -> np.ndarray:
  """Computes one integer per image that tells different images apart."""
  flat = images.reshape(len(images), -1).view(np.uint8)
  powers = np.cumprod(np.full(flat.shape[1], 1_099_511_628_211, np.uint64))
  return np.concatenate(
    [  # in parts, since each pixel needs eight bytes here
      some.astype(np.uint64) @ powers
      for some in np.array_split(flat, len(flat) // 4096 + 1)
    ]
  )
