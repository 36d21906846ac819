"""Tests of schedules and of clients as rows of flat arrays; their errors."""

import os

from absl.testing import absltest, parameterized
import jax
import numpy as np

from fedftg_jax.base import NO_LIMIT
from fedftg_jax.data import clients, schedules
from fedftg_jax.data.parts import Parts


class SchedulesTest(parameterized.TestCase):
  @parameterized.parameters(
    schedules.exact, schedules.bernoulli, schedules.poisson
  )
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
    np.testing.assert_allclose(counts / 200, 0.4, atol=0.12)

  def test_bernoulli_is_never_empty(self):
    rows = schedules.bernoulli(300, 10, 1, 0)
    sizes = rows.arrived.sum(1)
    self.assertEqual(sizes.min(), 1)
    self.assertGreater(sizes.max(), 2)
    np.testing.assert_array_equal(rows.client_id == 10, ~rows.arrived)

  def test_poisson_draws_clients_and_rounds_independently(self):
    rows = schedules.poisson(2000, 10, 1, 0)
    taking_part = np.stack([(rows.client_id == k).any(1) for k in range(10)])
    np.testing.assert_allclose(taking_part.mean(1), 0.1, atol=0.02)
    sizes = rows.arrived.sum(1)
    for size, want in enumerate((0.9**10, 10 * 0.1 * 0.9**9)):
      self.assertAlmostEqual(np.mean(sizes == size), want, delta=0.03)
    np.testing.assert_array_equal(rows.client_id == 10, ~rows.arrived)
    rows = schedules.poisson(2000, 2, 1, 0, np.array([1.0, 0.2]))
    rates = [(rows.client_id == k).any(1).mean() for k in range(2)]
    np.testing.assert_allclose(rates, [0.5, 0.1], atol=0.03)

  def test_file(self):
    path = os.path.join(self.create_tempdir().full_path, 's.npy')
    np.save(path, [[3, 1], [0, -1], [2, 0]])
    rows = schedules.load(path, 2, 5)
    np.testing.assert_array_equal(rows.client_id, [[1, 3], [0, 5]])
    with self.assertRaisesRegex(ValueError, 'has 3 rounds, but 4 are needed'):
      schedules.load(path, 4, 5)
    np.save(path, np.zeros(4))
    with self.assertRaisesRegex(ValueError, 'integers .rounds, cohort'):
      schedules.load(path, 2, 5)

  def test_dropouts(self):
    rows = schedules.exact(400, 10, 4, 0)
    fewer = schedules.with_dropouts(rows, 0.3, 1)
    np.testing.assert_array_equal(fewer.client_id, rows.client_id)
    self.assertAlmostEqual(fewer.arrived.mean(), 0.7, delta=0.04)
    again = schedules.with_dropouts(schedules.exact(5, 10, 4, 0), 0.3, 1)
    np.testing.assert_array_equal(again.arrived, fewer.arrived[:5])
    self.assertIs(schedules.with_dropouts(rows, 0.0, 1), rows)

  def test_dropouts_that_have_worked(self):
    rows = schedules.from_ids(np.array([[3, 0, -1], [1, 2, 4]] * 9), 5)
    fewer = schedules.with_dropouts(rows, 0.5, 1, after_work=True)
    self.assertGreater(np.sum(fewer.worked & ~fewer.arrived), 3)
    np.testing.assert_array_equal(fewer.worked, rows.arrived)
    path = self.create_tempfile('schedule.npz').full_path
    schedules.save(path, fewer, 5)
    again = schedules.load(path, 18, 5)
    for one, other in zip(fewer[:4], again[:4]):
      np.testing.assert_array_equal(one, other)

  def test_all_at_work(self):
    """All clients train, except those that drop out before training.

    Arrivals and stragglers do not change.
    """
    rows = schedules.from_ids(np.array([[3, 0, -1], [1, 2, 4]]), 5)
    rows = rows._replace(
      arrived=rows.arrived & [[True, True, False], [True, False, False]],
      worked=rows.arrived & [[True, True, False], [True, False, True]],
      num_steps=np.array([[7, 2, 9], [5, 6, 8]], np.int32),
    )
    whole = schedules.with_all_at_work(rows, 5)
    np.testing.assert_array_equal(whole.client_id, [range(5)] * 2)
    np.testing.assert_array_equal(
      whole.arrived, [[1, 0, 0, 1, 0], [0, 1, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
      whole.worked, [[1, 1, 1, 1, 1], [1, 1, 0, 1, 1]]
    )
    free = NO_LIMIT
    np.testing.assert_array_equal(
      whole.num_steps, [[7, free, free, 2, free], [free, 5, 6, free, 8]]
    )

  def test_draws_do_not_depend_on_who_else_is_in(self):
    """Client 3 in round 1 gets the same draws in a smaller cohort."""
    large = schedules.from_ids(np.tile(np.arange(8), (50, 1)), 10)
    small = schedules.from_ids(np.full((50, 2), [3, -1]), 10)
    full = np.full(10, 9)
    for change in (
      lambda s: schedules.with_dropouts(s, 0.5, 2).arrived,
      lambda s: schedules.with_stragglers(s, full, 0.5, 2).num_steps,
    ):
      np.testing.assert_array_equal(change(large)[:, 3], change(small)[:, 0])

  def test_stragglers(self):
    rows = schedules.exact(400, 10, 4, 0)
    full = np.arange(1, 11)  # number of steps of each client
    slow = schedules.with_stragglers(rows, full, 0.6, 1)
    straggles = slow.num_steps < NO_LIMIT
    self.assertAlmostEqual(straggles.mean(), 0.6, delta=0.05)
    limit = np.broadcast_to(full[rows.client_id], slow.num_steps.shape)
    self.assertTrue((slow.num_steps[straggles] >= 1).all())
    self.assertTrue((slow.num_steps <= limit)[straggles].all())
    for steps in (1, 5, 10):  # all of these occur for client 9
      self.assertIn(steps, slow.num_steps[(rows.client_id == 9) & straggles])

  @parameterized.parameters(schedules.exact, schedules.bernoulli)
  def test_availability_differs_between_clients(self, make):
    available = np.array([1.0, 1.0, 1.0, 0.1, 0.1])
    rows = make(600, 5, 2, 0, available)
    counts = np.bincount(rows.client_id.ravel(), minlength=6)[:5] / 600
    self.assertGreater(counts[:3].min(), 3 * counts[3:].max())
    self.assertTrue(rows.arrived.any(1).all())
    short = make(10, 5, 2, 0, available)
    for a, b in zip(short.client_id, rows.client_id):
      np.testing.assert_array_equal(a[a < 5], b[b < 5])

  @parameterized.parameters(schedules.exact, schedules.bernoulli)
  def test_nobody_is_ever_available(self, make):
    with self.assertRaisesRegex(ValueError, 'at least 1e-4 .*, got at most 0'):
      make(1, 3, 2, 0, np.zeros(3))

  def test_availability(self):
    self.assertIsNone(schedules.availability(5, 1.0, 0))
    drawn = schedules.availability(1000, 0.4, 0)
    self.assertGreaterEqual(drawn.min(), 0.4)
    self.assertAlmostEqual(drawn.mean(), 0.7, delta=0.02)
    rare = schedules.exact(20, 3, 3, 0, np.full(3, 0.2))  # never nobody
    self.assertTrue(rare.arrived.any(1).all())
    self.assertFalse(rare.arrived.all())

  def test_saved_schedule_is_replayed(self):
    path = os.path.join(self.create_tempdir().full_path, 's.npz')
    rows = schedules.with_stragglers(
      schedules.with_dropouts(schedules.bernoulli(30, 10, 3, 0), 0.3, 0),
      np.full(10, 7),
      0.5,
      0,
    )
    schedules.save(path, rows, 10)
    for a, b in zip(rows, schedules.load(path, 30, 10)):
      np.testing.assert_array_equal(a, b)

  @parameterized.parameters(
    (dict(arrived=np.ones((2, 2))), 'arrived must be bools'),
    (dict(num_steps=np.ones((3, 2), int)), 'num_steps must be integers'),
  )
  def test_unfit_schedule_files(self, arrays, message):
    path = os.path.join(self.create_tempdir().full_path, 's.npz')
    np.savez(path, ids=np.array([[0, 1], [1, 2]]), **arrays)
    with self.assertRaisesRegex(ValueError, message):
      schedules.load(path, 2, 5)

  def test_rates_are_checked(self):
    rows = schedules.exact(2, 3, 2, 0)
    for wrong in (
      lambda: schedules.with_dropouts(rows, 1.5, 0),
      lambda: schedules.with_stragglers(rows, np.ones(3), -1.0, 0),
      lambda: schedules.availability(3, 2.0, 0),
    ):
      with self.assertRaisesRegex(ValueError, 'between 0 and 1'):
        wrong()

  def test_cohort_error(self):
    with self.assertRaisesRegex(ValueError, r'clients \(3\), got 4'):
      schedules.exact(2, 3, 4, 0)


class ClientsTest(absltest.TestCase):
  def test_rows_of_each_client(self):
    x, y = np.arange(10, dtype=np.float32)[:, None], np.arange(10) % 3
    parts = [np.array([4, 1]), np.array([], int), np.array([0, 9, 3])]
    data = clients.from_partition(x, y, parts)
    self.assertEqual(data.index.shape, (3, 3))
    table = [[4, 1, 0], [0, 0, 0], [0, 9, 3]]
    for ids in ([0, 1, 2], [2, 0], [[1], [2]]):
      rows = data.index[np.array(ids)]
      np.testing.assert_array_equal(rows, np.array(table)[ids])
    past_the_end = jax.jit(lambda d: d.index[np.array([3])])(data)
    np.testing.assert_array_equal(past_the_end, [table[2]])
    with self.assertRaises(TypeError):  # it would never end
      iter(data.index)
    for k, part in enumerate(parts):
      one = data._replace(index=data.index[k], count=data.count[k])
      batch = clients.batch(one, np.arange(3), np.arange(3) < len(part))
      np.testing.assert_array_equal(batch.x[batch.mask][:, 0], part)
      np.testing.assert_array_equal(
        clients.label_counts(one, 3), np.bincount(y[part], minlength=3)
      )

  def test_images_are_stored_once_and_as_bytes(self):
    data = clients.from_partition(
      np.zeros((6, 4, 4, 1), np.uint8),
      np.zeros(6, int),
      [np.arange(5), np.array([5])],
    )
    self.assertEqual(data.x.dtype, np.uint8)
    self.assertEqual(data.x.shape[0], 6)
    self.assertLen(jax.tree.leaves(data), 5)

  def test_one_large_client_costs_its_own_rows(self):
    """And not as many entries for each of the other clients."""
    sizes = np.array([3000] + 2000 * [1])
    data = clients.from_partition(
      np.zeros((5000, 1), np.uint8),
      np.zeros(5000, int),
      Parts(np.arange(5000), sizes),
    )
    used = sum(a.nbytes for a in jax.tree.leaves((data.index, data.count)))
    self.assertLess(used, 4 * (5000 + 2 * 2001 + 9))


if __name__ == '__main__':
  absltest.main()
