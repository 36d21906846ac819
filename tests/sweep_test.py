"""Tests of sweeps: what is trained, the order of the results, and errors."""

import csv
import itertools
import pathlib
from unittest import mock

from absl import flags as absl_flags
from absl.testing import absltest, flagsaver, parameterized
from matplotlib import figure
import numpy as np
from PIL import Image
import pytest

from fedftg_jax.configuration import folders
from fedftg_jax.programs import sweep, train
from fedftg_jax.results import plots, statistics
from fedftg_jax.runs import suite, training
from fedftg_jax.system import cli, files
from tests.programs import call, small, write_data


class ParseTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    absl_flags.FLAGS.mark_as_parsed()

  def test_a_grid_is_all_combinations(self):
    entries = sweep.parse(
      ['learning_rate=.03,0.1', 'cohort=2,3', 'method=fed_avg,fed_dyn'], []
    )
    want = itertools.product((0.03, 0.1), (2, 3), ('fed_avg', 'fed_dyn'))
    found = [
      (c['learning_rate'], c['cohort'], c['method'])
      for _, c in entries.values()
    ]
    self.assertEqual(found, list(want))
    self.assertIn('learning_rate=0.03,cohort=2,method=fed_dyn', entries)

  def test_a_flag_that_does_nothing_multiplies_nothing(self):
    entries = sweep.parse(['method=fed_avg,fed_prox', 'prox_mu=0.01,0.1,1'], [])
    self.assertEqual(
      list(entries),
      [
        'method=fed_avg',
        'method=fed_prox,prox_mu=0.01',
        'method=fed_prox,prox_mu=0.1',
        'method=fed_prox,prox_mu=1.0',
      ],
    )
    self.assertEqual(entries['method=fed_avg'].settings, {'method': 'fed_avg'})

  def test_a_list(self):
    entries = sweep.parse(
      [],
      [
        'learning_rate=0.03:local_epochs=10',
        'local_epochs=7',
        'method=fed_avg:evaluate_all=true',
      ],
    )
    settings = [entry.settings for entry in entries.values()]
    # Flags that an entry does not name are those of all entries.
    base = {'learning_rate': 0.1, 'local_epochs': 5, 'method': 'fed_ftg'}
    self.assertEqual(
      settings,
      [
        {**base, 'learning_rate': 0.03, 'local_epochs': 10},
        {**base, 'local_epochs': 7},
        {**base, 'method': 'fed_avg', 'evaluate_all': True},
      ],
    )
    self.assertEqual(list(entries)[2], 'method=fed_avg,evaluate_all=true')

  def test_a_list_in_a_grid(self):
    entries = sweep.parse(
      ['cohort=2,3'], ['learning_rate=1:local_steps=3', 'learning_rate=2']
    )
    self.assertEqual(
      list(entries),
      [
        'learning_rate=1.0,local_steps=3,cohort=2',
        'learning_rate=1.0,local_steps=3,cohort=3',
        'learning_rate=2.0,cohort=2',
        'learning_rate=2.0,cohort=3',
      ],
    )

  @parameterized.parameters(
    ('', '--grid=: must be FLAG=VALUE,VALUE, or give --list'),
    ('--grid=cohort', '--grid=cohort: must be FLAG=VALUE,VALUE'),
    ('--grid=cohort=', '--grid=cohort=: must be FLAG=VALUE,VALUE'),
    ('--grid=cohrt=1', '--cohrt=1: no such flag'),
    ('--grid=cohort=2,x', '--cohort=x: must be a positive integer'),
    ('--grid=cohort=2,2', '--grid=cohort=2,2: a value is there twice'),
    (
      '--grid=cohort=2 --grid=cohort=3',
      '--grid=cohort=3: cohort is given twice',
    ),
    ('--grid=seed=0,1', '--grid=seed=0,1: seeds are not swept; give --seeds'),
    (
      '--grid=cohort=2,21',
      '--grid=cohort=21: --cohort=21: must be at most --num_clients=20',
    ),
    ('--grid=method=fed_avg,nix', '--grid=method=nix: --method=nix: no method'),
    ('--grid=dyn_alpha=1,2', '--grid=dyn_alpha: changes no result of these'),
    ('--grid=workdir=a,b', '--grid=workdir: changes no result of these'),
    ('--list=cohort', '--list=cohort: must be FLAG=VALUE:FLAG=VALUE'),
    ('--list=cohort=2:cohort=3', 'cohort is given twice'),
    ('--list=cohort=2,cohort=2', 'cohort=2 is there twice'),
    ('--list=cohort=21', '--list=cohort=21: --cohort=21: must be at most'),
    ('--list=cohort=2 --grid=cohort=3', '--list=cohort=2: cohort is in --grid'),
    (
      '--grid=cohort=2 --seeds_at_once=2 --client_state=host',
      '--seeds_at_once=2: must be 1 without --client_state=device',
    ),
    ('--grid=num_clients=20,5000', '--num_clients=5000: .*number of examples'),
    (
      '--grid=cohort=2 --target_accuracy=nan',
      '--target_accuracy=nan: must be a number in',
    ),
  )
  def test_one_line_and_status_2(self, arguments, message):
    folder = pathlib.Path(self.create_tempdir().full_path, 'w')
    status, _, err = call(sweep, *arguments.split(), f'--workdir={folder}')
    self.assertEqual(status, 2)
    self.assertRegex(err, f'^error: .*{message}')
    self.assertEqual(err.count('\n'), 1)
    self.assertFalse(folder.exists())


class SweepTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.args = [
      *small(write_data(self.folder)),
      '--method=fed_avg',
      '--evaluate_clients=none',
    ]

  def sweep(self, name, *changes, **settings):
    return call(
      sweep, *self.args, *changes, f'--workdir={self.folder / name}', **settings
    )

  def table(self, name):
    with open(self.folder / name / 'table.csv', encoding='utf-8') as file:
      return list(csv.DictReader(file))

  def test_from_the_first_run_to_the_page(self):
    rates, grid = '--grid=learning_rate=0,0.1', '--grid=partition_seed=3,4'
    status, out, err = self.sweep('a', rates, '--grid=partition_seed=3')
    self.assertEqual(status, 0, err)
    self.assertIn('2 configurations', out)
    self.assertIn('Who holds what', (self.folder / 'a/report.html').read_text())
    # With more values in the same folder, only new or missing runs are trained.
    name = 'learning_rate=0.1,partition_seed=3'
    before = {
      path: path.stat().st_mtime_ns
      for path in self.folder.glob('a/*/*/metrics.jsonl')
    }
    (self.folder / f'a/{name}/seed0/summary.json').unlink()
    status, out, err = self.sweep('a', rates, grid, draw=True)
    self.assertEqual(status, 0, err)
    self.assertEqual(out.count('seed 0: compiling'), 3)
    self.assertIn(f'{name} seed 0: ', out)
    changed = {
      str(path.relative_to(self.folder / 'a').parent)
      for path, time in before.items()
      if path.stat().st_mtime_ns != time
    }
    self.assertEqual(changed, {f'{name}/seed0'})
    summary = files.read_json(self.folder / 'a' / 'summary.json')
    rows = summary['configurations']
    self.assertLen(rows, 4)
    finals = [row['final_accuracy']['mean'] for row in rows]
    self.assertEqual(finals, sorted(finals, reverse=True))
    # Each run is `train`'s own.
    per_seed = next(row for row in rows if row['name'] == name)[
      'final_accuracy'
    ]['per_seed']
    self.assertEqual(
      per_seed,
      [
        files.read_json(self.folder / f'a/{name}/seed0/summary.json')[
          'final_accuracy'
        ]
      ],
    )
    call(
      train, *self.args, '--partition_seed=3', f'--workdir={self.folder}/alone'
    )
    self.assertEqual(
      (self.folder / 'alone/metrics.jsonl').read_bytes(),
      (self.folder / f'a/{name}/seed0/metrics.jsonl').read_bytes(),
    )
    # The tables have the same rows in the same order.
    table = self.table('a')
    self.assertEqual(
      [
        (float(row['learning_rate']), int(row['partition_seed']))
        for row in table
      ],
      [tuple(row['settings'].values()) for row in rows],
    )
    np.testing.assert_allclose(
      [float(row['final_accuracy']) for row in table], finals
    )
    lines = (self.folder / 'a/table.md').read_text().splitlines()
    self.assertStartsWith(
      lines[0], '| learning_rate | partition_seed | final acc'
    )
    self.assertLen(lines, 6)
    self.assertEqual(Image.open(self.folder / 'a/sweep.png').format, 'PNG')
    page = (self.folder / 'a/report.html').read_text()
    self.assertIn('4 configurations', page)
    self.assertIn('as the best of 4, which flatters it', page)
    self.assertNotIn('Who holds what', page)  # partitions differ
    # A folder of another kind is refused.
    for changes, message in (
      (['--batch_size=5'], 'another configuration .batch_size: 10, not 5'),
      (['--workdir=' + str(self.folder / 'alone')], 'holds a single run'),
    ):
      status, _, err = call(
        sweep, *self.args, rates, grid, f'--workdir={self.folder}/a', *changes
      )
      self.assertEqual(status, 2)
      self.assertRegex(err, message)

  def test_validation_decides(self):
    status, _, err = self.sweep(
      'a', '--grid=method=fed_avg,fed_prox', '--validation_share=0.5'
    )
    self.assertEqual(status, 0, err)
    summary = files.read_json(self.folder / 'a' / 'summary.json')
    self.assertEqual(summary['sorted_by'], 'final_validation_accuracy')
    self.assertIn(
      'on validation data', (self.folder / 'a/table.md').read_text()
    )
    self.assertIn(
      'on the validation data', (self.folder / 'a/report.html').read_text()
    )
    # By hand: what is better on the test set is worse on validation data.
    spread = lambda *x: statistics.mean_and_std(list(x))
    runs = {
      name: [
        {
          'final_accuracy_of': {},
          'final_accuracy': test,
          'rounds': 1,
          'final_validation_accuracy': validation,
          'best_accuracy': test,
          'rows': [{'round': 1, 'test_accuracy': test}],
          'bytes_up': 0,
          'bytes_down': 0,
          'train_seconds': 1.0,
          'clients': {},
        }
      ]
      for name, test, validation in (('a', 0.8, 0.5), ('b', 0.7, 0.6))
    }
    runs['c'] = [None]
    entries = {
      name: sweep.Entry({'cohort': i}, {}) for i, name in enumerate('abc')
    }
    with flagsaver.flagsaver():
      summary = sweep.summarise(entries, runs)
    self.assertEqual(
      [r['name'] for r in summary['configurations']], list('bac')
    )
    self.assertEqual(summary['target_accuracy'], 0.8)  # what half of two reach
    self.assertEqual(
      summary['configurations'][0]['final_validation_accuracy'], spread(0.6)
    )

  def test_two_names_of_one_folder(self):
    names = {'partition=file:a/b.npz': {}, 'partition=file:a_b.npz': {}}
    with (
      flagsaver.flagsaver(),
      self.assertRaisesRegex(
        cli.ArgumentError, 'a_b.npz: would hold both .*a/b.npz and .*a_b.npz'
      ),
    ):
      absl_flags.FLAGS.mark_as_parsed()
      suite.train_all(self.folder, {}, names)

  def test_other_errors_are_no_divergence(self):
    with mock.patch.object(
      training, 'train', side_effect=cli.RunError('wandb: no network')
    ):
      status, _, err = self.sweep('a', '--grid=cohort=2')
    self.assertEqual(status, 1)
    self.assertIn('error: wandb: no network', err)
    self.assertEmpty([*self.folder.rglob(folders.DIVERGED)])

  def test_longer_runs_are_kept(self):
    grid = '--grid=cohort=2'
    status, _, err = self.sweep('a', grid, '--rounds=8', '--eval_every=4')
    self.assertEqual(status, 0, err)
    run = self.folder / 'a/cohort=2/seed0'
    kept = (run / 'metrics.jsonl').read_bytes()
    status, _, err = self.sweep('a', grid, '--rounds=3', '--eval_every=4')
    self.assertEqual(status, 2, err)
    self.assertRegex(err, '--rounds=3: .*no evaluation')
    # The first seed is finished, and a longer run; the second one is not.
    status, _, err = self.sweep(
      'a',
      grid,
      '--seeds=2',
      '--seeds_at_once=2',
      '--rounds=4',
      '--eval_every=4',
    )
    self.assertEqual(status, 2)
    self.assertIn('--seeds_at_once=2: ', err)
    self.assertIn('seed0 has more than 4 rounds', err)
    self.assertEqual((run / 'metrics.jsonl').read_bytes(), kept)

  def test_a_round_without_evaluation(self):
    files.write_json(
      self.folder / 'config.json', {'config': {}, 'versions': {}}
    )
    row = {'test_accuracy': 0.5, 'accuracy': {}, 'bytes_up': 0, 'bytes_down': 0}
    files.write_jsonl(
      self.folder / 'metrics.jsonl', [{'round': t, **row} for t in (4, 8, 12)]
    )
    self.assertEqual(suite.figures_of(self.folder, 8)['rounds'], 8)
    with self.assertRaisesRegex(cli.UsageError, 'after round 8 and not after'):
      suite.figures_of(self.folder, 10)
    # An empty file, as a full disk leaves it, is no divergence.
    (self.folder / folders.DIVERGED).touch()
    self.assertEqual(suite.figures_of(self.folder, 8)['rounds'], 8)

  @pytest.mark.slow
  def test_one_diverges(self):
    args = [
      '--grid=learning_rate=0.1,1e30',
      '--clip_norm=0',
      '--seeds=2',
      '--seeds_at_once=2',
    ]
    status, out, err = self.sweep('a', *args)
    self.assertEqual(status, 0, err)
    self.assertIn('no longer finite', out)
    rows = files.read_json(self.folder / 'a/summary.json')['configurations']
    self.assertEqual([row['diverged'] for row in rows], [0, 2])
    self.assertIn('diverged (2 of 2)', (self.folder / 'a/table.md').read_text())
    self.assertEqual(self.table('a')[1]['final_accuracy'], '')
    # Divergence is remembered, except with fewer rounds.
    status, out, _ = self.sweep('a', *args)
    self.assertEqual(status, 0)
    self.assertNotIn('compiling', out)
    _, out, _ = self.sweep('a', *args, '--rounds=2')
    self.assertIn('learning_rate=1e+30 seed 0,1: compiling', out)
    self.assertNotIn('learning_rate=0.1 seed', out)
    # A run that ended after fewer rounds continues.
    place = self.folder / 'a/learning_rate=1e+30/seed0'
    files.write_json(place / 'summary.json', {'rounds': 1})
    self.assertIsNone(suite.figures_of(place, 3))
    # If all runs diverge, there is a table, and an error.
    status, _, err = self.sweep('b', '--grid=learning_rate=1e30', *args[1:2])
    self.assertEqual(status, 1)
    self.assertIn('every configuration diverged', err)
    self.assertIn('| diverged |', (self.folder / 'b/table.md').read_text())

  @pytest.mark.slow
  def test_rounds_can_be_swept(self):
    status, _, err = self.sweep('a', '--grid=rounds=2,3')
    self.assertEqual(status, 0, err)
    rows = files.read_json(self.folder / 'a/summary.json')['configurations']
    self.assertCountEqual([row['rounds'] for row in rows], [2, 3])
    with self.assertRaisesRegex(cli.UsageError, '--rounds=1: .*no evaluation'):
      suite.figures_of(self.folder / 'a/rounds=3/seed0', 1)


class FiguresTest(parameterized.TestCase):
  def test_share_of_a_target(self):
    runs = {
      name: [{'best_accuracy': a} for a in best]
      for name, best in (('a', (0.92, 0.97)), ('b', (0.71,)), ('c', (0.3,)))
    }
    self.assertEqual(statistics.common_target(runs), 0.3)
    self.assertEqual(statistics.common_target(runs, share=0.5), 0.7)
    self.assertEqual(statistics.common_target(runs, share=0.3), 0.9)

  def test_names_do_not_collide(self):
    self.assertEqual(sweep.name_of({'a': True, 'b': 0.1}), 'a=true,b=0.1')
    self.assertNotEqual(
      sweep.name_of({'a': 0.1234567}), sweep.name_of({'a': 0.1234568})
    )

  @parameterized.parameters(
    (('a',), [((0.1,), 50.0, 1.0), ((1,), np.nan, 0.0), ((0.01,), 60.0, 0.0)]),
    (('a',), [(('mlp',), 50.0, 0.0), (('resnet18_cifar',), 60.0, 0.0)]),
    (('a',), [(('auto',), 50.0, 0.0), ((2,), 60.0, 0.0), ((1,), 60.0, 0.0)]),
    (
      ('a', 'b'),
      [
        (('x', 0.1), 50.0, 0.0),
        (('y', None), 40.0, 0.0),
        (('x', 0.2), np.nan, 0.0),
      ],
    ),
  )
  def test_pictures(self, swept, points):
    drawn = {}

    def keep(figure_, *_, **__):
      figure_.draw_without_rendering()
      drawn['axes'] = figure_.axes[0]

    with absltest.mock.patch.object(figure.Figure, 'savefig', keep):
      plots.sweep('p.png', swept, points, 's')
    axes = drawn['axes']
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    texts = [text.get_text() for text in axes.texts]
    if len(swept) == 2:  # y has no b: its score is that of every b
      self.assertEqual(ticks, ['0.1', '0.2'])
      self.assertEqual(texts, ['50.0', '×', '40.0', '40.0'])
    elif points[0][0] == ('auto',):  # numbers first
      self.assertEqual(ticks, ['1', '2', 'auto'])
    elif len(points) == 3:
      self.assertEqual(ticks, ['0.01', '0.1', '1'])
      self.assertEqual(axes.get_xscale(), 'log')
      self.assertEqual(texts, ['diverged'])
    else:
      self.assertEqual(ticks, ['mlp', 'resnet18_cifar'])


if __name__ == '__main__':
  absltest.main()
