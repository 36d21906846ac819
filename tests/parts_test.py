"""A federation's rows as one array."""

import hashlib
import os

from absl.testing import absltest, parameterized
import numpy as np

from fedftg_jax.data import partition
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


if __name__ == '__main__':
  absltest.main()
