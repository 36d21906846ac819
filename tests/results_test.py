"""What a page is made of: styles, statistics, sentences, drawings, words."""

import itertools

from absl.testing import absltest, parameterized
import numpy as np
from scipy import stats

from fedftg_jax import recipes
from fedftg_jax.results import (
  flow,
  glossary,
  pictures,
  plots,
  statistics,
  styles,
  tables,
  verdicts,
)

# Machado, Oliveira and Fernandes, IEEE TVCG 2009: what is seen, in linear RGB,
# with full protanopia, deuteranopia and tritanopia.
_BLINDNESS = {
  'none': np.eye(3),
  'protanopia': [
    [0.152286, 1.052583, -0.204868],
    [0.114503, 0.786281, 0.099216],
    [-0.003882, -0.048116, 1.051998],
  ],
  'deuteranopia': [
    [0.367322, 0.860646, -0.227968],
    [0.280085, 0.672501, 0.047413],
    [-0.011820, 0.042940, 0.968881],
  ],
  'tritanopia': [
    [1.255528, -0.076749, -0.178779],
    [-0.078411, 0.930809, 0.147602],
    [0.004733, 0.691367, 0.303900],
  ],
}
# Linear RGB to OKLab (Ottosson 2020).
_TO_CONES = [
  [0.4122214708, 0.5363325363, 0.0514459929],
  [0.2119034982, 0.6806995451, 0.1073969566],
  [0.0883024619, 0.2817188376, 0.6299787005],
]
_TO_LAB = [
  [0.2104542553, 0.7936177850, -0.0040720468],
  [1.9779984951, -2.4285922050, 0.4505937099],
  [0.0259040371, 0.7827717662, -0.8086757660],
]


def oklab(color, blindness):
  rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
  linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
  seen = np.clip(np.array(_BLINDNESS[blindness]) @ linear, 0, 1)
  return _TO_LAB @ np.cbrt(_TO_CONES @ seen)


class StylesTest(parameterized.TestCase):
  @parameterized.product(
    colors=(styles.COLORS, styles.DARK), blindness=tuple(_BLINDNESS)
  )
  def test_colours_are_told_apart(self, colors, blindness):
    seen = [oklab(color, blindness) for color in colors]
    for one, other in itertools.combinations(seen, 2):
      self.assertGreater(np.linalg.norm(one - other), 0.085)

  def test_each_method_has_its_own(self):
    names = [*recipes.RECIPES, *(f'{n}+fed_ftg' for n in recipes.RECIPES)]
    found = styles.of(names)
    self.assertEqual(list(found), names)
    self.assertLen(set(found.values()), len(names))
    for name in recipes.RECIPES:  # none is forgotten
      self.assertIn(name, styles._METHODS)

  def test_whatever_it_is_compared_with(self):
    alone = styles.of(['scaffold'])['scaffold']
    among = styles.of(['fed_ftg:ftg_memory=0.5', 'other', 'scaffold'])
    self.assertEqual(among['scaffold'], alone)
    refined = styles.of(['scaffold+fed_ftg'])['scaffold+fed_ftg']
    self.assertEqual(refined, alone._replace(dashes='--'))

  def test_variants_of_a_method(self):
    """One of them looks like the method; the plain one does in any case."""
    plain = styles.of(['fed_ftg'])['fed_ftg']
    variants = ['fed_ftg:ftg_preset=paper', 'fed_ftg:ftg_preset=robust']
    found = styles.of(variants)
    self.assertEqual(found[variants[0]], plain)
    found = styles.of([*variants, 'fed_ftg'])
    self.assertEqual(found['fed_ftg'], plain)
    self.assertLen({style.color for style in found.values()}, 3)

  def test_models_of_a_run(self):
    like = {'broadcast': 'scaffold', 'scaffold': 'scaffold'}
    found = styles.of(['broadcast', 'average', 'scaffold'], like)
    self.assertEqual(found['broadcast'], found['scaffold'])
    self.assertNotEqual(found['average'].color, found['scaffold'].color)


class StatisticsTest(parameterized.TestCase):
  def test_band(self):
    band = statistics.band(
      [
        [(2, 1.0, 0.1), (4, 2.0, 0.5), (6, 3.0, 0.6)],
        [(2, 3.0, 0.3), (4, 4.0, 0.1)],
      ]
    )
    self.assertEqual(band.rounds.tolist(), [2, 4])  # those of both
    self.assertEqual(band.x.tolist(), [2, 3])
    np.testing.assert_allclose(band.mean, [0.2, 0.3])
    np.testing.assert_allclose(band.low, [0.1, 0.1])
    np.testing.assert_allclose(band.high, [0.3, 0.5])

  def test_front(self):
    bands = {
      name: statistics.band([[(t, *point) for t, point in enumerate(points)]])
      for name, points in {
        'cheap': [(1.0, 50.0), (2.0, 60.0), (3.0, 55.0)],
        'good': [(2.01, 65.0), (8.0, 90.0)],
        'bad': [(4.0, 64.0), (9.0, 90.0)],
      }.items()
    }
    front = statistics.front(bands)
    # 60 for 2 is no better than 65 for 2.01.
    self.assertEqual(
      front, [('cheap', 1.0, 50.0), ('good', 2.01, 65.0), ('good', 8.0, 90.0)]
    )
    self.assertEqual(
      tables.fronts(front, 'MB').rows,
      [['cheap', '1', '50.00'], ['good', '2.01 to 8', '65.00 to 90.00']],
    )

  def test_interval(self):
    """Compares with Student's t for one degree of freedom: 12.706."""
    mean, half = statistics.interval([1.0, 3.0])
    self.assertEqual(mean, 2.0)
    self.assertAlmostEqual(half, 12.706, delta=0.001)
    self.assertEqual(statistics.interval([5.0]), (5.0, np.inf))
    self.assertEqual(statistics.interval([4.0, 4.0, 4.0]), (4.0, 0.0))

  @parameterized.parameters(
    ([1.0, 3.0], '+2.00 ± 12.71'),
    ([-0.5], '-0.50'),
    ([0.0, 0.0], '+0.00 ± 0.00'),
  )
  def test_with_interval(self, differences, text):
    self.assertEqual(statistics.with_interval(differences), text)

  def test_t_test_of_few_seeds(self):
    values = [0.01, 0.03, 0.02]
    found = statistics.paired(values)
    want = stats.ttest_1samp(values, 0)
    self.assertFalse(found.exact)
    self.assertAlmostEqual(found.p, want.pvalue)
    np.testing.assert_allclose(
      (found.low, found.high), want.confidence_interval(0.95)
    )

  def test_sign_flips_of_six_seeds(self):
    """All signs by hand."""
    values = np.array([0.02, 0.01, -0.005, 0.03, 0.01, 0.02])
    sums = [
      abs(np.dot(signs, values))
      for signs in itertools.product((-1, 1), repeat=6)
    ]
    found = statistics.paired(values)
    self.assertTrue(found.exact)
    self.assertAlmostEqual(
      found.p, np.mean(np.array(sums) >= values.sum() - 1e-12)
    )
    self.assertAlmostEqual(statistics.paired([0.01] * 6).p, 2 / 64)
    self.assertLess(statistics.paired([0.01] * 20).p, 1e-4)

  def test_more_tests_need_more_seeds_to_be_exact(self):
    """Else no difference could be shown, however large."""
    self.assertEqual([*map(statistics.exact_seeds, (1, 2, 8))], [6, 7, 9])
    rng = np.random.RandomState(0)
    finals = {str(i): i / 10 + rng.normal(0, 0.001, 6) for i in range(9)}
    for test in statistics.against(finals).values():
      self.assertFalse(test.exact)
      self.assertLess(test.adjusted, 0.05)

  @parameterized.parameters(
    ([0.1, 0.1, 0.1], 0.25), ([0.3 - 0.2, 0.9 - 0.8], 0.5), ([0.0, 0.0], 1.0)
  )
  def test_equal_differences_are_no_certainty(self, values, p):
    self.assertAlmostEqual(statistics.paired(values).p, p)

  def test_holm(self):
    finals = {
      'base': [0.5, 0.6, 0.55],
      'b': [0.6, 0.71, 0.65],
      'c': [0.5, 0.58, 0.58],
      'd': [0.7, 0.81, 0.74],
    }
    found = statistics.against(finals)
    p = {name: test.p for name, test in found.items()}
    self.assertEqual(sorted(p, key=p.get), ['d', 'b', 'c'])
    self.assertAlmostEqual(found['d'].adjusted, 3 * p['d'])
    # Not below that of the one before, though 2 p is.
    self.assertLess(2 * p['b'], 3 * p['d'])
    self.assertAlmostEqual(found['b'].adjusted, 3 * p['d'])
    self.assertAlmostEqual(found['c'].adjusted, p['c'])


class ComparisonTest(absltest.TestCase):
  def figures(self, accuracies, megabytes, **clients):
    """Returns what `comparison.figures` reads of a run, and a table needs."""
    rows = [
      {'round': t, 'test_accuracy': a} for t, a in enumerate(accuracies, 1)
    ]
    return {
      'rounds': len(rows),
      'final_accuracy': accuracies[-1],
      'final_accuracy_of': {'average': accuracies[-1]},
      'best_accuracy': max(accuracies),
      'bytes_up': 1e6 * megabytes,
      'bytes_down': 2e6 * megabytes,
      'train_seconds': 1.0,
      'rows': rows,
      'clients': {
        model: {'mean': mean, 'worst': mean / 2}
        for model, mean in clients.items()
      },
    }

  def test_by_hand(self):
    runs = [
      self.figures([0.1, 0.3, *4 * [0.6]], 10),
      self.figures([0.3, 0.5, *4 * [0.8]], 40),
    ]
    found = statistics.over_seeds(runs, 0.7)
    self.assertAlmostEqual(found['early_accuracy']['mean'], 0.3)
    header, (row,) = statistics.comparison_table({'mine': found}, 0.7)
    self.assertEqual(
      dict(zip(header, row)),
      {
        'method': 'mine',
        'final accuracy': '70.00 ± 14.14',
        'early': '30.00 ± 14.14',
        'plain average': '70.00 ± 14.14',
        'best': '70.00 ± 14.14',
        'rounds to 70 %': '3 (1 never)',
        'MB up': '25',
        'MB down': '50',
        's': '1',
      },
    )
    self.assertEqual(statistics.clients_table({'mine': found}), ([], []))

  def test_early_is_of_one_evaluation_at_least(self):
    found = statistics.over_seeds([self.figures([0.1, 0.3], 1)], 0.0)
    self.assertAlmostEqual(found['early_accuracy']['mean'], 0.1)

  def test_clients(self):
    runs = {
      'a': {'broadcast': 0.6, 'personalised': 0.7},
      'b': {'broadcast': 0.8, 'theta': 0.9, 'personalised_theta': 0.1},
      'c': {'broadcast': 0.5, 'x': 0.4, 'y': 0.2},
    }
    summary = {
      name: statistics.over_seeds([self.figures([0.5], 1, **clients)], 0.5)
      for name, clients in runs.items()
    }
    self.assertEqual(
      statistics.clients_table(summary),
      (
        [
          'method',
          'clients: mean',
          'worst tenth',
          'after local training',
          'own model',
        ],
        [
          ['a', '60.00', '30.00', '70.00', ''],
          ['b', '80.00', '40.00', '', '90.00'],
          ['c', '50.00', '25.00', '', 'x 40.00, y 20.00'],
        ],
      ),
    )
    summary.pop('a')
    self.assertEqual(
      statistics.clients_table(summary)[0],
      ['method', 'clients: mean', 'worst tenth', 'own model'],
    )


class ConclusionTest(parameterized.TestCase):
  def test_one_seed(self):
    said = verdicts.conclusion({'a': [0.5], 'b': [0.9]}, [{}])
    self.assertStartsWith(said, 'Nothing can be concluded from one seed')
    self.assertEqual(verdicts.conclusion({'a': [0.5]}, [{}]), '')

  def test_few_seeds(self):
    finals = {
      'a': [0.5, 0.52, 0.51],
      'b': [0.6, 0.63, 0.61],
      'c': [0.5, 0.53, 0.5],
      'd': [0.4, 0.42, 0.42],
    }
    said = verdicts.conclusion(finals, self.configs(0))
    self.assertRegex(
      said,
      r'^Compared with a over 3 seeds, b \(\+10\.33 points, p = [\d.]+\) ends '
      r'higher; d \(−9\.67 points, p = [\d.]+\) ends lower; for c \(\+0\.00 '
      r'points, p = 1\) no difference is shown, which does not mean that there '
      r'is none\. Paired t tests, two-sided, at the 5 % level, corrected '
      r'after Holm for 3 comparisons; other pairs were not tested\. With '
      r'fewer than 7 seeds',
    )
    self.assertIn('All seeds share one partition', said)

  def test_many_seeds(self):
    finals = {'a': [0.5] * 6, 'b': [0.6, 0.61, 0.62, 0.63, 0.64, 0.65]}
    said = verdicts.conclusion(finals, self.configs(1))
    self.assertIn('b (+12.50 points, p = 0.031) ends higher.', said)
    self.assertIn('Exact sign-flip test, two-sided, at the 5 % level.', said)
    self.assertNotIn('normally', said)
    self.assertIn('a partition and a schedule of its own', said)

  @parameterized.parameters(
    ({'schedule': 'file:s.npy'}, 'has a partition of its own. All seeds share'),
    (
      {'partition': 'natural'},
      'has a schedule of its own. All seeds share one',
    ),
    (
      {'partition': 'file:p.npz', 'schedule': 'file:s.npz'},
      'All seeds share one partition and one schedule',
    ),
  )
  def test_what_is_given_is_shared(self, given, want):
    """Whatever the seeds are, of which a given one has none."""
    configs = [{**config, **given} for config in self.configs(1)]
    finals = {'a': [0.5, 0.5], 'b': [0.6, 0.7]}
    self.assertIn(want, verdicts.conclusion(finals, configs))

  def configs(self, step):
    return [
      {
        'partition': 'dirichlet',
        'partition_seed': step * seed,
        'schedule': 'exact',
        'schedule_seed': step * seed,
      }
      for seed in (0, 1)
    ]


class TablesTest(absltest.TestCase):
  def test_csv(self):
    table = tables.Table(
      ['', 'final', 'range', 'MB'],
      [['=cmd', '90.9 ± 0.7', '−1 to +2', '–'], ['b', '80.1', '3', '1']],
    )
    self.assertEqual(
      table.csv,
      ',final,"final, ±",range,"range, to",MB\n'
      "'=cmd,90.9,0.7,-1,+2,\n"
      'b,80.1,,3,,1\n',
    )

  def test_settings(self):
    """Flags that one alone has are no differences."""
    found = tables.settings(
      {
        'fed_avg': {'method': 'fed_avg', 'lr': 0.1, 'epochs': 1, 'seed': 0},
        'moon': {'method': 'moon', 'lr': 0.2, 'epochs': 1, 'moon_mu': 5.0},
      },
      without=['seed'],
    )
    self.assertEqual(
      found['different'], (['flag', 'fed_avg', 'moon'], [['lr', '0.1', '0.2']])
    )
    self.assertEqual(
      found['own'], {'moon': (['flag', 'value'], [['moon_mu', '5']])}
    )
    self.assertEqual(found['same'], [(['flag', 'value'], [['epochs', '1']])])

  def test_settings_that_one_of_three_lacks(self):
    found = tables.settings(
      {'a': {'x': 1}, 'b': {'x': 2}, 'c': {'method': 'c'}}
    )
    self.assertEqual(found['different'].rows, [['x', '1', '2', '']])


class TicksTest(parameterized.TestCase):
  @parameterized.parameters(
    ([3], [3]),
    ([2, 4, 6], [2, 4, 6]),
    (range(2, 22, 2), [4, 8, 12, 16, 20]),
    (range(2, 102, 2), [20, 40, 60, 80, 100]),
    ([*range(3, 33, 3), 31], [6, 12, 18, 24, 30]),
  )
  def test_are_where_evaluations_are(self, rounds, want):
    ticks = plots.ticks_of(list(rounds))
    self.assertEqual(ticks, want)
    self.assertContainsSubset(ticks, rounds)


class FlowTest(absltest.TestCase):
  def test_every_method_is_described(self):
    self.assertCountEqual(flow.PARTS, recipes.RECIPES)

  def test_of_a_configuration(self):
    steps = flow.of_config(
      {
        'method': 'scaffold+fed_ftg',
        'model': 'lenet',
        'num_clients': 20,
        'cohort': 5,
        'schedule': 'bernoulli',
        'local_epochs': 1,
        'batch_size': 50,
        'learning_rate': 0.1,
        'momentum': 0.9,
        'weighting': 'uniform',
        'uplink': 'qsgd',
        'uplink_rate': 2.0,
        'dropout_rate': 0.25,
        'server_optimizer': 'adam',
        'server_learning_rate': 0.01,
        'ftg_iterations': 10,
        'ftg_generator_steps': 1,
        'ftg_student_steps': 5,
        'eval_every': 2,
      },
      (1.25, 2.5),
    )
    self.assertEqual(
      steps.down,
      [
        'sends to about 5 of 20 clients (1.25 MB):',
        '– the model (lenet)',
        '– the server’s control variate',
      ],
    )
    self.assertEqual(
      steps.local[0],
      '– trains the model for 1 epoch of SGD: batches of 50, learning rate '
      '0.1, momentum 0.9',
    )
    self.assertEqual(steps.local[-1], '– keeps its control variate')
    self.assertEqual(steps.up[0], 'sends back (2.5 MB):')
    self.assertIn('coded with 2 bits a parameter', steps.up[1])
    self.assertEqual(
      steps.server[:4],
      [
        '– receives nothing from 25 % of the clients (dropouts)',
        '– averages the models, all with the same weight',
        '– takes a step of adam along the mean change (learning rate 0.01)',
        '– updates its control variate',
      ],
    )
    self.assertIn('fine-tunes the mean, 10 times over', steps.server[4])
    self.assertNotIn('?', str(steps))

  def test_drawing_is_text(self):
    steps = flow.of_config({'method': 'fed_avg', 'model': '<script>"'})
    drawing = flow.draw(steps, styles.COLORS[0])
    for text in drawing:
      self.assertNotIn('<script', text)
      self.assertIn('&lt;script&gt;', text)
    self.assertIn('var(--c0)', drawing.inline)
    self.assertIn(styles.COLORS[0], drawing.file)

  def test_unknown_method(self):
    with self.assertRaises(ValueError):
      flow.of_config({'method': 'my_own'})


class GlossaryTest(absltest.TestCase):
  def test_unit_and_direction(self):
    self.assertEqual(
      str(glossary.Meaning('A loss.', 'nats', glossary.LOWER)),
      'A loss (nats; lower is better).',
    )
    self.assertEqual(str(glossary.Meaning('A number.')), 'A number.')

  def test_of_another_s_metric(self):
    self.assertEqual(
      str(glossary.of_metric('mine/drift')),
      'Measured by mine; not described here.',
    )


class AnimationTest(absltest.TestCase):
  def test_one_round_does_not_move(self):
    images = {3: np.zeros((2, 4, 4, 1), np.uint8)}
    self.assertIsNone(pictures.animation(images))


if __name__ == '__main__':
  absltest.main()
