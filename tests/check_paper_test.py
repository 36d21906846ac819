"""Tests the comparison of finished runs with published figures."""

import json
import pathlib
import re

from absl.testing import absltest, parameterized
import yaml

from fedftg_jax.programs import check_paper
from fedftg_jax.system import cli
from tests import presets_test, programs

KNOWN = yaml.safe_load(check_paper.PUBLISHED.read_text())
FIGURES = [
  (name, i) for name, one in KNOWN.items() for i in range(len(one['figures']))
]
# Where the methods of a preset without a grid of its own are listed.
LISTED_BY = {'pfllib': ('pfllib_methods', 'pfllib_personal')}


class PublishedTest(parameterized.TestCase):
  """The file is well formed."""

  @parameterized.parameters(*KNOWN)
  def test_fields(self, name):
    self.assertCountEqual(
      KNOWN[name], ['source', 'checked', 'figure', 'figures']
    )
    figures = KNOWN[name]['figures']
    for one in [KNOWN[name], *figures]:
      if 'figure' in one:
        self.assertRegex(
          one['figure'], r'^(best|final) (test_accuracy|clients/)'
        )
    for one in figures:
      self.assertTrue(10 < one['percent'] < 100, one)
    self.assertLen(
      {str(check_paper.flags_of(one)) for one in figures}, len(figures)
    )

  @parameterized.parameters(*KNOWN)
  def test_is_of_a_run_of_the_preset(self, name):
    runs = []
    for preset in LISTED_BY.get(name, (name,)):
      with presets_test.parsed(preset, '--dataset=arrays:') as program:
        runs += presets_test.configurations(program).values()
    for figure in KNOWN[name]['figures']:
      wanted = check_paper.flags_of(figure)
      choices = [
        {flag: value}
        for flag, values in figure.get('best_of', {}).items()
        for value in values
      ]
      for choice in choices or [{}]:
        one = {**wanted, **choice}
        with self.subTest(one):
          self.assertIn(one, [{k: run[k] for k in one} for run in runs])

  @parameterized.parameters(*KNOWN)
  def test_presets_name_the_figures(self, name):
    text = (cli.PRESETS / f'{name}.flags').read_text()
    self.assertIn('fedftg check_paper', text)
    _, expected = text.split('# Expected')
    expected = re.sub('\n# *', ' ', expected.split('# Time')[0])
    numbers = [*map(float, re.findall(r'\d+(?:\.\d+)?', expected))]
    for figure in KNOWN[name]['figures']:
      for number in (figure['percent'], figure.get('deviation', 0.0)):
        self.assertIn(number, [*numbers, 0.0], figure)


class CheckTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def write(self, place, config, accuracies, **row):
    """Writes what the program reads of a finished run."""
    folder = self.folder / place
    folder.mkdir(parents=True)
    rows = [
      {'round': t, 'test_accuracy': a, **row}
      for t, a in enumerate(accuracies, 1)
    ]
    (folder / 'config.json').write_text(
      json.dumps({'config': config, 'versions': {}, 'contents': {}})
    )
    (folder / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    (folder / 'summary.json').write_text('{}')

  def check(self, *flags):
    return programs.call(check_paper, str(self.folder), *flags)

  def test_figures_by_hand(self):
    config = check_paper.preset_config(
      'niid_bench', {'method': 'scaffold', 'partition': 'classes'}
    )
    for seed, accuracies in enumerate(([0.5, 0.7, 0.6], [0.9, 0.2, 0.1])):
      self.write(f'a/seed{seed}', {**config, 'seed': seed}, accuracies)
    other = {**config, 'partition_seed': 1}
    self.write('d/seed0', other, [0.6])
    shorter = {**config, 'rounds': 3, 'method': 'fed_avg'}
    self.write('b/seed0', shorter, [0.8])
    self.write('c/seed0', {**config, 'method': 'moon'}, [0.8])
    status, out, err = self.check('--published=niid_bench')
    self.assertEqual(status, 0, err)
    found = json.loads((self.folder / 'check_paper.json').read_text())
    self.assertTrue(found['checked'])
    avg, scaffold, elsewhere = found['figures']
    self.assertEqual(elsewhere['differs'], {'partition_seed': [1, 42]})
    self.assertEqual(scaffold['ours'], [70.0, 90.0])
    self.assertAlmostEqual(scaffold['difference'], 80 - 33.8)
    both = (41**2 + 200) ** 0.5  # two seeds, 10 points from their mean each
    self.assertAlmostEqual(scaffold['deviations'], (80 - 33.8) / both)
    self.assertEmpty(scaffold['differs'])
    self.assertEqual(avg['differs']['rounds'], [3, 50])
    # SCAFFOLD's, in this config.
    self.assertIn('scaffold_paper', avg['differs'])
    self.assertRegex(out, r'fed_avg:partition=classes differs.*rounds=3 \(50\)')
    self.assertNotIn('moon', out)
    self.assertNotIn('quote', out)

  def test_unchecked_figures_are_named_so(self):
    config = check_paper.preset_config(
      'cifar10_fed_ntd', {'method': 'fed_ntd', 'shards_per_client': 2}
    )
    self.write('seed0', config, [0.1] + 10 * [0.5])
    status, out, err = self.check('--published=cifar10_fed_ntd')
    self.assertEqual(status, 0, err)
    self.assertIn('Nobody has checked these figures', out)
    self.assertRegex(out, r'50\.00 .* 52\.61 .* -2\.61')

  def found(self, published):
    """Returns the figures of check_paper.json, and what was printed."""
    status, out, err = self.check(f'--published={published}')
    self.assertEqual(status, 0, err)
    written = json.loads((self.folder / 'check_paper.json').read_text())
    return written['figures'], out + err

  def test_a_figure_of_the_best_value_of_a_flag(self):
    config = check_paper.preset_config(
      'niid_bench', {'method': 'fed_prox', 'partition': 'classes'}
    )
    for mu, accuracy in ((0.01, 0.7), (0.1, 0.8), (1.0, 0.6), (0.5, 0.9)):
      self.write(f'{mu}', {**config, 'prox_mu': mu}, [accuracy])
    longer = {**config, 'prox_mu': 0.01, 'rounds': 500}
    self.write('longer', longer, [0.95])
    (one, other), said = self.found('niid_bench')
    self.assertEqual(one['ours'], [80.0])
    self.assertEqual(one['flags']['prox_mu'], 0.1)
    self.assertEmpty(one['differs'])
    self.assertEqual(
      one['tried'],
      {'prox_mu=0.001': 0, 'prox_mu=0.01': 1, 'prox_mu=0.1': 1, 'prox_mu=1': 1},
    )
    self.assertIn(
      'prox_mu=0.1 is the best of prox_mu=0.001 (not run), prox_mu=0.01 '
      '(1 seed)',
      said,
    )
    self.assertRegex(said, 'prox_mu=0.5 is not compared: the figure is the')
    # Runs that differ from the preset do not compete with those that do not.
    self.assertEqual(other['ours'], [95.0])
    self.assertEqual(other['differs'], {'rounds': [500, 50]})

  def test_a_figure_of_personal_models(self):
    config = check_paper.preset_config('pfllib', {'method': 'ditto'})
    clients = {'ditto': {'weighted_mean': 0.96}}
    self.write('seed0', config, [0.5], clients=clients)
    self.write('seed1', {**config, 'seed': 1}, [0.5])  # has no such value
    (one,), said = self.found('pfllib')
    self.assertEqual(one['ours'], [96.0])
    self.assertRegex(
      said, '/seed1 is not compared: no clients/ditto/weighted_mean in a row, '
    )

  def test_diverged_seeds_are_named(self):
    config = check_paper.preset_config(
      'niid_bench', {'method': 'scaffold', 'partition': 'classes'}
    )
    for seed in range(3):
      self.write(f'seed{seed}', {**config, 'seed': seed}, [0.8 + seed / 100])
    (self.folder / 'seed2/summary.json').unlink()
    (self.folder / 'seed2/diverged.json').write_text('{"rounds": 50}')
    (one,), said = self.found('niid_bench')
    self.assertEqual(one['ours'], [80.0, 81.0])
    self.assertEqual(one['diverged'], 1)
    self.assertIsNone(one['deviations'])
    self.assertIn('/seed2 is not compared: it diverged', said)
    self.assertIn('scaffold:partition=classes: 1 of 3 seeds diverged', said)

  def test_a_seed_counts_once(self):
    config = check_paper.preset_config('pfllib', {'method': 'fed_avg'})
    for place, seed, accuracy in (('a', 0, 0.8), ('b', 0, 0.7), ('c', 1, 0.9)):
      self.write(place, {**config, 'seed': seed}, [accuracy])
    (one,), said = self.found('pfllib')
    self.assertEqual(one['ours'], [80.0, 90.0])
    self.assertRegex(said, '/b is not compared: it has the flags .*/a\n')

  def test_runs_that_are_evaluated_less_often_are_apart(self):
    config = check_paper.preset_config('pfllib', {'method': 'fed_avg'})
    self.write('a', config, [0.8, 0.9, 0.85])
    self.write('b', {**config, 'seed': 1, 'eval_every': 3}, [0.7])
    (one, other), _ = self.found('pfllib')
    self.assertEqual((one['ours'], other['ours']), ([90.0], [70.0]))
    self.assertIn('eval_every', other['differs'])

  def test_flags_and_methods_of_earlier_versions(self):
    config = check_paper.preset_config('pfllib', {'method': 'fed_avg'})
    self.write('a', {**config, 'gone': True}, [0.8])
    self.write('b', {**config, 'method': 'never_was'}, [0.9])
    (one,), said = self.found('pfllib')
    self.assertEqual(one['differs'], {'gone': [True, None]})
    self.assertIn('gone=true (–)', said)

  def test_other_terms_than_the_published_ones_are_not_compared(self):
    figures = KNOWN['pfllib']['figures']
    (figure,) = (f for f in figures if f['method'] == 'fed_gen')
    as_there = check_paper.preset_config('pfllib', check_paper.flags_of(figure))
    self.write('ours', {**as_there, 'gen_beta': 10.0}, [0.7])
    self.write('theirs', as_there, [0.8])
    status, out, err = self.check('--published=pfllib')
    self.assertEqual(status, 0, err)
    found = json.loads((self.folder / 'check_paper.json').read_text())
    (one,) = found['figures']
    self.assertEqual(one['ours'], [80.0])
    self.assertEmpty(one['differs'])
    named = re.findall('(.*) is not compared.*gen_beta=0', out + err)
    self.assertEqual(named, ['fed_gen'])

  def test_help_names_what_is_published(self):
    (names,) = re.findall(r'published for\s(.*?);', check_paper.__doc__, re.S)
    self.assertCountEqual(re.split(r',\s|\sand\s', names), KNOWN)

  def test_unfinished_runs_are_named(self):
    config = check_paper.preset_config('pfllib', {'method': 'fed_avg'})
    for place in 'ab':
      self.write(place, config, [0.5])
    (self.folder / 'b' / 'summary.json').unlink()
    status, out, err = self.check('--published=pfllib')
    self.assertEqual(status, 0, err)
    self.assertRegex(out + err, '/b is not compared: it is not finished')
    found = json.loads((self.folder / 'check_paper.json').read_text())
    self.assertEqual(found['figures'][0]['ours'], [50.0])

  def test_damaged(self):
    config = check_paper.preset_config('pfllib', {'method': 'fed_avg'})
    for name, text in (
      ('config.json', '{'),
      ('config.json', '[]'),
      ('metrics.jsonl', ''),
      ('metrics.jsonl', '{"round"'),
    ):
      place = f'{len([*self.folder.iterdir()])}'
      self.write(place, config, [0.5])
      (self.folder / place / name).write_text(text)
      status, _, err = self.check('--published=pfllib')
      self.assertEqual(status, 2)
      self.assertRegex(err, f'^error: .*/{place}: is damaged')
      self.assertEqual(err.count('\n'), 1)
      (self.folder / place / 'config.json').unlink()

  def test_refused(self):
    for flags, message in (
      ((), '^error: .* name one of them by --published: niid_bench, pfllib'),
      (
        ('--published=mine',),
        '^error: --published=mine: must be one of niid_bench, pfllib',
      ),
    ):
      status, _, err = self.check(*flags)
      self.assertEqual(status, 2)
      self.assertRegex(err, message)
      self.assertEqual(err.count('\n'), 1)
    status, _, err = programs.call(check_paper, f'{self.folder}/none')
    self.assertEqual(status, 2)
    self.assertIn('none: must be a folder with finished runs', err)
    status, _, err = self.check('--published=pfllib')
    self.assertEqual(status, 2)
    self.assertIn(
      'has no finished run with the method and flags of a figure in pfllib', err
    )


if __name__ == '__main__':
  absltest.main()
