"""A federation's rows as one array, and data sets that are made up."""

import hashlib
import os

from absl.testing import absltest, parameterized
import numpy as np

from fedftg_jax.data import datasets, partition, synthetic
from fedftg_jax.data import parts as parts_lib
from fedftg_jax.data.parts import Parts

LISTS = [[4, 1], [], [0, 9, 3], [7]]


class PartsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.arrays = [np.array(part, int) for part in LISTS]
    self.parts = Parts.of(self.arrays)

  def test_reads_like_a_list(self):
    self.assertLen(self.parts, 4)
    for k, part in enumerate(self.parts):
      self.assertEqual(part.tolist(), LISTS[k])
      self.assertEqual(self.parts[k].tolist(), LISTS[k])
    self.assertEqual(self.parts[-1].tolist(), [7])
    self.assertEqual([p.tolist() for p in self.parts[1:3]], LISTS[1:3])
    with self.assertRaises(IndexError):
      self.parts[4]
    self.assertIs(Parts.of(self.parts), self.parts)
    self.assertEqual(self.parts.owners().tolist(), [0, 0, 2, 2, 2, 3])
    self.assertEqual(self.parts.places().tolist(), [0, 1, 0, 1, 2, 0])
    some = self.parts.rows_of(np.array([3, 1, 0, 3]))
    self.assertEqual(some.tolist(), [7, 4, 1, 7])

  def test_by_owner(self):
    parts = Parts.by_owner(np.array([2, 0, 2, 0]), 4, np.array([5, 6, 7, 8]))
    self.assertEqual([p.tolist() for p in parts], [[6, 8], [], [5, 7], []])

  @parameterized.parameters(1, 3, 100)
  def test_digest(self, block):
    """By hand: each client's number of rows, then the rows."""
    want = hashlib.sha256()
    for part in LISTS:
      want.update(np.array([len(part), *part], np.int64))
    with absltest.mock.patch.object(parts_lib, '_BLOCK', block):
      self.assertEqual(
        Parts.of(self.arrays).digest.hexdigest(), want.hexdigest()
      )

  def test_files_of_both_forms(self):
    """Also with one array per client, as earlier versions wrote it."""
    parts = partition.dirichlet(np.arange(50) % 5, 12, 0.1)
    path = os.path.join(self.create_tempdir().full_path, 'p.npz')
    np.savez(path, **{f'client_{k:06d}': part for k, part in enumerate(parts)})
    old = partition.load(path, 50)
    partition.save(path, parts)
    new = partition.load(path, 50)
    for a, b, c in zip(parts, old, new, strict=True):
      self.assertEqual((a.tolist(), a.tolist()), (b.tolist(), c.tolist()))
    np.savez(path, rows=np.arange(50), sizes=np.array([20, 20]))
    with self.assertRaisesRegex(ValueError, 'sum to the number of rows, 50'):
      partition.load(path, 50)


class SyntheticTest(parameterized.TestCase):
  def test_clients_have_examples_of_their_own(self):
    dataset = datasets.load('synthetic:clients=200,examples=5-9')
    parts = partition.natural(dataset.train_clients, dataset.num_natural)
    self.assertLen(parts, 200)
    self.assertEqual((parts.sizes.min(), parts.sizes.max()), (5, 9))
    labels = [dataset.train_y[part] for part in parts]
    most = [np.bincount(y).max() / len(y) for y in labels]
    self.assertBetween(np.mean(most), 0.5, 0.75)  # half, and what chance adds
    images = dataset.train_x.reshape(len(dataset.train_x), -1)
    self.assertLen(np.unique(images, axis=0), len(images))
    self.assertEqual(dataset.train_x.shape[1:], (8, 8, 1))

  def test_the_same_bytes_every_time(self):
    """Also in blocks of another size, and whatever the number of tests."""
    arrays = synthetic.make(synthetic.parse('clients=50'))
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
      digest.update(f'{name} {array.dtype} {array.shape}'.encode())
      digest.update(array)
    self.assertStartsWith(digest.hexdigest(), '9302e23a5812248f')
    with absltest.mock.patch.object(synthetic, '_BLOCK', 1024):
      other = synthetic.make(synthetic.parse('clients=50,test=10'))
    np.testing.assert_array_equal(other['train_x'], arrays['train_x'])

  @parameterized.parameters(
    ('', 0.9), ('clients=60,examples=100-300,classes=62,size=28', 0.5)
  )
  def test_a_linear_classifier_can_learn_it(self, text, at_least):
    dataset = datasets.load(f'synthetic:{text}')
    mean = np.stack(
      [
        dataset.train_x[dataset.train_y == c].mean(0)
        for c in range(dataset.num_classes)
      ]
    ).reshape(dataset.num_classes, -1)
    images = dataset.test_x.reshape(len(dataset.test_x), -1)
    guess = np.argmax(images @ mean.T - (mean**2).sum(1) / 2, axis=1)
    self.assertGreater(np.mean(guess == dataset.test_y), at_least)

  @parameterized.parameters(
    ('num=3', "has no setting 'num'; must be of clients, examples"),
    ('clients=0', "clients must be a number from 1 to .*, got '0'"),
    ('clients=1e6', "clients must be a number .*, got '1e6'"),
    ('examples=30-10', "examples must be .*LEAST-MOST.*, got '30-10'"),
    ('size=3', 'size must be a number from 4'),
    ('clients=2000000000', 'GiB of images; must be at most 64'),
  )
  def test_errors(self, text, message):
    with self.assertRaisesRegex(ValueError, f'^synthetic.*{message}'):
      datasets.check_name(f'synthetic:{text}')


if __name__ == '__main__':
  absltest.main()
