"""TFDS builders of the MNIST family that need no TensorFlow.

They read LeCun's IDX format: two zero bytes, the type of the values (8:
unsigned bytes), the number of axes, the length of each axis as a big-endian
32-bit integer, then the values. Files may be gzipped.

The builders are those of TensorFlow Datasets, with the same names, versions and
features, but they read the files from a folder and store PNG bytes, which TFDS
can write to array_record files without TensorFlow. What is prepared is
therefore what TFDS would have prepared. EMNIST's images, too, are as TFDS has
them, which leaves them as they are in NIST's files: transposed relative to
MNIST's.
"""

import pathlib

import numpy as np
from tensorflow_datasets.image_classification import mnist

from fedftg_jax.data import originals

_BYTES = 8  # the format's code for unsigned bytes


def read(path: pathlib.Path) -> np.ndarray:
  """Reads the array of bytes in an IDX file, gzipped if it ends in .gz.

  Raises:
    ValueError: if it is not such a file.
  """
  content = originals.read_bytes(path)
  if len(content) < 4 or content[:3] != bytes([0, 0, _BYTES]):
    raise ValueError(f'{path}: is not an IDX file of bytes')
  start = 4 + 4 * content[3]
  shape = np.frombuffer(content[4:start], '>u4').astype(int)
  values = np.frombuffer(content[start:], np.uint8)
  if len(shape) != content[3] or len(values) != np.prod(shape):
    raise ValueError(
      f'{path}: should hold {" x ".join(map(str, shape))} bytes according to '
      f'its header, has {len(values)}'
    )
  return values.reshape(shape)


class _FromIdx(originals.FromFiles):
  """Reads `<prefix>-images-idx3-ubyte` and `<prefix>-labels-idx1-ubyte`."""

  PREFIXES = {'train': 'train', 'test': 't10k'}

  @classmethod
  def file_names(cls, config, split):
    prefix = cls.PREFIXES[split].format(config)
    return f'{prefix}-images-idx3-ubyte', f'{prefix}-labels-idx1-ubyte'

  def _read(self, paths):
    images, labels = map(read, paths)
    height_width = self.info.features['image'].shape[:2]
    if images.shape[1:] != height_width or labels.shape != images.shape[:1]:
      raise ValueError(
        f'{paths[0]}, {paths[1].name}: must hold images '
        f'[examples, {height_width[0]}, {height_width[1]}] and one label each, '
        f'have {list(images.shape)} and {list(labels.shape)}'
      )
    return images[..., None], {'label': labels}


class Mnist(_FromIdx, mnist.MNIST, skip_registration=True):  # type: ignore[call-arg]
  """The data set `mnist`."""


class FashionMnist(_FromIdx, mnist.FashionMNIST, skip_registration=True):  # type: ignore[call-arg]
  """The data set `fashion_mnist`, with files from a Debian package."""

  PLACES = ('/usr/share/datasets/fashion-mnist',)  # type: ignore[assignment]
  INSTALL = "install Debian's package dataset-fashion-mnist"


class Kmnist(_FromIdx, mnist.KMNIST, skip_registration=True):  # type: ignore[call-arg]
  """The data set `kmnist`."""


class Emnist(_FromIdx, mnist.EMNIST, skip_registration=True):  # type: ignore[call-arg]
  """The data sets `emnist/byclass`, `bymerge`, `balanced` and so on.

  There are also `letters`, `digits` and `mnist`.
  """

  PREFIXES = {'train': 'emnist-{}-train', 'test': 'emnist-{}-test'}
  ARCHIVE = 'gzip'
