"""Tests that chunks and devices give the results of a single stack."""

import re

from absl.testing import absltest, parameterized
import chex
import jax
from jax import enable_x64
import jax.numpy as jnp
import numpy as np
import pytest

from fedftg_jax import federation, recipes, stacking
from tests import problems

KEY = jax.random.key(3)
# Adam amplifies rounding errors; a small rate keeps them small.
FTG = dict(iterations=1, student_steps=2, batch_size=6, generator_lr=1e-4)
DF = dict(generator_steps=2, student_steps=2, batch_size=6, generator_lr=1e-4)
JOINT = {**FTG, 'gen_step': 'joint'}
MEMORY = {**JOINT, 'memory': 0.9}  # one more teacher than clients


def make(name, model=problems.LINEAR, options=None, **settings):
  method = recipes.build(
    name,
    recipes.Settings(
      model,
      problems.NUM_CLASSES,
      generator=problems.GENERATOR,
      options={'fed_ftg': options or FTG, 'fed_df': DF},
    ),
  )
  return problems.make(model, method, **settings)


class ChunkTest(parameterized.TestCase):
  @parameterized.parameters(
    (100, 10, 10, 10),
    (99, 10, 10, 5),  # 9 would fit: chunks are equal
    (45, 10, 10, 4),
    (5, 10, 10, 1),  # less than one: it is tried all the same
    (-5, 10, 3, 1),
    (100, 0, 3, 3),
  )
  def test_fits(self, free, each, rows, want):
    self.assertEqual(stacking.chunk_that_fits(free, each, rows), want)


class OverClientsTest(parameterized.TestCase):
  """Compares with a Python loop."""

  @parameterized.product(chunk=(0, 1, 2, 3, 5, 9), devices=(None, 1, 2, 8))
  def test_sums_and_stacks(self, chunk, devices):
    mesh = devices and stacking.make_mesh(devices)
    num = stacking.num_rows(5, chunk, mesh)
    rows = np.arange(num, dtype=np.float32), np.ones((num, 2), np.float32)

    def function(shared, row):
      number, vector = row
      return {'sum': shared * number}, (number**2, vector + number)

    summed, (squares, vectors) = jax.jit(
      lambda rows: stacking.over_clients(function, 2.0, rows, chunk, mesh)
    )(rows)
    self.assertEqual(float(summed['sum']), 2 * rows[0].sum())
    np.testing.assert_array_equal(squares, rows[0] ** 2)
    np.testing.assert_array_equal(vectors, 1 + rows[0][:, None] * [[1, 1]])

  @parameterized.parameters(
    (5, 0, None, 5),
    (5, 1, None, 5),
    (5, 2, None, 6),
    (5, 9, None, 5),
    (5, 0, 2, 6),
    (5, 2, 2, 8),
    (5, 3, 2, 6),
    (5, 0, 8, 8),
    (1, 1, 1, 1),
  )
  def test_num_rows(self, cohort, chunk, devices, want):
    mesh = devices and stacking.make_mesh(devices)
    self.assertEqual(stacking.num_rows(cohort, chunk, mesh), want)

  def test_too_many_devices(self):
    with self.assertRaisesRegex(ValueError, r'0 \(all\) to 8, .* got 9'):
      stacking.make_mesh(9)
    self.assertEqual(stacking.make_mesh(0).size, 8)


class DevicesTest(parameterized.TestCase):
  """Rounds on 1, 2, 4 and 8 devices, with cohorts that they do not divide."""

  ROWS = [[0, 1, 2, 3, 4], [0, 2, 4, -1, -1], [1, 3, -1, -1, -1]]

  def after(self, name, devices, **settings):
    mesh = devices and stacking.make_mesh(devices)
    fed = make(name, mesh=mesh, **settings)
    return federation.run(
      fed,
      fed.init(KEY),
      problems.make_data(),
      problems.schedule(self.ROWS),
      KEY,
      every=2,
    )

  def check_same(self, meshes, name, options=None):
    with enable_x64(True):
      state, metrics = self.after(name, None, options=options)
      for devices, chunk in meshes:
        other, other_metrics = self.after(
          name, devices, client_chunk=chunk, options=options
        )
        chex.assert_trees_all_close(other, state, atol=1e-9)
        chex.assert_trees_all_close(other_metrics, metrics, atol=1e-9)

  def test_same_on_any_number(self):
    self.check_same(((2, 1),), 'fed_dyn+fed_nova')

  @parameterized.parameters(
    ('fed_avg',),
    ('scaffold+fed_ftg',),
    ('fed_ftg', MEMORY),
    ('fed_df',),
    ('fed_dyn+fed_nova',),
  )
  @pytest.mark.slow  # below `parameters`: applies to all cases
  def test_every_method_is_the_same_on_any_number(self, *method):
    self.check_same(((1, 0), (2, 1), (4, 0), (8, 0)), *method)

  def test_teachers_on_different_devices(self):
    """When teachers run at the same time, each device has its own share."""
    mesh = stacking.make_mesh(4)
    fed = make('fed_ftg', options=JOINT, mesh=mesh)
    state, data = stacking.put((fed.init(KEY), problems.DATA), mesh)
    text = fed.round.lower(
      state,
      data,
      jax.tree.map(lambda a: a[0], problems.schedule([range(4)])),
      KEY,
    ).as_text()
    kernel = '4x64x3xf32'  # four teachers' linear layers
    self.assertRegex(
      text, rf'sharding_constraint .*"clients".*: tensor<{kernel}>'
    )

  @pytest.mark.slow
  def test_over_seeds(self):
    with enable_x64(True):
      seeds = jnp.stack([jax.random.key(s) for s in (3, 4)])
      both = [
        federation.over_seeds(make('fed_avg', mesh=mesh))
        for mesh in (None, stacking.make_mesh(4))
      ]
      (state, _), (other, _) = [
        federation.run(
          fed,
          fed.init(seeds),
          problems.make_data(),
          problems.schedule(self.ROWS),
          seeds,
        )
        for fed in both
      ]
      chex.assert_trees_all_close(other, state, atol=1e-9)

  def test_no_client_is_gathered(self):
    self.check_not_gathered('fed_nova+fed_prox')

  @pytest.mark.slow
  def test_no_client_of_fed_avg_is_gathered(self):
    self.check_not_gathered('fed_avg')

  def check_not_gathered(self, name):
    """Checks that devices exchange sums, not clients.

    The model has a convolution per client. Afterwards only the number of bits
    that it sent is known of each client.
    """
    mesh = stacking.make_mesh(4)
    fed = make(name, problems.make_model('batch'), mesh=mesh)
    state, data = stacking.put((fed.init(KEY), problems.DATA), mesh)
    text = (
      fed.round.lower(state, data, problems.row(range(5)), KEY)
      .compile()
      .as_text()
    )
    self.assertIn('all-reduce', text)
    gathered = re.findall(r'= (\S+) all-gather\(', text)
    self.assertEqual({kind.split('[')[0] for kind in gathered}, {'u32'})
    for exchange in ('all-to-all', 'collective-permute'):
      self.assertNotIn(exchange, text)

  def test_one_trace(self):
    chex.clear_trace_counter()
    traced = chex.assert_max_traces(n=1)(problems.LINEAR.apply)
    fed = make(
      'fed_avg',
      problems.LINEAR._replace(apply=traced),
      mesh=stacking.make_mesh(2),
    )
    state = fed.init(KEY)
    for _ in range(2):
      state, _ = federation.run(
        fed, state, problems.DATA, problems.schedule(self.ROWS), KEY, every=2
      )
    self.assertEqual(int(state.round), 6)


if __name__ == '__main__':
  absltest.main()
