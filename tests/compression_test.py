"""Tests which codecs are trained with, and what is reported."""

import json
import math
import pathlib

from absl.testing import absltest, flagsaver, parameterized
import numpy as np
from PIL import Image
import pytest

from fedftg_jax.programs import compression
from tests import programs


class RowsTest(parameterized.TestCase):
  def test_codings(self):
    found = list(compression.all_codings(['uveqfed', 'qsgd'], ['z', 'e8'], [2]))
    self.assertEqual(
      [(c.name, c.flags) for c in found],
      [
        (
          'uveqfed z',
          {'uplink': 'uveqfed', 'uplink_rate': 2, 'uplink_lattice': 'z'},
        ),
        (
          'uveqfed e8',
          {'uplink': 'uveqfed', 'uplink_rate': 2, 'uplink_lattice': 'e8'},
        ),
        ('qsgd', {'uplink': 'qsgd', 'uplink_rate': 2}),
      ],
    )

  def test_what_is_trained(self):
    with flagsaver.flagsaver():
      entries = compression.parse(
        ['fed_avg', 'scaffold'], ['uveqfed', 'top_k'], ['a2'], ['1', '2']
      )
    self.assertLen(entries, 2 * (1 + 2 + 2))
    base, coding, config = entries[
      'scaffold,uplink=uveqfed,uplink_rate=2.0,uplink_lattice=a2'
    ]
    self.assertEqual((base, coding.rate), ('scaffold', 2.0))
    self.assertContainsSubset(coding.flags.items(), config.items())
    plain = entries['fed_avg,uplink=none'][2]
    self.assertEmpty([name for name in plain if name.startswith('uplink')])

  def test_of_runs(self):
    def run(final, *errors):
      rows = [
        {
          'uplink/rate': 2.0,
          'uplink/rate_elias': 2.5,
          'uplink/distortion': error,
        }
        for error in errors
      ]
      return {'final_accuracy': final, 'bytes_up': 3_000_000, 'rows': rows}

    coding = compression.Coding('qsgd', 2.0)
    runs = [run(0.5, 0.1, None), run(0.6, 0.2, 0.3)]
    row = compression.of_runs('fed_avg', coding, runs)
    self.assertEqual(row.accuracy, [50.0, 60.0])
    self.assertAlmostEqual(row.distortion, 0.2)
    self.assertEqual((row.rate, row.rate_elias, row.megabytes_up), (2, 2.5, 3))
    diverged = compression.of_runs('fed_avg', coding, [runs[0], None])
    self.assertIsNone(diverged.accuracy)
    header, (line,) = compression.result_table([diverged])
    self.assertEqual(line[header.index('final accuracy')], 'diverged')

  def test_gain(self):
    """The gain is 10 log10 of the ratio of distortions, of one source and
    rate."""
    rows = [
      compression.Row(source, compression.Coding('uveqfed', rate, lattice), [])
      for source in ('a', 'b')
      for rate in (1.0, 2.0)
      for lattice in ('z', 'd4')
    ]
    errors = 1.0, 0.5, 0.2, 0.02, 7.0, 7.0, 7.0, 7.0
    rows = [r._replace(distortion=e) for r, e in zip(rows, errors)]
    self.assertAlmostEqual(compression.gain(rows[1], rows), 3.0103, places=4)
    self.assertAlmostEqual(compression.gain(rows[3], rows), 10.0, places=9)
    self.assertEqual(compression.gain(rows[5], rows), 0)
    self.assertTrue(math.isnan(compression.gain(rows[3], rows[3:])))
    # Numbers from the specification.
    for lattice, limit in (
      ('z', 0),
      ('a2', 0.167),
      ('d4', 0.366),
      ('e8', 0.654),
    ):
      self.assertAlmostEqual(compression.limit(lattice), limit, places=3)

  @parameterized.parameters(('a2', 0.203, 0.03), ('e8', 0.75, 0.06))
  def test_of_gaussian(self, lattice, gain, delta):
    rows = [
      compression.of_gaussian(compression.Coding('uveqfed', 2.0, name))
      for name in ('z', lattice)
    ]
    self.assertAlmostEqual(compression.gain(rows[1], rows), gain, delta=delta)
    self.assertAlmostEqual(rows[1].rate, 2, delta=0.02)


class ProgramTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.args = [
      *programs.small(programs.write_data(self.folder)),
      '--bases=fed_avg',
      f'--workdir={self.folder / "a"}',
    ]

  def test_table_and_picture(self):
    args = [*self.args, '--codecs=uveqfed,top_k', '--lattices=z', '--rates=2']
    status, _, err = programs.call(compression, *args, draw=True)
    self.assertEqual(status, 0, err)
    work = self.folder / 'a'
    report = json.loads((work / 'compression.json').read_text())
    self.assertEqual(
      [(row['source'], row['coding'].get('uplink')) for row in report['rows']],
      [
        (compression.GAUSSIAN, 'uveqfed'),
        (compression.GAUSSIAN, 'top_k'),
        ('fed_avg', 'none'),
        ('fed_avg', 'uveqfed'),
        ('fed_avg', 'top_k'),
      ],
    )
    _, _, plain, lattice, sparse = report['rows']
    name = 'fed_avg,uplink=top_k,uplink_rate=2.0'
    run = work / name / 'seed0'
    summary = json.loads((run / 'summary.json').read_text())
    self.assertEqual(sparse['accuracy'], [100 * summary['final_accuracy']])
    rows = [
      json.loads(row)
      for row in (run / 'metrics.jsonl').read_text().splitlines()
    ]
    self.assertAlmostEqual(
      sparse['distortion'], np.mean([row['uplink/distortion'] for row in rows])
    )
    self.assertAlmostEqual(
      sparse['megabytes_up'] / plain['megabytes_up'], 2 / 32, places=3
    )
    self.assertBetween(lattice['rate'], 1.95, 2.1)
    self.assertLen((work / 'table.md').read_text().splitlines(), 2 + 5)
    self.assertGreater(Image.open(work / 'compression.png').size[0], 600)
    # Run again: nothing is trained.
    status, out, _ = programs.call(compression, *args)
    self.assertEqual(status, 0)
    self.assertNotIn('round 3/3', out)

  @pytest.mark.slow
  def test_under_fed_ftg(self):
    args = [*self.args, '--bases=fed_avg+fed_ftg', '--codecs=qsgd', '--rates=3']
    status, _, err = programs.call(compression, *args)
    self.assertEqual(status, 0, err)
    report = json.loads((self.folder / 'a/compression.json').read_text())
    self.assertBetween(report['rows'][-1]['rate'], 2.95, 3.1)

  @parameterized.parameters(
    (['--codecs=zip'], '--codecs=zip: must be of uveqfed, '),
    (['--codecs=none'], '--codecs=none: must be of uveqfed, '),
    (['--lattices=e7'], '--lattices=e7: must be of z, '),
    (['--rates=two'], '--uplink_rate=two: '),
    (['--rates=0'], '--uplink_rate=0.0: the rate must be above 0'),
    (['--rates=.5', '--codecs=rotated'], 'must be at least 1'),
    (['--rates='], '--bases=fed_avg: needs a method, a codec and a rate'),
    (['--bases=nix'], "no method 'nix'"),
  )
  def test_errors(self, changes, message):
    status, _, err = programs.call(compression, *self.args, *changes)
    self.assertEqual(status, 2)
    self.assertRegex(err, f'^error: .*{message}')
    self.assertEqual(err.count('\n'), 1)


if __name__ == '__main__':
  absltest.main()
