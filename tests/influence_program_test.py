"""Tests of the program `influence`: flags, results, files, errors."""

import csv
import json
import pathlib

from absl.testing import absltest, flagsaver, parameterized
import numpy as np
from PIL import Image
import pytest

from fedftg_jax.configuration import assembly, resolve
from fedftg_jax.data import flips, schedules
from fedftg_jax.programs import compare, influence, train
from fedftg_jax.results import influence as results
from tests import programs

PARTS = [np.arange(0, 10), np.arange(10, 10), np.arange(10, 40)]


class FlipTest(parameterized.TestCase):
  @parameterized.parameters(0.5, 1.0)
  def test_a_share_of_some_clients(self, share):
    labels = np.arange(40) % 4
    found, clients = flips.flip(
      labels, PARTS, 4, share=share, num_clients=1, seed=3
    )
    (client,) = clients
    self.assertIn(client, (0, 2))  # the other client has no examples
    wrong = np.flatnonzero(found != labels)
    self.assertLen(wrong, round(share * len(PARTS[client])))
    self.assertTrue(np.isin(wrong, PARTS[client]).all())
    self.assertTrue(np.isin(found, np.arange(4)).all())
    np.testing.assert_array_equal(labels, np.arange(40) % 4)
    again, _ = flips.flip(labels, PARTS, 4, share=share, num_clients=1, seed=3)
    np.testing.assert_array_equal(again, found)

  def test_every_other_class_alike(self):
    labels = np.zeros(6000, int)
    found, _ = flips.flip(
      labels, [np.arange(6000)], 3, share=1.0, num_clients=1, seed=0
    )
    self.assertEqual(np.count_nonzero(found == 0), 0)
    self.assertBetween(np.count_nonzero(found == 1), 2850, 3150)

  @parameterized.parameters(
    (0.0, 1, 4, 'the share must be above 0'),
    (0.5, 3, 4, 'clients must be 1 to 2'),
    (0.5, 1, 1, 'at least 2 classes, got 1'),
  )
  def test_errors(self, share, num, classes, message):
    with self.assertRaisesRegex(ValueError, message):
      flips.flip(
        np.zeros(40, int), PARTS, classes, share=share, num_clients=num, seed=0
      )

  def test_without(self):
    schedule = schedules.with_dropouts(
      schedules.exact(20, 6, 4, 0), 0.3, 0, after_work=True
    )
    rest = schedules.without(schedule, [1, 4])
    np.testing.assert_array_equal(rest.client_id, schedule.client_id)
    out = np.isin(schedule.client_id, [1, 4])
    for name in 'arrived', 'worked':
      before, after = getattr(schedule, name), getattr(rest, name)
      np.testing.assert_array_equal(after, before & ~out)
      self.assertTrue(before[out].any())


def score(loss, own=(0.1, 0.2, 0.3, 0.4)):
  """Makes a row of metrics.jsonl."""
  return {
    'round': 2,
    'influence': {
      'loss': list(loss),
      'accuracy': list(loss),
      'parameters': list(loss),
      'own_loss': list(own),
    },
  }


class ResultsTest(parameterized.TestCase):
  def summary(self, **rows):
    return results.summarise(
      {name: [[row] for row in of_name] for name, of_name in rows.items()},
      seeds=[7, 8],
      clients=[0, 2, 3, 5],
      examples=[[9] * 6, [9] * 6],
      flipped=[[3], [0, 5]],
      seconds={'plain': 2.0, **dict.fromkeys(rows, 26.0)},
    )

  def test_by_hand(self):
    true = [score([0.1, 0.2, 0.3, 0.4]), score([0.1, 0.2, 0.3, 0.4])]
    found = [score([0.2, 0.1, 0.3, 0.4]), score([0.4, 0.3, 0.2, 0.1])]
    summary = self.summary(retraining=true, exact=found)
    fil = summary['fil']['exact']
    self.assertSequenceAlmostEqual(fil['pearson_by_seed'], [0.8, -1.0])
    self.assertSequenceAlmostEqual(fil['spearman_by_seed'], [0.8, -1.0])
    self.assertAlmostEqual(fil['pearson'], -0.1)
    self.assertSequenceAlmostEqual(fil['error_by_seed'], [0.2, 0.8])
    self.assertEqual(summary['cost'], {'retraining': 3.0, 'exact': 3.0})
    # Client 3 is second to last, then clients 0 and 5 first and last.
    self.assertSequenceAlmostEqual(
      summary['auc']['exact']['by_seed'], [1 / 3, 0.5]
    )
    self.assertSequenceAlmostEqual(
      summary['auc']['loss']['by_seed'], [2 / 3, 0.5]
    )
    worst = results.worst(summary, 2)
    self.assertEqual(worst['exact'], [[0, 2], [3, 5]])
    self.assertEqual(worst['loss'], [[3, 5], [3, 5]])
    self.assertLen(set(worst['random'][0]), 2)
    rows = results.score_rows(summary)
    self.assertLen(rows, 16)
    self.assertEqual(
      [(r['client'], r['flipped']) for r in rows[:4]],
      [(0, False), (2, False), (3, True), (5, False)],
    )
    (title,) = results.panels(summary)
    self.assertEqual(title, 'exact: Pearson -0.10, Spearman -0.10')

  def test_what_is_not_finite(self):
    true = [score([0.1, 0.2, 0.3, 0.4])] * 2
    burst = [score([None, 0.1, 0.3, 0.4]), score([0.4, 0.3, 0.2, 0.1])]
    summary = self.summary(retraining=true, exact=burst)
    self.assertIsNone(summary['fil']['exact']['pearson'])
    self.assertIsNone(summary['auc']['exact']['mean'])
    self.assertEqual(results.tables_of(summary)['estimates'].rows[1][1], '–')
    self.assertLen(next(iter(results.panels(summary).values())), 7)

  def test_constant(self):
    """All influences are 0, as when no client was selected."""
    self.assertEqual(
      results.agreement([0.0, 0.0], [0.0, 1.0]),
      {'pearson': None, 'spearman': None, 'error': 1.0},
    )

  def test_ties(self):
    suspicion = np.array([1.0, 1.0, 0.0])
    positive = np.array([True, False, False])
    self.assertEqual(results.area(suspicion, positive), 0.75)
    self.assertIsNone(results.area(suspicion, positive & False))


class ProgramTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.work = self.folder / 'a'
    self.args = [
      *programs.small(programs.write_data(self.folder)),
      '--rounds=2',
      '--eval_every=1',
      f'--workdir={self.work}',
    ]

  def test_all_of_it(self):
    args = [
      *self.args,
      '--curvatures=retraining,exact,lwet',
      '--flip_labels=0.5,1',
      '--cleanse=1',
      '--rounds=3',
    ]
    status, out, err = programs.call(influence, *args, draw=True)
    self.assertEqual(status, 0, err)
    summary = json.loads((self.work / 'influence.json').read_text())
    with self.subTest('estimates are near to retraining'):
      self.assertGreater(summary['fil']['exact']['pearson'], 0.9)
      self.assertEqual(list(summary['fil']), ['exact', 'lwet'])
      self.assertLen(summary['by_round']['exact'], 3)
    with self.subTest('retraining is training without the client'):
      (of_seed,) = summary['scores']['retraining']
      left_out = self.folder / 'b'
      status, _, err = programs.call(
        train,
        *self.args[:-1],
        '--rounds=3',
        '--flip_labels=0.5,1',
        '--leave_out=2',
        f'--workdir={left_out}',
      )
      self.assertEqual(status, 0, err)
      alone, plain = (
        json.loads((folder / 'metrics.jsonl').read_text().splitlines()[-1])
        for folder in (left_out, self.work / 'plain' / 'seed0')
      )
      self.assertAlmostEqual(
        of_seed['loss'][2], alone['test_loss'] - plain['test_loss'], places=4
      )
      self.assertGreater(abs(of_seed['loss'][2]), 1e-3)
    with self.subTest('the run is the same with and without'):
      for name in 'exact', 'lwet', 'retraining':
        rows = [
          json.loads(line)
          for line in (self.work / name / 'seed0' / 'metrics.jsonl')
          .read_text()
          .splitlines()
        ]
        self.assertAlmostEqual(
          rows[-1]['test_loss'], plain['test_loss'], places=5
        )
    with self.subTest('files'):
      with (self.work / 'scores.csv').open() as file:
        rows = list(csv.DictReader(file))
      self.assertLen(rows, 3 * 4)
      arrays = np.load(self.work / 'scores.npz')
      np.testing.assert_allclose(
        arrays['loss'], [float(row['loss']) for row in rows]
      )
      self.assertEqual(arrays['flipped'].sum(), 3)
      self.assertGreater(Image.open(self.work / 'influence.png').size[0], 300)
      report = (self.work / 'report.html').read_text()
      self.assertIn('Influence of clients', report)
      self.assertIn('area under the ROC curve', report)
      self.assertIn('without the worst by exact', report)
    with self.subTest('cleansing leaves the worst out'):
      ((worst,),) = summary['cleansing']['exact']['left_out']
      self.assertEqual(
        worst, int(np.argmin(summary['scores']['exact'][0]['loss']))
      )
      config = json.loads(
        (self.work / 'without_exact' / 'seed0' / 'config.json').read_text()
      )['config']
      self.assertEqual(config['leave_out'], str(worst))
    with self.subTest('again nothing is trained'):
      status, out, err = programs.call(influence, *args)
      self.assertEqual(status, 0, err)
      self.assertNotIn('round 1/', out)

  def test_train_goes_on(self):
    """A run that tracks clients continues from its checkpoint."""
    args = [*self.args, '--track=0,2', '--checkpoint_every=1']
    for rounds in (1, 2):
      status, out, err = programs.call(train, *args, f'--rounds={rounds}')
      self.assertEqual(status, 0, err)
    self.assertIn('going on after round 1', out)
    status, _, err = programs.call(
      train, *args, f'--workdir={self.folder / "b"}'
    )
    self.assertEqual(status, 0, err)
    for name in 'metrics.jsonl', 'params.npz':
      one, other = (
        (folder / name).read_bytes()
        for folder in (self.work, self.folder / 'b')
      )
      self.assertEqual(one, other)

  @pytest.mark.slow
  def test_fed_ftg_and_the_stage_of_the_clients(self):
    """Influence is carried through the server's step, or around it."""
    args = [
      *self.args,
      '--method=fed_ftg',
      '--conv=im2col',
      '--curvatures=retraining,exact',
    ]
    found = {}
    for through in True, False:
      work = self.folder / str(through)
      status, _, err = programs.call(
        influence, *args, f'--through_server={through}', f'--workdir={work}'
      )
      self.assertEqual(status, 0, err)
      summary = json.loads((work / 'influence.json').read_text())
      found[through] = summary['scores']['exact'][0]['loss']
      self.assertTrue(np.isfinite(np.array(found[through], float)).all())
    self.assertNotEqual(found[True], found[False])

  def test_unused_flags_are_not_in_the_configuration(self):
    with flagsaver.flagsaver(method='fed_ftg'):
      plain = resolve.config()
      tracked = resolve.config(track='all')
      self.assertEqual(
        tracked.keys() - plain.keys(),
        {'track', 'curvature', 'through_server', 'track_at_once'},
      )
      self.assertEqual(
        resolve.config(track='all', curvature='lwet')['truncation'], 1.0
      )
      retrained = resolve.config(track='all', curvature='retraining')
      self.assertNotIn('through_server', retrained)

  @parameterized.parameters(
    (['--track=4'], '--track=4: must be below --num_clients=4'),
    (['--track=0,0'], '--track=0,0: must be all, or different ids'),
    (['--track=a'], '--track=a: must be all, or different ids'),
    (['--leave_out=9'], '--leave_out=9: must be below --num_clients=4'),
    (['--leave_out=all'], '--leave_out=all: must be different ids'),
    (['--flip_labels=2,1'], '--flip_labels=2,1: must be SHARE,CLIENTS'),
    (['--flip_labels=0.5'], '--flip_labels=0.5: must be SHARE,CLIENTS'),
    (['--flip_labels=0.5,9'], 'clients must be 1 to 4'),
    (['--client_state=host'], '--track=all: needs --client_state=device'),
    (
      ['--secure_aggregation'],
      '--track=all: must be empty with --secure_aggregation',
    ),
    (['--evaluate_all'], '--evaluate_all=True: must be false with --track'),
    (['--uplink=top_k'], '--curvature=exact: must be none or retraining with'),
    (['--curvatures=half'], '--curvatures=half: must be of exact, blocks'),
    (['--curvatures=exact,exact'], 'must be different curvatures'),
    (['--curvatures=retraining', '--cleanse=1'], '--cleanse=1: needs an est'),
    (['--cleanse=4'], '--cleanse=4: must be below the number of tracked'),
    (
      ['--curvatures=fisher', '--model=lenet', '--norm=batch'],
      '--curvature=fisher: needs a --norm other than batch',
    ),
  )
  def test_errors(self, changes, message):
    status, _, err = programs.call(influence, *self.args, *changes)
    self.assertEqual(status, 2)
    self.assertRegex(err, message)
    self.assertEqual(err.count('\n'), 1)
    self.assertFalse((self.work / 'plain').exists())

  def test_labels_are_the_same_for_all_methods(self):
    status, _, err = programs.call(
      compare, *self.args, '--methods=fed_avg,fed_prox:flip_labels=0.5'
    )
    self.assertEqual(status, 2)
    self.assertIn('flip_labels must be the same for all methods', err)

  def test_only_what_is_trained_on_is_flipped(self):
    with flagsaver.flagsaver(
      dataset=f'npz:{self.folder / "own.npz"}', num_clients=4, cohort=2
    ):
      true, flipped = (
        assembly.make_problem(resolve.config(flip_labels=text))
        for text in ('', '1,2')
      )
    self.assertLen(flipped.flipped, 2)
    np.testing.assert_array_equal(true.dataset.train_y, flipped.dataset.train_y)
    for k in range(4):
      np.testing.assert_array_equal(true.parts[k], flipped.parts[k])
      same = np.equal(true.data.y, flipped.data.y)[true.parts[k]]
      self.assertEqual(same.all(), k not in flipped.flipped)
      self.assertEqual(same.any(), k not in flipped.flipped)


if __name__ == '__main__':
  absltest.main()
