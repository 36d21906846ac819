"""Tests the programs as a user meets them: files, repeats, resuming, errors."""

import contextlib
import errno
import io
import json
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from unittest import mock
import warnings

from absl import flags as absl_flags
from absl.testing import absltest, flagsaver, parameterized
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from fedftg_jax import federation, recipes
from fedftg_jax.configuration import assembly, resolve
from fedftg_jax.contestants import (
  centralised,
  one_step,
  options,
  ours,
  workloads,
)
from fedftg_jax.programs import benchmark, compare, train
from fedftg_jax.results import plots, statistics
from fedftg_jax.results import rows as rows_lib
from fedftg_jax.runs import comparison, writer
from fedftg_jax.system import cli, versions
from fedftg_jax.system import clock as clock_lib
from tests.programs import ROOT, call, forget, small, write_data


def write_odd_data(path):
  """Writes images with sides that the generator cannot make."""
  np.savez(
    path,
    train_x=np.zeros((9, 6, 6, 1), np.uint8),
    train_y=np.arange(9) % 3,
    test_x=np.zeros((3, 6, 6, 1), np.uint8),
    test_y=np.arange(3),
  )


class TrainTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    absl_flags.FLAGS.mark_as_parsed()

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.args = small(write_data(self.folder))

  def train(self, name, *changes, **settings):
    return call(
      train, *self.args, *changes, f'--workdir={self.folder / name}', **settings
    )

  def test_dropouts_and_stragglers_are_replayed_from_the_file(self):
    realism = [
      '--method=fed_nova',
      '--dropout_rate=0.3',
      '--straggler_rate=0.5',
      '--min_availability=0.5',
    ]
    status, _, err = self.train('a', *realism)
    self.assertEqual(status, 0, err)
    saved = self.folder / 'a' / 'schedule.npz'
    status, _, err = self.train(
      'b', '--method=fed_nova', f'--schedule=file:{saved}'
    )
    self.assertEqual(status, 0, err)
    plain = self.train('c', '--method=fed_nova')
    a, b, c = (
      (self.folder / name / 'metrics.jsonl').read_text() for name in 'abc'
    )
    self.assertEqual(plain[0], 0)
    self.assertEqual(a, b)
    self.assertNotEqual(a, c)

  @parameterized.parameters('local', 'aggregate', 'reset')
  @pytest.mark.slow  # below `parameters`: applies to all cases
  def test_batch_norm_policy(self, policy):
    status, _, err = self.train(
      'a',
      '--method=fed_avg',
      '--model=lenet',
      '--norm=batch',
      '--evaluate_all',
      f'--batch_norm={policy}',
    )
    self.assertEqual(status, 0, err)
    config = json.loads((self.folder / 'a' / 'config.json').read_text())
    self.assertEqual(config['config']['batch_norm'], policy)
    row = json.loads(
      (self.folder / 'a' / 'metrics.jsonl').read_text().split('\n')[0]
    )
    own = ['own_statistics'] if policy == 'local' else []
    self.assertCountEqual(row['accuracy'], ['all', *own])

  def test_evaluating_all_changes_no_training(self):
    """An additional part does not change the draws of the others."""
    for name, *more in (('a',), ('b', '--evaluate_all')):
      status, _, err = self.train(name, '--method=fed_ftg', *more)
      self.assertEqual(status, 0, err)
    a, b = ((self.folder / name / 'params.npz').read_bytes() for name in 'ab')
    self.assertEqual(a, b)

  def test_public_data(self):
    self.check_public_data('train:20', 40)

  @pytest.mark.slow
  def test_public_data_of_a_file(self):
    path = self.folder / 'public.npz'
    np.savez(path, x=np.zeros((5, 8, 8, 1), np.uint8))
    self.check_public_data(f'npz:{path}', 60)

  def check_public_data(self, public, train_rows):
    status, _, err = self.train(
      'a',
      '--method=fed_df_public',
      '--df_student_steps=2',
      f'--public_data={public}',
    )
    self.assertEqual(status, 0, err)
    with np.load(self.folder / 'a' / 'partition.npz') as parts:
      self.assertLen(parts['rows'], train_rows)

  @parameterized.parameters(
    ('fed_avg', ''),
    ('fed_df', 'generator_steps lambda_dis ensemble'),
    ('fed_df_public+fed_ftg', 'student_lr ensemble'),
  )
  def test_a_flag_that_does_nothing_is_no_part_of_the_run(self, method, used):
    with flagsaver.flagsaver():
      config = resolve.config(method=method, public_data='train:9')
    df = {name for name in config if name.startswith('df_')}
    self.assertContainsSubset({'df_' + name for name in used.split()}, df)
    if not used:
      self.assertEmpty(df)
    if 'generator_steps' not in used:
      self.assertNoCommonElements(
        df, {'df_generator_steps', 'df_generator_lr', 'df_lambda_dis'}
      )

  @parameterized.parameters(
    ('fed_ftg', {}, 0.5),
    ('fed_df', {}, 0.5),
    ('fed_ftg', {'ftg_weight_decay': 0.0}, 0.0),
  )
  def test_prox_to_zero_reaches_the_student(self, method, changes, decay):
    """As in the official code, it is part of the student's weight decay."""
    with flagsaver.flagsaver():
      configs = [
        resolve.config(
          method=f'fed_prox+{method}',
          prox_mu=0.25,
          weight_decay=0.5,
          prox_to_zero=to_zero,
          **changes,
        )
        for to_zero in (False, True)
      ]
    dataset = absltest.mock.Mock(image_shape=(8, 8, 1), num_classes=3)
    decays = []
    for config in configs:
      with absltest.mock.patch.object(recipes, 'build') as build:
        assembly._method(config, dataset, None, None, 1)
      settings = build.call_args.args[1]
      options = settings.options[method]
      decays.append(options.get('weight_decay', settings.weight_decay))
    self.assertEqual(decays, [decay, decay + 0.25])

  @parameterized.parameters(
    ({}, 0.5, 7),
    ({'ftg_preset': 'robust'}, 0.0, 10),
    ({'ftg_weight_decay': 0.25, 'ftg_batch_size': 3}, 0.25, 3),
    (
      {'ftg_preset': 'robust', 'ftg_weight_decay': 0.25, 'ftg_batch_size': 0},
      0.25,
      7,
    ),
  )
  def test_what_the_server_takes_from_the_clients(self, changes, decay, batch):
    """The defaults are the clients', as in the official code."""
    with flagsaver.flagsaver():
      config = resolve.config(
        method='fed_ftg', weight_decay=0.5, batch_size=7, **changes
      )
    options = assembly._options('fed_ftg', config)
    self.assertEqual(options['weight_decay'], decay)
    self.assertEqual(options['batch_size'], batch)
    self.assertEqual((config['weight_decay'], config['batch_size']), (0.5, 7))

  def test_precision(self):
    self.check_precision('bfloat16')

  @parameterized.parameters('default', 'highest')
  @pytest.mark.slow  # below `parameters`: applies to all cases
  def test_other_precisions(self, precision):
    self.check_precision(precision)

  def check_precision(self, precision):
    """Checks what the compiler is asked for; results are near the default's."""
    asked = []
    run = federation.run

    def look(fed, state, data, schedule, key, **kwargs):
      row = jax.tree.map(lambda a: jnp.asarray(a[0]), schedule)
      asked.append(fed.round.lower(state, data, row, key).as_text())
      return run(fed, state, data, schedule, key, **kwargs)

    with absltest.mock.patch.object(federation, 'run', look):
      status, _, err = self.train(
        precision, '--method=fed_avg', f'--precision={precision}'
      )
    self.assertEqual(status, 0, err)
    self.assertEqual('HIGHEST' in asked[0], precision == 'highest')
    self.assertEqual('bf16' in asked[0], precision == 'bfloat16')
    row = json.loads(
      (self.folder / precision / 'metrics.jsonl').read_text().split('\n')[0]
    )
    self.assertGreater(row['test_accuracy'], 0.8)

  def test_files(self):
    forget()  # programs that another test has compiled
    self.args.append('--method=fed_ftg')
    status, out, err = self.train('a', draw=True)
    self.assertEqual(status, 0, err)
    self.assertIn('round 3/3', out)
    run = self.folder / 'a'
    self.assertCountEqual(
      [p.name for p in run.iterdir()],
      [
        'classes.json',
        'clients.json',
        'config.json',
        'counts.npz',
        'curves.png',
        'generated.npz',
        'generated.png',
        'images.npz',
        'nearest.npz',
        'metrics.csv',
        'metrics.jsonl',
        'model_input.json',
        'params.npz',
        'partition.npz',
        'report',
        'report.html',
        'ro-crate-metadata.json',
        'schedule.npz',
        'summary.json',
        'timings.jsonl',
      ],
    )
    rows = [
      json.loads(r)
      for r in (run / 'metrics.jsonl').read_text().split('\n')
      if r
    ]
    self.assertEqual([r['round'] for r in rows], [2, 3])
    for row in rows:
      self.assertContainsSubset(
        [
          'round',
          'train_loss',
          'test_loss',
          'test_accuracy',
          'accuracy',
          'bytes_up',
          'bytes_down',
        ],
        row,
      )
      self.assertEqual(list(row['accuracy']), ['average'])
      self.assertAlmostEqual(  # classes have equally many test images
        np.mean(row['class_accuracy']), row['test_accuracy'], places=5
      )
      self.assertEqual(
        row['same_models'], {'aggregated': 'average', 'fine_tuned': 'broadcast'}
      )
    # Bytes by hand: an MLP 64-200-200-3 in float32, and three counts.
    model = 4 * (64 * 200 + 200 + 200 * 200 + 200 + 200 * 3 + 3)
    self.assertEqual(rows[-1]['bytes_down'], 3 * 2 * model)
    self.assertEqual(rows[-1]['bytes_up'], 3 * 2 * (model + 4 * 3))
    summary = json.loads((run / 'summary.json').read_text())
    self.assertEqual(summary['bits_up_per_client'], 8 * (model + 4 * 3))
    self.assertEqual(summary['bits_down_per_client'], 8 * model)
    timing = json.loads((run / 'timings.jsonl').read_text().split('\n')[0])
    self.assertGreater(timing['compile_seconds'], 0)
    self.assertGreater(timing['rounds_per_second'], 0)
    saved = json.loads((run / 'config.json').read_text())
    self.assertEqual(saved['code'], versions.code())
    config = saved['config']
    self.assertEqual(config['ftg_md'], 'l1')  # the preset, spelled out
    params = np.load(run / 'params.npz')
    self.assertIn('params/dense0/linear/kernel', params.files)
    for name in ('curves.png', 'generated.png'):
      self.assertGreater(Image.open(run / name).size[0], 300)

  def test_repeats(self):
    self.train('a')
    run = self.folder / 'a'
    rows = [
      json.loads(r)
      for r in (run / 'metrics.jsonl').read_text().split('\n')
      if r
    ]
    # The same run in another folder gives the same bytes.
    forget()
    self.train('b')
    for name in ('metrics.jsonl', 'params.npz', 'partition.npz'):
      self.assertEqual(
        (run / name).read_bytes(), (self.folder / 'b' / name).read_bytes(), name
      )
    # A finished run is left alone, and this is printed.
    before = (run / 'metrics.jsonl').stat().st_mtime_ns
    status, out, _ = self.train('a')
    self.assertEqual(status, 0)
    self.assertIn('already finished', out)
    self.assertEqual((run / 'metrics.jsonl').stat().st_mtime_ns, before)
    # More rounds are the same configuration; the first rows stay the same.
    status, out, _ = self.train('a', '--rounds=4')
    self.assertEqual(status, 0)
    longer = (run / 'metrics.jsonl').read_text().split('\n')
    self.assertEqual(json.loads(longer[0]), rows[0])
    self.assertEqual(json.loads(longer[1])['round'], 4)
    # Another learning rate is another configuration.
    status, out, err = self.train('a', '--learning_rate=0.2')
    self.assertEqual(status, 2)
    self.assertRegex(
      err,
      r'^error: --workdir=.*another configuration \(learning_rate: 0.1, '
      r'not 0.2\); choose another folder\n$',
    )
    # The saved partition can be used again; a changed file is noticed.
    partition = run / 'partition.npz'
    self.train('c', f'--partition=file:{partition}')
    self.assertEqual(
      (self.folder / 'c' / 'metrics.jsonl').read_bytes(),
      (self.folder / 'b' / 'metrics.jsonl').read_bytes(),
    )
    np.savez(partition, a=np.arange(10), b=np.arange(10, 60))
    status, _, err = self.train('c', f'--partition=file:{partition}')
    self.assertEqual(status, 2)
    self.assertIn('holds another configuration (partition file: ', err)

  def test_unfinished_run_is_started_again(self):
    self.train('whole')
    run = self.folder / 'cut'
    stopped = Exception('power cut')
    with absltest.mock.patch.object(
      writer.RunWriter, 'finish', side_effect=stopped
    ):
      with self.assertRaisesRegex(Exception, 'power cut'):
        self.train('cut')
    self.assertFalse((run / 'summary.json').exists())
    (run / 'metrics.jsonl').write_text('{"round": 2, "half a li')
    status, _, _ = self.train('cut')
    self.assertEqual(status, 0)
    self.assertEqual(
      (run / 'metrics.jsonl').read_bytes(),
      (self.folder / 'whole' / 'metrics.jsonl').read_bytes(),
    )
    # A folder with other files is not written to.
    (self.folder / 'mine').mkdir()
    (self.folder / 'mine' / 'thesis.tex').write_text('')
    status, _, err = self.train('mine')
    self.assertEqual(status, 2)
    self.assertIn('holds other files', err)
    # A flag of earlier versions matters only where it changed something.
    saved = json.loads((run / 'config.json').read_text())
    for value, right in (1.0, 0), (3.0, 2):
      saved['config']['ftg_temperature'] = value
      (run / 'config.json').write_text(json.dumps(saved))
      status, _, err = self.train('cut')
      self.assertEqual(status, right)
    self.assertIn('another configuration (ftg_temperature: 3.0', err)
    # A config.json that cannot be read is not overwritten.
    (run / 'config.json').write_text('{')
    status, _, err = self.train('cut')
    self.assertEqual(status, 2)
    self.assertIn('config.json cannot be read', err)

  def test_compare(self):
    work = self.folder / 'c'
    args = [
      *self.args,
      '--seeds=2',
      f'--workdir={work}',
      '--methods=fed_avg,fed_prox:prox_mu=0.5:prox_to_zero=true',
    ]
    status, out, err = call(compare, *args)
    self.assertEqual(status, 0, err)
    self.assertIn('final accuracy', ' '.join(out.split()))
    summary = json.loads((work / 'summary.json').read_text())
    self.assertCountEqual(
      summary['methods'], ['fed_avg', 'fed_prox:prox_mu=0.5:prox_to_zero=true']
    )
    figures = summary['methods']['fed_avg']['final_accuracy']
    per_seed = [
      json.loads((work / f'fed_avg/seed{s}/summary.json').read_text())[
        'final_accuracy'
      ]
      for s in (0, 1)
    ]
    self.assertEqual(figures['per_seed'], per_seed)
    self.assertAlmostEqual(figures['mean'], np.mean(per_seed))
    self.assertAlmostEqual(figures['std'], np.std(per_seed, ddof=1))
    methods, clients = (work / 'table.md').read_text().split('\n\n')
    header, *lines = methods.splitlines()
    self.assertLen(lines, 3)
    self.assertRegex(header, r'\| rounds to \d+ % \| MB up \| MB down \|')
    header, *lines = clients.splitlines()
    self.assertEqual(header, '| method | clients: mean | worst tenth |')
    self.assertLen(lines, 3)
    self.assertIn('worst tenth', ' '.join(out.split()))
    config = json.loads(
      (
        work / 'fed_prox_prox_mu=0.5_prox_to_zero=true/seed0/config.json'
      ).read_text()
    )['config']
    self.assertEqual(config['prox_mu'], 0.5)
    self.assertTrue(config['prox_to_zero'])
    # Finished runs are skipped, a missing one is trained.
    kept = work / 'fed_avg/seed0/metrics.jsonl'
    gone = work / 'fed_avg/seed1'
    before, content = (
      kept.stat().st_mtime_ns,
      (gone / 'metrics.jsonl').read_bytes(),
    )
    (gone / 'summary.json').unlink()
    status, out, _ = call(compare, *args)
    self.assertEqual(status, 0)
    self.assertEqual(kept.stat().st_mtime_ns, before)
    self.assertEqual((gone / 'metrics.jsonl').read_bytes(), content)
    self.assertNotIn('seed 0', out)
    # With fewer rounds, the table has only those, for all methods.
    call(compare, *args, '--rounds=2')
    shorter = json.loads((work / 'summary.json').read_text())['methods']
    first = json.loads(content.decode().split('\n')[0])
    self.assertEqual(first['round'], 2)
    self.assertEqual(
      shorter['fed_avg']['final_accuracy']['per_seed'][1],
      first['test_accuracy'],
    )
    # The folder belongs to a comparison, and to this one.
    for changes, message in (
      (['--dirichlet_alpha=2'], 'another configuration .dirichlet_alpha: 1.0'),
      (['--methods=fed_avg:batch_size=5', '--batch_size=5'], None),
    ):
      status, _, err = call(compare, *args, *changes)
      self.assertEqual(status, 2 if message else 0, err)
      self.assertRegex(err, message or '^$')
    status, _, err = self.train('c')
    self.assertEqual(status, 2)
    self.assertIn('holds a comparison', err)
    # `train` with that seed gives the same run.
    self.train('alone', '--method=fed_avg', '--seed=1')
    self.assertEqual(
      (self.folder / 'alone/metrics.jsonl').read_bytes(), content
    )

  def test_diverged_run_stops(self):
    status, _, err = self.train(
      'd', '--method=fed_avg', '--learning_rate=1e30', '--clip_norm=0'
    )
    self.assertEqual(status, 1)
    self.assertRegex(
      err,
      r'^error: .*/d: the model is no longer finite after a '
      'round between 1 and 2; .* A smaller --learning_rate or '
      r'--clip_norm may help \(a clip of 0 is none\)$',
    )
    self.assertEqual(err.count('\n'), 1)

  @pytest.mark.slow
  @parameterized.parameters(
    (
      ('fed_ftg', '--ftg_preset=intended', '--ftg_student_lr=1e30'),
      '--ftg_student_lr, --ftg_generator_lr or --ftg_student_clip',
    ),
    (
      ('fed_dm', '--momentum=0', '--dm_image_lr=1e30', '--dm_iterations=2'),
      '--clip_norm, --dm_image_lr or --dm_server_lr',
    ),
  )
  def test_diverged_images(self, flags, said):
    """It ends with one line, although there are no images to show."""
    with warnings.catch_warnings(action='error', category=RuntimeWarning):
      status, _, err = self.train('d', f'--method={flags[0]}', *flags[1:])
    self.assertEqual(status, 1)
    self.assertRegex(err, f'no longer finite .*{said} may help')
    self.assertEqual(err.count('\n'), 1)

  def test_seeds_at_once(self):
    work = self.folder / 's'
    args = [*self.args, '--seeds=2', '--methods=fed_avg']
    call(compare, *args, f'--workdir={work}')
    status, _, err = call(
      compare, *args, '--seeds_at_once=2', f'--workdir={work}2'
    )
    self.assertEqual(status, 0, err)
    for seed in (0, 1):
      one, both = (
        np.load(f'{w}/fed_avg/seed{seed}/params.npz')
        for w in (work, f'{work}2')
      )
      for name in one.files:
        np.testing.assert_allclose(one[name], both[name], atol=1e-5)

  def test_seconds_are_shared_by_runs_at_once(self):
    clock = clock_lib.Clock()
    with mock.patch.object(clock, '_seconds', {'train': 6.0}):
      with mock.patch.object(clock, '_last', {'train': 0.0}):
        row = clock.row(3, runs=2)
    self.assertEqual(row['train_seconds'], 3.0)
    self.assertEqual(row['rounds_per_second'], 1.0)

  def test_one_method_is_no_comparison(self):
    status, _, err = call(compare, *self.args, '--method=scaffold')
    self.assertEqual(status, 2)
    self.assertIn('--method=scaffold: is of one run; give --methods=', err)

  def test_vary_partition(self):
    work = self.folder / 'v'
    call(
      compare,
      *self.args,
      '--seeds=2',
      '--methods=fed_avg',
      '--vary_partition',
      f'--workdir={work}',
    )
    configs = [
      json.loads((work / f'fed_avg/seed{s}/config.json').read_text())['config']
      for s in (0, 1)
    ]
    self.assertEqual([c['partition_seed'] for c in configs], [0, 1])
    self.assertEqual([c['schedule_seed'] for c in configs], [0, 1])
    # Round t of a Bernoulli schedule is drawn with the seed plus t.
    values = {**configs[0], 'schedule': 'bernoulli'}
    self.assertEqual(comparison.varied(values, 2)['schedule_seed'], 2_000_000)
    parts = [
      (work / f'fed_avg/seed{s}/partition.npz').read_bytes() for s in (0, 1)
    ]
    self.assertNotEqual(*parts)


class ErrorsTest(parameterized.TestCase):
  """Each wrong value gives one line with flag, value and what would be
  right."""

  @parameterized.parameters(
    ('--rounds=abc', '--rounds=abc: must be a positive integer'),
    ('--rounds=0', '--rounds=0: must be a positive integer'),
    ('--cohort=21', '--cohort=21: must be at most --num_clients=20'),
    (
      '--evaluate_all --client_state=host',
      '--evaluate_all=True: needs --client_state=device',
    ),
    ('--moon_tau=0', '--moon_tau=0.0: must be above 0'),
    ('--scaffold_option=3', '--scaffold_option=3'),
    ('--dropout_rate=1.5', '--dropout_rate=1.5'),
    ('--momentum=1', '--momentum=1.0: must be below 1'),
    ('--nesterov', '--nesterov=True: needs a --momentum above 0'),
    ('--keep_momentum', '--keep_momentum=True: needs a --momentum above 0'),
    (
      '--method=scaffold --scaffold_lr0 --momentum=0.9',
      '--scaffold_lr0=True: needs --momentum=0',
    ),
    ('--public_data=20', '--public_data=20: must be train:NUM or npz:PATH'),
    ('--method=fed_df_public', '--public_data=: fed_df_public needs images'),
    ('--dirichlet_alpha=0', '--dirichlet_alpha=0.0: must be above 0'),
    ('--dirichlet_alpha=nan', '--dirichlet_alpha=nan: must be a finite number'),
    ('--learning_rate=-1', '--learning_rate=-1: must be a non-negative number'),
    ('--lr_decay=2', r'--lr_decay=2: must be a number in the range \[0, 1\]'),
    ('--model=resnet', '--model=resnet: .*mlp.*lenet.*fedavg_cnn'),
    (
      '--method=FedAvg',
      "--method=FedAvg: no method 'FedAvg' .did you mean fed_avg",
    ),
    (
      '--method=fed_mr --schedule=bernoulli',
      '--schedule=bernoulli: must be exact with fed_mr: its rounds have as',
    ),
    (
      '--method=fed_mr --server_optimizer=adam',
      '--server_optimizer=adam: must be sgd with fed_mr',
    ),
    ('--ntd_tau=0', '--ntd_tau=0.0: must be above 0'),
    ('--lr=0.1', '--lr=0.1: no such flag; did you mean --learning_rate?'),
    (
      '--method=fed_avg+fed_avg',
      '--method=fed_avg.fed_avg: fed_avg is named twice',
    ),
    (
      '--dataset=cifar9',
      '--dataset=cifar9: must be one of mnist5k, .*npz:PATH',
    ),
    ('--dataset=npz:/no/x.npz', '--dataset=npz:/no/x.npz: no such file'),
    ('--partition=dirichelt', '--partition=dirichelt: must be one of'),
    ('--partition=file:/no', '--partition=file:/no: no such file'),
    ('--schedule=file:/no', '--schedule=file:/no: no such file'),
    ('--schedule=possion', '--schedule=possion: must be one of'),
    ('--ftg_preset=best', '--ftg_preset=best: .*official.*paper.*intended'),
    ('--ftg_md=l2', '--ftg_md=l2: .*l1.*kl'),
    ('--ftg_memory=1', '--ftg_memory=1.0: must be below 1'),
    ('--df_memory=1', '--df_memory=1.0: must be below 1'),
    ('--ftg_iterations=99999999', '--ftg_iterations=99999999: must be at most'),
    ('--norm=batch --model=mlp', '--norm=batch: must be none with --model=mlp'),
    (
      '--norm=group --model=softmax',
      '--norm=group: must be none with --model=softmax',
    ),
    ('--server_learning_rate=0', '--server_learning_rate=0.0: must be above 0'),
    ('--flagfile=/no/file', '--flagfile: .*/no/file.*must name a file'),
    (
      '--server_eps_root=1e-9 --server_optimizer=yogi',
      '--server_eps_root=1e-09: needs --server_optimizer=adam',
    ),
    ('--server_optimizer=lion', '--server_optimizer=lion: .*adam'),
    ('--vary_partition=7', '--vary_partition=7: '),
    ('--round=3', '--round=3: no such flag; did you mean --rounds'),
    ('--xyzzy', '--xyzzy: no such flag; --helpfull lists all flags'),
    ('stray', 'stray: not understood; values are given as --flag=value'),
    ('--data_dir=/dev/null', '--data_dir=/dev/null: must be a folder'),
    ('--workdir=/dev/null/w', '--workdir=/dev/null/w: cannot be written'),
  )
  def test_one_line_and_status_2(self, argument, message):
    with absltest.mock.patch.object(
      assembly, 'build', side_effect=AssertionError
    ):
      status, _, err = call(train, *argument.split())
    self.assertEqual(status, 2)
    self.assertRegex(err, '^error: ' + message)
    self.assertEqual(err.count('\n'), 1)

  @parameterized.parameters(
    ('--methods=', '--methods=: must name at least one'),
    ('--methods=fed_avg,fed_avg', 'fed_avg is named twice'),
    ('--methods=fed_avg,nix', '--methods=nix: --method=nix: no method'),
    ('--methods=fed_avg:ronds=3', '--ronds=3: no such flag'),
    ('--methods=fed_avg:batch_size=x', '--batch_size=x: .*integer'),
    ('--methods=fed_avg:rounds=3', 'rounds must be the same for all methods'),
    ('--methods=fed_avg:tensorboard=true', 'tensorboard changes no result'),
    ('--methods=fed_avg:batch_size', "no method 'fed_avg:batch_size'"),
    ('--methods=fed_ftg:ftg_md=l2', '--ftg_md=l2: .*l1'),
    ('--seeds=0', '--seeds=0: must be a positive integer'),
  )
  def test_compare(self, argument, message):
    with absltest.mock.patch.object(
      assembly, 'build', side_effect=AssertionError
    ):
      status, _, err = call(compare, argument)
    self.assertEqual(status, 2)
    self.assertRegex(err, '^error: .*' + message)
    self.assertEqual(err.count('\n'), 1)

  def test_files_that_do_not_fit(self):
    folder = self.create_tempdir().full_path
    broken = os.path.join(folder, 'broken.npz')
    pathlib.Path(broken).write_text('nothing')
    own = write_data(folder)
    odd = os.path.join(folder, 'odd.npz')
    write_odd_data(odd)
    ids = os.path.join(folder, 'ids.npy')
    np.save(ids, [[0, 0]] * 3)
    for changes, message in (
      ([f'--dataset=npz:{broken}'], '--dataset=npz:.*not a readable .npz'),
      ([f'--dataset=npz:{odd}', '--method=fed_ftg'], 'divisible by 4.*6, 6, 1'),
      ([f'--partition=file:{broken}'], '--partition=file:.*not a readable'),
      ([f'--schedule=file:{ids}'], 'client 0 is twice in round 0'),
      ([f'--schedule=file:{ids}', '--rounds=9'], 'has 3 rounds, but 9 are'),
      (['--num_clients=61'], '--num_clients=61: .*number of examples'),
    ):
      status, _, err = call(
        train, *small(own), *changes, f'--workdir={folder}/{len(changes)}'
      )
      self.assertEqual(status, 2, changes)
      self.assertRegex(err, '^error: .*' + message)
      self.assertEqual(err.count('\n'), 1)

  @pytest.mark.slow
  def test_images_of_any_size_without_a_generator(self):
    folder = self.create_tempdir().full_path
    write_odd_data(f'{folder}/odd.npz')
    status, _, err = call(
      train,
      *small(f'{folder}/odd.npz'),
      '--model=lenet',
      '--num_clients=2',
      '--norm=group',
      f'--workdir={folder}/a',
    )
    self.assertEqual(status, 0, err)

  def test_as_a_process(self):
    """Checks exit status and output as a shell sees them, also of --help."""
    for name in recipes.FtgOptions._fields:
      # Each help has a description and a default.
      self.assertRegex(
        absl_flags.FLAGS[f'ftg_{name}'].help,
        r'\w.*\. (Default: |0 for --batch_size)',
      )
    command = [sys.executable, '-m', 'experiments.train']
    wrong = subprocess.run(
      [*command, '--rounds=-3'],
      cwd=ROOT,
      text=True,
      capture_output=True,
      check=False,
    )
    self.assertEqual(wrong.returncode, 2)
    self.assertEqual(
      wrong.stderr, 'error: --rounds=-3: must be a positive integer\n'
    )
    self.assertEqual(wrong.stdout, '')
    help_ = subprocess.run(
      [*command, '--help'],
      cwd=ROOT,
      text=True,
      capture_output=True,
      check=False,
    )
    self.assertEqual(help_.returncode, 0)
    self.assertIn('Concentration of the Dirichlet', help_.stdout)

  def test_no_reader(self):
    """Output whose reader has ended stops a program without a word."""
    code = (
      "from fedftg_jax.system import cli; cli.flags.FLAGS(['program']); "
      'cli.guarded(lambda: [print(i, flush=True) for i in range(10**6)])'
    )
    process = subprocess.Popen(
      [sys.executable, '-c', code],
      cwd=ROOT,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
    self.assertEqual(process.stdout.readline(), '0\n')
    process.stdout.close()
    self.assertEqual(process.stderr.read(), '')
    self.assertEqual(process.wait(60), 141)
    process.stderr.close()

  def test_another_broken_pipe(self):
    """A pipe that is not the output's is an error."""

    def main():
      raise BrokenPipeError(errno.EPIPE, 'Broken pipe')

    with (
      self.assertRaises(SystemExit) as stop,
      contextlib.redirect_stderr(io.StringIO()) as err,
    ):
      cli.guarded(main)
    self.assertEqual(stop.exception.code, 1)
    self.assertIn('Broken pipe', err.getvalue())

  @pytest.mark.slow
  def test_interruption(self):
    """Ctrl-C ends with one line and status 130; the same command completes."""
    folder = self.create_tempdir().full_path
    args = small(write_data(folder))
    command = [
      sys.executable,
      '-m',
      'experiments.train',
      *args,
      '--method=fed_avg',
      '--eval_every=1',
      f'--workdir={folder}/w',
    ]
    # Background jobs of a shell ignore this signal, and children inherit that.
    # The program should start as from a terminal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
      [*command, '--rounds=100000'],
      cwd=ROOT,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
    signal.signal(signal.SIGINT, before)
    metrics = pathlib.Path(folder, 'w', 'metrics.jsonl')
    deadline = time.time() + 120
    while not metrics.exists() and time.time() < deadline:
      time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    self.assertEqual(process.returncode, 130, err)
    self.assertEqual(
      err, 'interrupted; the same command continues from the last checkpoint\n'
    )
    rows = metrics.read_text().splitlines()
    self.assertEqual(json.loads(rows[-1])['round'], len(rows))
    again = subprocess.run(command, cwd=ROOT, check=False)
    self.assertEqual(again.returncode, 0)
    self.assertEqual(metrics.read_text().splitlines()[0], rows[0])


class DevicesTest(parameterized.TestCase):
  """Several devices, several processes, the compile cache."""

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.args = [
      *small(write_data(self.folder)),
      '--method=scaffold',
      '--cohort=3',
    ]

  def params(self, name):
    with np.load(self.folder / name / 'params.npz') as arrays:
      return dict(arrays)

  def assert_same_run(self, a, b):
    for name, value in self.params(a).items():
      np.testing.assert_allclose(
        self.params(b)[name], value, atol=1e-5, err_msg=name
      )

  def train(self, name, *changes):
    return call(train, *self.args, f'--workdir={self.folder / name}', *changes)

  @pytest.mark.slow
  def test_devices_agree(self):
    for name, changes in (
      ('one', []),
      ('two', ['--num_devices=2']),
      ('all', ['--num_devices=0', '--client_chunk=1']),
    ):
      status, _, err = self.train(name, *changes)
      self.assertEqual(status, 0, err)
    config = json.loads((self.folder / 'all' / 'config.json').read_text())
    self.assertEqual(config['config']['num_devices'], 8)
    self.assert_same_run('one', 'two')
    self.assert_same_run('one', 'all')

  @pytest.mark.slow
  def test_a_cpu_is_divided(self):
    """A process of its own, which has not counted its devices yet."""
    command = [sys.executable, '-m', 'experiments.train', *self.args]
    command += ['--num_devices=2', f'--workdir={self.folder / "divided"}']
    others = {k: v for k, v in os.environ.items() if 'DEVICE' not in k}
    others.pop('XLA_FLAGS', None)
    subprocess.run(command, cwd=ROOT, env=others, check=True)
    config = json.loads((self.folder / 'divided/config.json').read_text())
    self.assertEqual(config['config']['num_devices'], 2)
    self.train('two', '--num_devices=2')
    self.assert_same_run('two', 'divided')

  @pytest.mark.slow
  def test_seeds_at_once_on_devices(self):
    for name, devices in (('one', 1), ('two', 2)):
      status, _, err = call(
        compare,
        *self.args,
        '--methods=fed_avg',
        '--seeds=2',
        '--seeds_at_once=2',
        f'--num_devices={devices}',
        f'--workdir={self.folder / name}',
      )
      self.assertEqual(status, 0, err)
    self.assert_same_run('one/fed_avg/seed1', 'two/fed_avg/seed1')

  @parameterized.parameters(
    (1, []),
    (4, ['--num_clients=12', '--client_state=disk', '--cohort=5']),
    (1, ['--method=fed_ftg', '--ftg_preset=robust', '--ftg_iterations=2']),
  )
  @pytest.mark.slow  # below: the cases of `parameters` take it over
  def test_two_processes_agree_with_one(self, devices, changes):
    """They are started as by a user, on one machine; one of them writes."""
    with socket.socket() as free:
      free.bind(('localhost', 0))
      port = free.getsockname()[1]
    args = [*self.args, '--eval_every=1', '--checkpoint_every=1', *changes]
    command = [
      sys.executable,
      '-m',
      'experiments.train',
      *args,
      '--num_processes=2',
      f'--coordinator=localhost:{port}',
    ]
    for rounds in (2, 3):  # the second time they resume together
      together = [
        subprocess.Popen(
          [
            *command,
            f'--workdir={self.folder / "both"}',
            f'--process_id={i}',
            f'--rounds={rounds}',
          ],
          cwd=ROOT,
          env={**os.environ, 'JAX_NUM_CPU_DEVICES': str(devices)},
          stdout=subprocess.PIPE,
          stderr=subprocess.STDOUT,
          text=True,
        )
        for i in (0, 1)
      ]
      said = [process.communicate(timeout=300)[0] for process in together]
      for process, text in zip(together, said):
        self.assertEqual(process.returncode, 0, text)
      self.assertIn('final accuracy', said[0])
      self.assertNotIn('round', said[1])
    self.assertIn('going on after round 2', said[0])
    config = json.loads((self.folder / 'both' / 'config.json').read_text())
    self.assertEqual(config['config']['num_devices'], 2 * devices)
    status, _, err = call(train, *args, f'--workdir={self.folder / "one"}')
    self.assertEqual(status, 0, err)
    self.assert_same_run('one', 'both')

  @parameterized.parameters(
    (['--num_devices=9'], '--num_devices=9: num_devices must be 0 .* to 8'),
    (['--num_devices=-1'], '--num_devices=-1: must be'),
    (['--coordinator=localhost:1'], 'needs --num_processes'),
    (
      ['--coordinator=localhost:1', '--num_processes=2', '--process_id=2'],
      '--process_id=2: must be less than --num_processes=2',
    ),
  )
  def test_errors(self, changes, message):
    status, _, err = self.train('a', *changes)
    self.assertEqual(status, 2)
    self.assertRegex(err, message)
    self.assertFalse((self.folder / 'a').exists())

  @pytest.mark.slow
  def test_compiled_programs_are_kept(self):
    cache = self.folder / 'cache'
    command = [
      sys.executable,
      '-m',
      'experiments.train',
      *self.args,
      '--method=fed_avg',
    ]
    environment = {
      k: v for k, v in os.environ.items() if k != 'JAX_COMPILATION_CACHE_DIR'
    }
    subprocess.run(
      [*command, f'--workdir={self.folder / "a"}'],
      cwd=ROOT,
      env={**environment, 'XDG_CACHE_HOME': str(cache)},
      check=True,
      stdout=subprocess.DEVNULL,
    )
    self.assertNotEmpty(list(cache.glob('fedftg_jax/compiled-*/*')))


class Process:
  """Stands for the process of a contestant of `fedftg benchmark`."""

  def __init__(self, name, workload, *_):
    self.name, self.workload = name, workload

  def answer(self):
    return {'first_seconds': 60.0, 'cost': {}, 'device': 'cpu', 'versions': {}}

  def run(self):
    return {'seconds': 2.0 if self.name == 'ours' else 3.0, 'peak_bytes': 1}

  def close(self):
    pass


class BenchmarkTest(parameterized.TestCase):
  @pytest.mark.slow
  def test_a_process_that_ended(self):
    contestant = benchmark.Contestant('matmul', 'W0', 3, 'float32')
    self.addCleanup(contestant.close)
    self.assertEqual(contestant.answer()['device'], 'cpu')
    contestant._process.kill()
    contestant._process.wait()
    with self.assertRaisesRegex(benchmark.LeftOut, 'ended with status -9'):
      contestant.run()

  @parameterized.parameters(
    ('W0_cnn', benchmark.PRECISIONS, benchmark.PEERS),
    ('W0_norm', ('bfloat16',), ('torch', 'centralised', 'matmul')),
    ('W0_server', ('default',), ('torch', 'matmul')),
    ('W0_robust', ('bfloat16',), ('matmul',)),
  )
  @pytest.mark.slow
  def test_side_by_side(self, workload, precisions, peers):
    """A dry run of all that is installed, for the CNN in both precisions.

    PEER_PYTHON is an interpreter that has the peers.
    """
    out = pathlib.Path(self.create_tempdir().full_path, 'speed.json')
    candidate = 'ours:client_chunk=2'
    if workload in ('W0_server', 'W0_robust'):
      candidate = 'ours:gen_step=joint'
    here = {'matmul', 'copy', 'plain_jax', 'centralised', 'one_step'}
    status, screen, err = call(
      benchmark,
      f'--workloads={workload}',
      '--against=' + ','.join([*peers, candidate]),
      '--cohorts=3',
      '--repeat=2',
      '--precisions=' + ','.join(precisions),
      f'--peer_python={os.environ.get("PEER_PYTHON", "")}',
      f'--out={out}',
      draw=True,
    )
    self.assertEqual(status, 0, err)
    figures = json.loads(out.read_text())
    self.assertContainsSubset(['processor', 'cores'], figures['machine'])
    for precision in precisions:
      all_rows = {
        r['who']: r for r in figures['rows'] if r['precision'] == precision
      }
      self.assertCountEqual(all_rows, ['ours', *peers, candidate])
      rows = {k: r for k, r in all_rows.items() if 'left_out' not in r}
      self.assertContainsSubset(
        ['ours', candidate, *here.intersection(peers)], rows
      )
      for name in rows.keys() & set(benchmark.LIMITS):
        self.assertCountEqual(rows[name]['cost'], ['gflop', 'gbyte'])
      for name, row in rows.items():
        self.assertEqual((row['workload'], row['cohort']), (workload, 3))
        self.assertLen(row['all_seconds'], 2)
        self.assertGreater(row['seconds'], 0)
        self.assertGreater(row['peak_bytes'], 1e7)
        self.assertIn(name, screen)
      for name in all_rows.keys() - rows.keys():
        self.assertRegex(
          all_rows[name]['left_out'], '^(No module named|no server step)', name
        )
    self.assertRegex(screen, r'matmul .* 100\.0 %')
    self.assertEqual(Image.open(out.with_suffix('.png')).format, 'PNG')

  def test_commands_of_the_page(self):
    """Every command and contestant on the page is accepted."""
    page = (ROOT / 'docs' / 'speed.md').read_text().replace('\\\n', ' ')
    commands = re.findall(r'^.*\bfedftg benchmark (.*)$', page, re.M)
    self.assertGreater(len(commands), 9)
    out = pathlib.Path(self.create_tempdir().full_path, 'speed.json')
    cells = []
    with absltest.mock.patch.object(
      benchmark, 'time_cell', lambda cell, *_, **__: cells.append(cell)
    ):
      for command in commands:
        status, _, err = call(
          benchmark, *shlex.split(command), '--peer_python=', f'--out={out}'
        )
        self.assertEqual(status, 0, f'{command}: {err}')
    self.assertIn(('W7', 10, 'default'), cells)
    names = re.findall(r'`((?:ours|centralised|one_step):[^`]+)`', page)
    self.assertGreater(len(names), 5)
    for name in names:
      with self.subTest(name):
        self.assertNotEmpty(options.parse(re.sub(r'\b[KIB]\b', '2', name)))

  def test_fails_stops_and_goes_on(self):
    """A script of processes: one fails, time is up, and it goes on."""
    out = pathlib.Path(self.create_tempdir().full_path, 'speed.json')
    clock = 0.0
    started, ran = [], []

    class Scripted(Process):
      def __init__(self, *args):
        super().__init__(*args)
        started.append((self.workload, self.name))

      def answer(self):
        nonlocal clock
        clock += 60
        if self.name == 'fedjax':
          raise benchmark.LeftOut('No module')
        return super().answer()

      def run(self):
        nonlocal clock
        clock += 1
        ran.append(self.name)
        if self.name == 'torch' and ran.count('torch') == 2:
          raise benchmark.LeftOut('out of memory')
        return super().run()

    flags = (
      '--resume',
      '--against=torch,fedjax,copy,pfl',
      f'--out={out}',
      '--workloads=W1,W2',
      '--repeat=2',
    )

    def rows():
      return {
        (r['workload'], r['who']): r.get('all_seconds', r.get('left_out'))
        for r in json.loads(out.read_text())['rows']
      }

    with (
      absltest.mock.patch.object(benchmark, 'Contestant', Scripted),
      absltest.mock.patch.object(benchmark.time, 'monotonic', lambda: clock),
    ):
      status, screen, err = call(benchmark, *flags, '--minutes=4.12')
      self.assertEqual(status, 0, err)
      # Four contestants take 4 minutes and 8 s. copy takes no turns with ours.
      self.assertEqual(ran, ['ours'] * 2 + ['ours', 'torch'] * 2 + ['copy'] * 2)
      self.assertEqual(
        rows(),
        {
          ('W1', 'ours'): [2.0, 2.0],
          ('W1', 'torch'): 'out of memory',
          ('W1', 'fedjax'): 'No module',
          ('W1', 'copy'): [3.0, 3.0],
        },
      )
      self.assertIn('6 of 10 are left', err)
      self.assertRegex(screen, 'left out: W1 torch: out of memory')

      started.clear()
      ran.clear()
      # Ours is prepared again, for pfl, which gets a round although time is up.
      _, screen, err = call(benchmark, *flags, '--minutes=1.9')
      self.assertEqual(started, [('W1', 'ours'), ('W1', 'pfl')])
      self.assertEqual(ran, ['ours', 'pfl'])
      self.assertEqual(rows()['W1', 'pfl'], [3.0])
      self.assertRegex(screen, r'pfl .* 1\.50 ')
      ran.clear()
      call(benchmark, *flags, '--minutes=9')
      self.assertEqual(ran[:2], ['ours', 'pfl'])  # the round that it lacked
      self.assertEqual(rows()['W1', 'pfl'], [3.0, 3.0])
      self.assertEqual(rows()['W2', 'pfl'], [3.0, 3.0])
      started.clear()
      call(benchmark, *flags)
      self.assertEmpty(started)

  def test_ours_fails(self):
    """The others go on, and nothing is compared with it."""
    out = pathlib.Path(self.create_tempdir().full_path, 'speed.json')

    class Scripted(Process):
      def run(self):
        if self.name == 'ours':
          raise benchmark.LeftOut('out of memory')
        return super().run()

    with absltest.mock.patch.object(benchmark, 'Contestant', Scripted):
      _, screen, _ = call(
        benchmark, f'--out={out}', '--workloads=W1', '--against=torch'
      )
    self.assertIn('left out: W1 ours: out of memory', screen)
    self.assertRegex(screen, 'torch │ cpu +│ 3 +│ 3 - 3 │ +│ 83')

  def test_another_device(self):
    """What runs on the host is not compared with ours on an accelerator."""
    out = pathlib.Path(self.create_tempdir().full_path, 'speed.json')

    class Scripted(Process):
      def answer(self):
        device = 'cpu' if self.name == 'fedjax' else 'NVIDIA'
        return {**super().answer(), 'device': device}

    with (
      absltest.mock.patch.object(benchmark, 'Contestant', Scripted),
      absltest.mock.patch.object(benchmark, 'accelerator', lambda: 'NVIDIA'),
    ):
      _, screen, _ = call(
        benchmark, f'--out={out}', '--workloads=W1', '--against=torch,fedjax'
      )
    self.assertRegex(screen, r'torch │ NVIDIA .* 1\.50 ')
    self.assertIn('left out: W1 fedjax: runs on cpu, ours on NVIDIA', screen)

  def test_resumes(self):
    """A file of this machine is read; that of another is not."""
    out = pathlib.Path(self.create_tempdir().full_path, 'speed.json')
    row = {
      'workload': 'W1',
      'cohort': 50,
      'precision': 'default',
      'who': 'ours',
      'device': 'cpu',
      'peak_bytes': 10**9,
      'seconds': 2.0,
      'all_seconds': [2.0] * 5,
      'ours_seconds': [],
      'cost': {},
      'compile_seconds': 1.0,
      'versions': {},
    }
    saved = {'machine': benchmark.machine(), 'rows': [row]}
    self.assertEqual(saved['machine']['accelerator'], 'cpu')
    out.write_text(json.dumps(saved))
    flags = ('--resume', '--against=', f'--out={out}', '--workloads=W1')
    status, screen, err = call(benchmark, *flags)
    self.assertEqual(status, 0, err)
    self.assertRegex(screen, r'W1 .* 124 ')  # GFLOP/s: 249 in 2 s
    for change, why in (
      ({'machine': {}}, 'has figures of another machine'),
      *(
        (
          {'machine': {**benchmark.machine(), **other}},
          'of another machine, accelerator or XLA_FLAGS',
        )
        for other in ({'xla_flags': '--xla_x=1'}, {'accelerator': 'NVIDIA'})
      ),
      ({'rows': 3}, 'is damaged'),
      ({'rows': [{}]}, 'is damaged'),
      ({'rows': [{**row, 'workload': 'W9'}]}, 'is damaged'),
      ({'rows': [{**row, 'all_seconds': []}]}, 'is damaged'),
    ):
      out.write_text(json.dumps(saved | change))
      status, _, err = call(benchmark, *flags)
      self.assertEqual(status, 2)
      self.assertRegex(err, why)
      self.assertEqual(err.count('\n'), 1)

  def test_options_are_those_of_the_recipe(self):
    """Options of the server step reach it; each belongs to its workloads."""
    found = options.parse(
      'ours:gen_step=joint:generator_steps=2:ftg_batch_size=3:student_steps=0'
    )
    work = workloads.WORKLOADS['W0_robust']
    with absltest.mock.patch.object(
      ours.recipes, 'build', side_effect=AssertionError
    ) as build:
      self.assertRaises(AssertionError, ours.prepare, work, **found)
    (_, settings), _ = build.call_args
    got = recipes.ftg_options(**settings.options['fed_ftg'])
    self.assertEqual(
      (got.gen_step, got.generator_steps, got.batch_size, got.student_steps),
      ('joint', 2, 3, 0),
    )
    self.assertEqual((got.memory, got.iterations), (0.9, 1))  # of robust
    with self.assertRaisesRegex(NotImplementedError, 'no clients'):
      ours.prepare(work, client_chunk='auto')
    local = workloads.WORKLOADS['W0']
    with self.assertRaisesRegex(NotImplementedError, 'no server step'):
      ours.prepare(local, **found)
    for contestant in (ours, centralised, one_step):
      with self.assertRaisesRegex(NotImplementedError, 'no convolutions'):
        contestant.prepare(local, conv='lax')

  def test_as_many_clients_as_fit(self):
    work = workloads.WORKLOADS['W0']
    with absltest.mock.patch.object(
      federation, 'chunk_that_fits', return_value=2
    ) as fits:
      ours.prepare(work, client_chunk='auto')
    self.assertEqual(fits.call_args.args[2:], (2, 2))

  def test_bytes_of_a_candidate(self):
    work = workloads.WORKLOADS['W0_cnn']
    plain, other = (one_step.cost(work, conv=c) for c in ('matmul', 'slices'))
    self.assertNotEqual(plain['gbyte'], other['gbyte'])

  def test_one_product_for_all_clients(self):
    """Three dense layers: three products forward, five backward."""
    for cohort in (2, 3):
      work = workloads.WORKLOADS['W0']._replace(cohort=cohort)
      program = one_step._compiled(work)[0].as_text()
      products = re.findall(r' dot\(.*?lhs_batch_dims=\{(\d*)\}', program)
      self.assertEqual(products, ['0'] * 8)

  @parameterized.parameters(
    ('--workloads=W9', '--workloads=W9: must be one of W1'),
    ('--against=tf', '--against=tf: must be one of torch'),
    ('--against=ours:x=1', "--against=ours:x=1: 'x' is none of the options"),
    ('--against=ours:', "--against=ours:: '' is none of the options"),
    (
      '--against=torch:conv=lax',
      "--against=torch:conv=lax: 'conv' is none of the options of torch",
    ),
    (
      '--against=one_step:client_chunk=2',
      "--against=one_step:client_chunk=2: 'client_chunk' is none of the "
      'options of one_step, conv',
    ),
    (
      '--against=ours:conv=lax:conv=lax',
      '--against=ours:conv=lax:conv=lax: conv is given twice',
    ),
    (
      '--against=ours:conv=fast',
      '--against=ours:conv=fast: conv must be one of winograd',
    ),
    (
      '--against=ours:client_chunk=all',
      '--against=ours:client_chunk=all: client_chunk must be auto or 0 to 9999',
    ),
    (
      '--against=ours:gen_step=both',
      '--against=ours:gen_step=both: gen_step must be one of sequential, joint',
    ),
    ('--precisions=f8', '--precisions=f8: must be one of default'),
    ('--repeat=0', '--repeat=0: must be a positive'),
    ('--cohorts=2,x', '--cohorts=x: must be positive integers'),
    ('--peer_python=/no/python', '--peer_python=/no/python: must be a Python'),
    ('--out=a.txt', '--out=a.txt: must end in .json'),
  )
  def test_errors(self, argument, message):
    status, _, err = call(benchmark, argument)
    self.assertEqual(status, 2)
    self.assertStartsWith(err, 'error: ' + message)

  @parameterized.parameters(
    ('W1', (900, 27, 32), (784, 288, 64), (1, 12544, 128), (1, 128, 10)),
    (
      'W2',
      (1024, 75, 64),
      (256, 1600, 64),
      (1, 4096, 384),
      (1, 384, 192),
      (1, 192, 10),
    ),
    ('W3', (1, 784, 200), (1, 200, 200), (1, 200, 10)),
    (
      'W5',
      (256, 147, 64),
      *4 * [(64, 576, 64)],
      *[(16, 576, 128), (16, 64, 128), *3 * [(16, 1152, 128)]],
      *[(4, 1152, 256), (4, 128, 256), *3 * [(4, 2304, 256)]],
      *[(1, 2304, 512), (1, 256, 512), *3 * [(1, 4608, 512)]],
      (1, 512, 10),
    ),
    (
      'W6',
      (576, 25, 6),
      (64, 150, 16),
      (1, 256, 120),
      (1, 120, 84),
      (1, 84, 10),
    ),
  )
  def test_operations(self, name, *layers):
    """Layers are (pixels, inputs, outputs); images need no gradient."""
    forward = [2 * np.prod(layer) for layer in layers]
    work = workloads.WORKLOADS[name]
    each = 3 * sum(forward) - forward[0]
    found = each * work.cohort * work.num_examples / 1e9
    self.assertAlmostEqual(found / work.gflop, 1, delta=0.01)

  @parameterized.parameters(
    ('small_cnn', (32, 32, 3), 896 + 18_496 + 1_605_760 + 1_290),
    ('fedavg_cnn', (32, 32, 3), 4_864 + 102_464 + 1_573_248 + 73_920 + 1_930),
    ('niid_cnn', (28, 28, 1), 156 + 2_416 + 30_840 + 10_164 + 850),
    ('mlp', (28, 28, 1), 157_000 + 40_200 + 2_010),
  )
  def test_sizes_of_the_models(self, name, image_shape, size):
    workload = workloads.WORKLOADS['W0']._replace(
      model=name, image_shape=image_shape
    )
    variables = jax.eval_shape(
      ours.make_model(workload).init, jax.random.key(0)
    )
    self.assertEqual(sum(a.size for a in jax.tree.leaves(variables)), size)


class ReportTest(absltest.TestCase):
  def test_figures(self):
    rows = [
      {
        'round': t,
        'test_accuracy': a,
        'accuracy': {'average': a / 2},
        'bytes_up': t,
        'bytes_down': 2 * t,
      }
      for t, a in ((2, 0.3), (4, 0.6), (6, 0.55), (14, 0.7))
    ]
    self.assertEqual(statistics.rounds_to(rows, 0.6), 4)
    self.assertIsNone(statistics.rounds_to(rows, 0.8))
    # By hand: two classes lose .5 and .1; the third has no test images.
    by_class = [
      [0.2, 0.9, None],
      [0.7, 0.8, None],
      [0.3, 0.5, None],
      [0.2, 0.8, None],
    ]
    forgot = [
      {**row, 'class_accuracy': values} for row, values in zip(rows, by_class)
    ]
    self.assertEqual(rows_lib.summarise(forgot)['forgetting'], 0.3)
    # The last ten rounds are 5 to 14.
    self.assertEqual(
      rows_lib.summarise(rows),
      {
        'rounds': 14,
        'final_accuracy': 0.625,
        'best_accuracy': 0.7,
        'final_accuracy_of': {'broadcast': 0.625, 'average': 0.3125},
        'bytes_up': 14,
        'bytes_down': 28,
      },
    )
    runs = [{'best_accuracy': 0.71}, {'best_accuracy': 0.64}]
    self.assertEqual(statistics.common_target({'a': runs}), 0.6)
    self.assertEqual(
      statistics.mean_and_std([1.0, 3.0]),
      {'mean': 2.0, 'std': 2**0.5, 'per_seed': [1.0, 3.0]},
    )

  def test_curves_with_bands(self):
    path = os.path.join(self.create_tempdir().full_path, 'c.png')
    plots.curves(
      path,
      {
        'a': [[(1, 3.0, 0.1), (2, 6.0, 0.5)], [(1, 3.0, 0.2), (2, 6.0, 0.4)]],
        'b': [[(1, 3.0, 0.3), (2, 6.0, 0.6)]],
      },
      'accuracy',
    )
    pixels = np.asarray(Image.open(path).convert('RGB'))
    self.assertGreater(len(np.unique(pixels.reshape(-1, 3), axis=0)), 50)


if __name__ == '__main__':
  absltest.main()
