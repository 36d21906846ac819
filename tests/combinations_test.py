"""Tests of combinations: the table in the documentation, and that it holds."""

import pathlib

from absl.testing import absltest, flagsaver, parameterized
import chex
import jax
import numpy as np
import pytest

from fedftg_jax import federation, recipes, stacking
from fedftg_jax.configuration import combinations
from fedftg_jax.data import schedules
from fedftg_jax.methods import batch_norm
from fedftg_jax.system import cli
from tests import methods_test, problems

DOCS = pathlib.Path(__file__).parents[1] / 'docs' / 'methods.md'


FED_MR = {'`--schedule=bernoulli`', '`--server_optimizer`'}
FED_DM = {
  '`+fed_ftg`',
  '`local`',
  '`reset`',
  '`--server_optimizer`',
  '`--uplink`',
}
PRIVATE = {'`--dp_clip`', '`--secure_aggregation`'}


class TableTest(absltest.TestCase):
  def test_docs_have_it(self):
    with flagsaver.flagsaver():
      cli.parse(['combinations'])
      table = combinations.table()
    self.assertIn(table, DOCS.read_text())
    for name, of_name in combinations.verdicts().items():
      refused = {c for c, why in zip(combinations.COLUMNS, of_name) if why}
      want = {
        'fed_ftg': {'`+fed_ftg`'},
        'fed_mr': FED_MR,
        'fed_dm': FED_DM,
      }.get(name, set())
      if name.startswith('fed_zda'):
        want = want | {'`local`'} | PRIVATE
      if recipes.RECIPES[name].reveals or name == 'fed_align':
        want = want | PRIVATE  # fed_align: its models have BatchNorm
      self.assertEqual(refused, want, name)


class RunTest(parameterized.TestCase):
  """Runs three rounds of each method on a BatchNorm model, in two settings.

  Together the settings cover all columns of the table. Results must be finite.
  """

  @parameterized.parameters(*recipes.RECIPES)
  @pytest.mark.slow
  def test_runs(self, name):
    model = {'fed_align': problems.STAGED, 'fed_dm': methods_test.MODEL}.get(
      name, problems.NORMED
    )
    rows = (
      schedules.exact(3, 5, 3, 0)
      if name == 'fed_mr'
      else schedules.bernoulli(3, 5, 3, 0)
    )
    for policy, place, mesh in (
      ('local', 'host', None),
      ('reset', 'device', stacking.make_mesh(2)),
    ):
      settings = recipes.Settings(
        model,
        methods_test.CLASSES,
        generator=problems.GENERATOR,
        options={
          'fed_ftg': methods_test.FTG,
          'fed_df': methods_test.DF,
          'fed_df_public': methods_test.DF,
          'fed_gen': methods_test.GEN,
          'q_fed_avg': dict(batch_size=4),
          'kd_lwof': methods_test.LWOF,
          'fed_dm': methods_test.DM,
          'fed_zdac': methods_test.ZDAC,
          'fed_zdas': methods_test.ZDAS,
        },
        cohort=3,
        build_model=methods_test.ARCHITECTURES.__getitem__,
        image_shape=problems.IMAGE_SHAPE,
      )
      method = recipes.build(
        name, settings, *batch_norm.policy_parts(policy, model, 4)
      )
      fed = problems.make(model, method, mesh=mesh, client_state=place)
      data = problems.DATA._replace(public=methods_test.PUBLIC)
      state, metrics = federation.run(
        fed, fed.init(jax.random.key(0)), data, rows, jax.random.key(1)
      )
      chex.assert_tree_all_finite(jax.tree.map(np.asarray, state.variables))
      self.assertTrue((metrics['bits_up'] > 0).all())


if __name__ == '__main__':
  absltest.main()
