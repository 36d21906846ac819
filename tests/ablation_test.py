"""Tests of the ablation: cells, paired effects, correlations."""

import json
import pathlib

from absl.testing import absltest, flagsaver, parameterized
import numpy as np
from PIL import Image
import pytest

from fedftg_jax.programs import ablation
from tests import programs


def figures_of(final, accuracies, averages, recognised=()):
  """Makes figures like those of `suite.figures_of`."""
  rows = [
    {'round': i, 'test_accuracy': a, 'accuracy': {'aggregated': b}}
    for i, (a, b) in enumerate(zip(accuracies, averages))
  ]
  for row, value in zip(rows, recognised):
    row['fed_ftg/recognised'] = value
  return {'final_accuracy': final, 'rows': rows}


class EffectTest(parameterized.TestCase):
  def test_by_hand(self):
    base = [figures_of(0.5, [0.1, 0.2, 0.5, 0.5], [0.1, 0.2, 0.5, 0.5])]
    tuned = [
      figures_of(
        0.53, [0.2, 0.2, 0.5, 0.6], [0.1, 0.2, 0.5, 0.4], (0.5, None, 0.7)
      )
    ]
    got = ablation.effect(base, tuned)
    np.testing.assert_allclose(got.final, [3.0])
    np.testing.assert_allclose(got.early, [10.0])
    np.testing.assert_allclose(got.step, [7.5])
    np.testing.assert_allclose(got.base, [50.0])
    np.testing.assert_allclose(got.said['recognised'], [0.6])
    self.assertTrue(np.isnan(got.said['moved']).all())
    self.assertIsNone(ablation.effect([None], tuned))

  def test_correlations(self):
    """Uses a diagnostic that falls as the effect rises, over two cells and
    seeds."""

    def cell(final, gap):
      nothing = [float('nan')] * 2
      return None, ablation.Effect(
        final,
        final,
        final,
        final,
        {
          name: gap if name == 'gap' else nothing
          for name in ablation.DIAGNOSTICS
        },
      )

    got = ablation.correlations(
      [cell([1.0, 2.0], [0.9, 0.5]), cell([3.0, 4.0], [0.4, 0.1]), (None, None)]
    )
    self.assertEqual(got, {ablation.BASE: 1.0, 'gap': -1.0})


class ProgramTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.args = [
      *programs.small(programs.write_data(self.folder)),
      '--rounds=2',
      '--eval_every=1',
      f'--workdir={self.folder / "a"}',
    ]

  @pytest.mark.slow
  def test_an_effect(self):
    """An effect is the difference of two runs with the same seed, in percent.

    Running the program again trains nothing.
    """
    args = [*self.args, '--factors=switch', '--ftg_preset=robust']
    with absltest.mock.patch.object(ablation, 'FACTORS', {'switch': []}):
      status, _, err = programs.call(ablation, *args)
      self.assertEqual(status, 0, err)
      status, out, _ = programs.call(ablation, *args)
      self.assertNotIn('round 1/2', out)
    work = self.folder / 'a'
    (cell,) = json.loads((work / 'effects.json').read_text())['cells']
    final = {
      path.parts[-3]: json.loads(path.read_text())['final_accuracy']
      for path in work.glob('*/seed0/summary.json')
    }
    (with_ftg,) = final.keys() - {'fed_avg'}
    self.assertStartsWith(with_ftg, 'fed_avg+fed_ftg')
    np.testing.assert_allclose(
      cell['final'], [100 * (final[with_ftg] - final['fed_avg'])], atol=1e-9
    )
    self.assertGreater(cell['said']['moved'][0], 0)

  @pytest.mark.slow
  def test_cells_and_effects(self):
    factors = {
      'base': [dict(base='fed_avg'), dict(base='fed_prox')],
      'switch': [dict(ftg_hard_samples=False)],
    }
    with (
      absltest.mock.patch.object(ablation, 'FACTORS', factors),
      absltest.mock.patch.object(
        ablation, 'SETTINGS', {'base': factors['base']}
      ),
    ):
      args = [
        *self.args,
        '--factors=base,switch',
        '--seeds=2',
        '--presets=official,robust',
      ]
      status, out, err = programs.call(ablation, *args, '--budget_hours=0')
      self.assertEqual(status, 0, err)
      self.assertIn('5 of 5 cells are left for the next time', out)
      status, out, err = programs.call(ablation, *args, draw=True)
      self.assertEqual(status, 0, err)
      work = self.folder / 'a'
      self.assertCountEqual(
        [p.name for p in work.iterdir() if p.is_dir()],
        [
          'fed_avg',
          'fed_prox',
          'fed_avg+fed_ftg,ftg_preset=official',
          'fed_avg+fed_ftg,ftg_preset=robust',
          'fed_prox+fed_ftg,ftg_preset=official',
          'fed_prox+fed_ftg,ftg_preset=robust',
          'fed_avg+fed_ftg,ftg_preset=official,ftg_hard_samples=false',
        ],
      )
      report = json.loads((work / 'effects.json').read_text())
      self.assertEqual(
        [
          (cell['factor'], cell['value'], cell['preset'])
          for cell in report['cells']
        ],
        [
          ('centre', 'fed_avg', 'official'),
          ('centre', 'fed_avg', 'robust'),
          ('base', 'fed_prox', 'official'),
          ('base', 'fed_prox', 'robust'),
          ('switch', 'ftg_hard_samples=false', 'official'),
        ],
      )

      def final(name, seed):
        path = work / name / f'seed{seed}' / 'summary.json'
        return json.loads(path.read_text())['final_accuracy']

      np.testing.assert_allclose(
        report['cells'][3]['final'],
        [
          100
          * (
            final('fed_prox+fed_ftg,ftg_preset=robust', s)
            - final('fed_prox', s)
          )
          for s in (0, 1)
        ],
        atol=1e-9,
      )
      self.assertGreater(report['cells'][0]['said']['moved'][0], 0)
      self.assertLen((work / 'table.md').read_text().splitlines(), 7)
      self.assertGreater(Image.open(work / 'effects.png').size[0], 300)
      # Run again: nothing is trained.
      status, out, _ = programs.call(ablation, *args)
      self.assertEqual(status, 0)
      self.assertNotIn('round 1/2', out)

  @parameterized.parameters(
    (['--factors=moon'], '--factors=moon: must be of norm, '),
    (['--base=fed_avg+fed_ftg'], 'must be without fed_ftg'),
    (['--presets=best'], '--presets=best: must be of official, '),
    (['--base=nix'], "no method 'nix'"),
    (['--factors=norm', '--model=mlp'], '--norm=group: must be none'),
  )
  def test_errors(self, changes, message):
    status, _, err = programs.call(ablation, *self.args, *changes)
    self.assertEqual(status, 2)
    self.assertRegex(err, f'^error: .*{message}')
    self.assertEqual(err.count('\n'), 1)

  @parameterized.parameters(('official', 0.0), ('robust', 0.001))
  def test_the_whole_table(self, preset, other_decay):
    """The cells of every factor differ from the centre and are valid."""
    factors = [f for f in ablation.FACTORS if f != 'dataset']
    with flagsaver.flagsaver(ftg_preset=preset):
      cells = ablation.make_cells('fed_avg', factors, [])
    self.assertBetween(len(cells), 25, 40)
    decays = [
      cell.tuned[1]['ftg_weight_decay']
      for cell in cells
      if 'ftg_weight_decay' in cell.value
    ]
    self.assertEqual(decays, [other_decay])
    names = [cell.tuned[0] for cell in cells]
    self.assertLen(set(names), len(names))
    for cell in cells:
      if cell.factor in ablation.OWN:
        self.assertEqual(cell.base, cells[0].base)


if __name__ == '__main__':
  absltest.main()
