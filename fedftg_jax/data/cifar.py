"""TFDS builders of CIFAR-10 and CIFAR-100 that need no TensorFlow.

They read the binary files, in which a record is one byte per kind of label
(CIFAR-100: coarse, then fine) and 3 x 32 x 32 bytes of pixels, channel by
channel. As in `idx`, the builders are those of TensorFlow Datasets except for
where they read and how they store.
"""

import numpy as np
from tensorflow_datasets.image_classification import cifar

from fedftg_jax.data import originals

_SHAPE = 3, 32, 32


class _FromBinary(originals.FromFiles):
  """Reads the files of the TFDS builder of the same name."""

  @classmethod
  def file_names(cls, config, split):
    return cls.FILES[split]

  def _read(self, paths):
    size = len(self.LABELS) + np.prod(_SHAPE)
    content = []
    for path in paths:
      values = np.frombuffer(originals.read_bytes(path), np.uint8)
      if not len(values) or len(values) % size:
        raise ValueError(
          f'{path}: must hold records of {size} bytes, has {len(values)} bytes'
        )
      content.append(values.reshape(-1, size))
    records = np.concatenate(content)
    images = records[:, len(self.LABELS) :].reshape(-1, *_SHAPE)
    return images.transpose(0, 2, 3, 1), dict(zip(self.LABELS, records.T))

  def _more(self, split, number):
    return {'id': f'{split}_{number:05d}'}


class Cifar10(_FromBinary, cifar.Cifar10, skip_registration=True):  # type: ignore[call-arg]
  """The data set `cifar10`."""

  FILES = {
    'train': tuple(f'data_batch_{i}.bin' for i in range(1, 6)),
    'test': ('test_batch.bin',),
  }
  LABELS = ('label',)
  ARCHIVE = 'cifar-10-batches-bin'


class Cifar100(_FromBinary, cifar.Cifar100, skip_registration=True):  # type: ignore[call-arg]
  """The data set `cifar100`, with the fine labels as `label`."""

  FILES = {'train': ('train.bin',), 'test': ('test.bin',)}
  LABELS = ('coarse_label', 'label')
  ARCHIVE = 'cifar-100-binary'
