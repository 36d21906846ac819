"""Tests of clients' slots on the host: the same results from a small table."""

import pathlib
import resource

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

  def test_rows_of_files(self):
    """Read and written past the mapping, which shows the same."""
    slot = {'a': np.float32(3), 'b': np.zeros((2, 3), np.int16), 'c': ()}
    rows = client_state.allocate(slot, 10, self.create_tempdir().full_path)
    ids = np.array([7, 8, 2, 4])
    new = {
      'a': np.arange(4, dtype=np.float32),
      'b': np.arange(24, dtype=np.int16).reshape(4, 2, 3),
      'c': (),
    }
    client_state.write(rows, ids, new)
    chex.assert_trees_all_equal(client_state.read(rows, ids), new)
    np.testing.assert_array_equal(rows['a'], [3, 3, 2, 3, 3, 3, 3, 0, 1, 3])
    np.testing.assert_array_equal(rows['b'][ids], new['b'])
    order = np.array([8, 8, 0, 1])
    read = client_state.read(rows, order)
    for name in 'ab':
      np.testing.assert_array_equal(read[name], rows[name][order])

  def test_files_of_zeros_are_sparse(self):
    """On the disk are the rows that were written, and not all."""
    folder = pathlib.Path(self.create_tempdir().full_path)
    slot = np.zeros(1024, np.float32)  # a page
    rows = client_state.allocate(slot, 10_000, folder)
    (file,) = folder.iterdir()
    self.assertGreater(file.stat().st_size, 40e6)
    self.assertLess(512 * file.stat().st_blocks, 1e5)
    client_state.write(rows, np.arange(5000, 5100), np.ones((100, 1024)))
    self.assertBetween(512 * file.stat().st_blocks, 100 * 4096, 1e6)
    self.assertEqual(rows[5050].sum(), 1024)
    self.assertEqual(client_state.read(rows, np.array([9999])).sum(), 0)

  def test_a_file_that_cannot_grow(self):
    """An error that names the file, and not a crash of the process."""
    folder = pathlib.Path(self.create_tempdir().full_path)
    rows = client_state.allocate(np.zeros(1024, np.float32), 1000, folder)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, before)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    with self.assertRaisesRegex(OSError, 'too large: .*slot000.npy'):
      client_state.write(rows, np.array([900]), np.ones((1, 1024)))


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
