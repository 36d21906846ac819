"""Tests of clients' slots on the host: the same results from a small table."""

from absl.testing import absltest, parameterized
import chex
import jax
import numpy as np
import pytest

from fedftg_jax import base, client_state, federation, recipes
from fedftg_jax.data import schedules
from tests import problems

KEY = jax.random.key(5)
# A full cohort, a small one, a padded one, the others; chunks of two rounds.
ROWS = [[0, 1], [0, 4], [3, -1], [2, 3], [1, 4]]


def make(name='scaffold+fed_dyn+moon', **settings):
  method = recipes.build(
    name, recipes.Settings(problems.LINEAR, problems.NUM_CLASSES)
  )
  return problems.make(problems.LINEAR, method, **settings)


def make_schedule():
  schedule = schedules.with_dropouts(problems.schedule(ROWS), 0.3, seed=2)
  assert not schedule.arrived[schedule.client_id < 5].all()
  return schedule


class TableTest(parameterized.TestCase):
  def test_there_and_back(self):
    clients = {'a': np.arange(6.0), 'b': np.arange(12).reshape(6, 2)}
    rows = problems.schedule([[4, 1], [4, -1], [2, 5]], 6)
    table, placed, ids = client_state.to_table(clients, rows, 6, size=5)
    np.testing.assert_array_equal(ids, [1, 2, 4, 5])
    np.testing.assert_array_equal(table['a'][:4], ids)
    np.testing.assert_array_equal(placed.place, [[0, 2], [2, 5], [1, 3]])
    np.testing.assert_array_equal(placed.client_id, rows.client_id)
    client_state.from_table(
      clients, jax.tree.map(lambda a: a + 100, table), ids
    )
    np.testing.assert_array_equal(clients['a'], [0, 101, 102, 3, 104, 105])
    np.testing.assert_array_equal(clients['b'][3], [6, 7])

  @parameterized.parameters((5, 2, 3, 5), (100, 2, 3, 6))
  def test_size(self, num_clients, num_rounds, cohort, want):
    self.assertEqual(
      client_state.table_size(num_clients, num_rounds, cohort), want
    )

  def test_allocate(self):
    folder = self.create_tempdir().full_path
    slot = {'a': np.float32(3), 'b': np.array([1, 2], np.int32)}
    for where in (None, folder):
      rows = client_state.allocate(slot, 4, where)
      np.testing.assert_array_equal(rows['b'], [[1, 2]] * 4)
      self.assertEqual(rows['a'].dtype, np.float32)
      self.assertEqual(isinstance(rows['a'], np.memmap), where is not None)


class HostTest(parameterized.TestCase):
  def test_same_as_on_the_device(self):
    self.check_same(mapped=True, devices=None)

  @parameterized.parameters((False, None), (True, 2), (False, 2))
  @pytest.mark.slow  # below `parameters`: applies to all cases
  def test_other_places_are_the_same(self, mapped, devices):
    self.check_same(mapped, devices)

  def check_same(self, mapped, devices):
    mesh = devices and federation.stacking.make_mesh(devices)
    here, there = make(mesh=mesh), make(mesh=mesh, client_state='host')
    folder = [self.create_tempdir().full_path] if mapped else []
    want, metrics = federation.run(
      here, here.init(KEY), problems.DATA, make_schedule(), KEY, every=2
    )
    got, other = federation.run(
      there,
      there.init(KEY, *folder),
      problems.DATA,
      make_schedule(),
      KEY,
      every=2,
    )
    chex.assert_trees_all_equal(jax.device_get(got), jax.device_get(want))
    chex.assert_trees_all_equal(other, metrics)
    for leaf in jax.tree.leaves(got.clients):
      self.assertIsInstance(leaf, np.memmap if mapped else np.ndarray)

  def test_the_device_holds_the_table_alone(self):
    """The number of rows on the device is that of a chunk.

    It does not depend on the number of clients.
    """
    sizes = [4] * 60
    data = problems.make_data(sizes)
    fed = make('scaffold', sizes=sizes, client_state='host')
    state = fed.init(KEY)
    seen = []

    def look(state, *_):
      seen.append([a.shape[0] for a in jax.tree.leaves(state.clients)])
      bits = np.zeros((2, 2), np.uint32)
      return federation.State(*state), base.Info(
        {'bits_down': bits, 'bits_up': bits}
      )

    rows = problems.schedule([[0, 59], [7, 8]], 60)
    with absltest.mock.patch.object(
      federation,
      '_scan_rounds',
      lambda fed, state, *rest: look(jax.device_get(state)),
    ):
      federation.run(fed, state, data, rows, KEY, every=2)
    self.assertEqual(seen, [[4, 4]])

  def test_one_trace(self):
    chex.clear_trace_counter()
    traced = chex.assert_max_traces(n=1)(problems.LINEAR.apply)
    fed = problems.make(
      problems.LINEAR._replace(apply=traced), client_state='host'
    )
    federation.run(
      fed, fed.init(KEY), problems.DATA, make_schedule(), KEY, every=2
    )

  def test_errors(self):
    with self.assertRaisesRegex(ValueError, 'client_state must be one of'):
      make(client_state='moon')
    with self.assertRaisesRegex(ValueError, "needs client_state='device'"):
      federation.over_seeds(make(client_state='host'))


if __name__ == '__main__':
  absltest.main()
