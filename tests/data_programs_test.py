"""Tests data sets, partitions, augmentation and validation in the programs."""

import json
import os
import pathlib
import re
import subprocess
import sys
from unittest import mock

from absl.testing import absltest, flagsaver, parameterized
import jax
from matplotlib import figure
import numpy as np
from PIL import Image
import pytest

from fedftg_jax import base, evaluation, federation, stacking, trees
from fedftg_jax.configuration import assembly, flags, folders, resolve
from fedftg_jax.programs import compare, partition, train
from fedftg_jax.results import plots, statistics
from tests.programs import ROOT, call, small, write_data


class ProgramCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.data = write_data(self.folder)
    self.args = [*small(self.data), '--method=fed_avg']

  def run_program(self, program, name, *changes, **settings):
    status, out, err = call(
      program,
      *self.args,
      *changes,
      f'--workdir={self.folder / name}',
      **settings,
    )
    self.assertEqual(status, 0, err)
    return out

  def rows(self, name):
    text = (self.folder / name / 'metrics.jsonl').read_text()
    return [json.loads(line) for line in text.splitlines()]

  def config(self, name):
    return json.loads((self.folder / name / 'config.json').read_text())

  def parts(self, name):
    with np.load(self.folder / name / 'partition.npz') as file:
      return np.split(file['rows'], np.cumsum(file['sizes'])[:-1])

  def with_clients(self, ids):
    with np.load(self.data) as file:
      np.savez(self.folder / 'natural.npz', **file, train_client_id=ids)
    return f'--dataset=npz:{self.folder}/natural.npz'


class TrainTest(ProgramCase):
  @pytest.mark.slow
  def test_augmentation(self):
    self.run_program(train, 'a')
    self.run_program(train, 'b', '--augment=flip_crop')
    self.assertNotIn('augment', self.config('a')['config'])
    self.assertEqual(self.config('b')['config']['augment'], 'flip_crop')
    plain, augmented = (
      [r['train_loss'] for r in self.rows(name)] for name in 'ab'
    )
    self.assertNotEqual(plain, augmented)

  @pytest.mark.slow
  def test_augmentation_of_stacked_clients(self):
    self.run_program(train, 'a', '--augment=flip_crop', '--client_chunk=1')
    self.run_program(train, 'b', '--augment=flip_crop', '--client_chunk=0')
    chunked, stacked = (
      [r['train_loss'] for r in self.rows(name)] for name in 'ab'
    )
    np.testing.assert_allclose(chunked, stacked, rtol=1e-4)

  def test_stacks_as_many_clients_as_fit(self):
    """Their number depends on the memory that the device says it has."""
    changes = '--client_chunk=auto', '--cohort=4', '--method=scaffold'
    out = self.run_program(train, 'a', *changes)
    self.assertIn('--client_chunk=auto: 1\n', out)  # a CPU does not say it
    config = self.config('a')['config']
    self.assertEqual(config['client_chunk'], 'auto')
    built = assembly.build(config)
    fed, data = built.simulation.federation, built.problem.data
    each = federation.bytes_per_client(fed, data)
    state = jax.eval_shape(fed.init, jax.random.key(0))
    model = trees.num_bits(state.variables) / 8
    slots = trees.num_bits(state.clients) / 8
    fixed = trees.num_bits(data) / 8 + slots + 2 * slots + 4 * model
    for limit, want in (
      (fixed + 4.01 * each, 4),
      (fixed + 3.9 * each, 2),  # chunks are equal
      (fixed + 1.1 * each, 1),
      (2.2 * each, 1),
      (0, 1),
    ):
      limit /= federation.SHARE
      with mock.patch.object(stacking, 'memory_limit', lambda: limit):
        self.assertEqual(assembly.build(config).simulation.client_chunk, want)

  def test_errors_of_client_chunk(self):
    for changes, message in (
      (['--client_chunk=x'], 'x: must be an integer of at least 0, or auto'),
      (['--client_chunk=-1'], '-1: must be an integer of at least 0, or auto'),
      (
        ['--client_chunk=auto', '--track=all'],
        'auto: is for one process, without --track',
      ),
    ):
      status, _, err = call(train, *self.args, *changes, '--workdir=')
      self.assertEqual(status, 2)
      self.assertStartsWith(err, 'error: --client_chunk=' + message)
    status, _, err = call(
      compare,
      *self.args[:1],
      '--methods=fed_avg',
      '--client_chunk=auto',
      '--seeds=2',
      '--seeds_at_once=2',
      f'--workdir={self.folder}/c',
    )
    self.assertEqual(status, 2)
    self.assertRegex(err, '--seeds_at_once=2: must be 1 with --client_chunk')

  def test_validation(self):
    changes = '--validation_share=0.2', '--partition_seed=3'
    self.run_program(train, 'a', *changes)
    config = self.config('a')['config']
    self.assertEqual(config['validation_share'], 0.2)
    self.assertEqual(sum(map(len, self.parts('a'))), 48)
    experiment = assembly.build(config)
    data = experiment.problem.dataset
    np.testing.assert_array_equal(np.bincount(data.validation_y), [4, 4, 4])
    self.assertLen(data.train_y, 48)
    # The figures are those of the saved model.
    params = {}
    with np.load(self.folder / 'a' / 'params.npz') as file:
      for name in file.files:
        *path, last = name.split('/')
        place = params
        for step in path:
          place = place.setdefault(step, {})
        place[last] = file[name]
    scores = evaluation.evaluate(
      experiment.simulation.model,
      base.Variables(params['params'], {}),
      data.validation_x,
      data.validation_y,
    )
    last = self.rows('a')[-1]
    for name in ('accuracy', 'loss'):
      self.assertAlmostEqual(
        last[f'validation_{name}'], float(scores[name]), places=5
      )
    # The same examples are held out if the partition is read from its file.
    replay = f'--partition=file:{self.folder}/a/partition.npz'
    self.run_program(train, 'b', *changes, replay)
    self.assertEqual(self.rows('b'), self.rows('a'))
    # Without validation there are no such figures.
    self.run_program(train, 'c')
    self.assertNotIn('validation_accuracy', self.rows('c')[-1])

  @pytest.mark.slow
  def test_clients_keep_tests_of_merged_data(self):
    changes = (
      '--merge_test',
      '--client_test_share=0.25',
      '--partition_seed=3',
      '--evaluate_clients=every',
      '--personalise',
    )
    self.run_program(train, 'a', *changes)
    np.testing.assert_array_equal(
      np.sort(np.concatenate(self.parts('a'))), np.arange(60 + 30)
    )
    with np.load(self.folder / 'a' / 'counts.npz') as counts:
      sizes = {k: counts[k].sum(1) for k in ('train', 'test')}
    held = np.array([*map(len, self.parts('a'))])
    np.testing.assert_array_equal(sizes['test'], -(-held // 4))
    np.testing.assert_array_equal(sizes['train'] + sizes['test'], held)
    # All figures are about the clients' test sets.
    clients = json.loads((self.folder / 'a' / 'clients.json').read_text())
    of_all = np.average(clients['accuracy']['broadcast'], weights=sizes['test'])
    last = self.rows('a')[-1]
    self.assertAlmostEqual(last['test_accuracy'], of_all, places=5)
    for name in ('broadcast', 'personalised'):
      self.assertEqual(clients['test_examples'], sizes['test'].tolist())
      self.assertIn('weighted_mean', last['clients'][name])
    # The written partition includes the tests, as that of `partition` does.
    self.run_program(partition, 'p', *changes)
    for part, drawn in zip(self.parts('a'), self.parts('p')):
      np.testing.assert_array_equal(part, drawn)
    replay = f'--partition=file:{self.folder}/a/partition.npz'
    self.run_program(train, 'b', *changes, replay)
    self.assertEqual(self.rows('b'), self.rows('a'))
    self.assertIn('partition_seed', self.config('b')['config'])

  def test_compare_shows_validation(self):
    self.run_program(
      compare,
      'a',
      '--methods=fed_avg',
      '--seeds=2',
      '--validation_share=0.5',
      '--vary_partition',
    )
    summary = json.loads((self.folder / 'a' / 'summary.json').read_text())
    per_seed = [
      np.mean(
        [r['validation_accuracy'] for r in self.rows(f'a/fed_avg/seed{seed}')]
      )
      for seed in (0, 1)
    ]
    figures = summary['methods']['fed_avg']['final_validation_accuracy']
    np.testing.assert_allclose(figures['per_seed'], per_seed, rtol=1e-5)
    (methods, *_) = (self.folder / 'a' / 'table.md').read_text().split('\n\n')
    header, _, row = methods.splitlines()
    self.assertIn('| on validation data |', header)
    self.assertIn(f'{100 * np.mean(per_seed):.2f} ±', row)

  def test_natural_clients(self):
    ids = np.random.RandomState(0).choice(['ann', 'bob', 'eve'], 60)
    data = self.with_clients(ids)
    self.run_program(train, 'a', data, '--partition=natural')
    self.assertEqual(
      [list(p) for p in self.parts('a')],
      [list(np.flatnonzero(ids == name)) for name in ('ann', 'bob', 'eve')],
    )
    config = self.config('a')['config']
    self.assertNoCommonElements(
      config, ['num_clients', 'partition_seed', 'dirichlet_alpha']
    )
    # All clients remain if examples are taken away before.
    self.run_program(
      train,
      'b',
      data,
      '--partition=natural',
      '--public_data=train:50',
      '--validation_share=.1',
    )
    self.assertLen(self.parts('b'), 3)
    for changes, message in (
      ([data, '--cohort=4'], r'--cohort=4: .*number of clients \(3\), got 4'),
      ([], '--partition=natural: the data do not name the client'),
    ):
      status, _, err = call(
        train,
        *self.args,
        '--partition=natural',
        *changes,
        f'--workdir={self.folder}/c',
      )
      self.assertEqual(status, 2)
      self.assertRegex(err, f'^error: {message}')

  def test_folder_of_images(self):
    with np.load(self.data) as file:
      for split in ('train', 'test'):
        for i, (x, y) in enumerate(zip(file[split + '_x'], file[split + '_y'])):
          place = self.folder / 'images' / split / f'class{y}' / f'{i:03d}.png'
          place.parent.mkdir(parents=True, exist_ok=True)
          Image.fromarray(x[..., 0]).save(place)
    data = f'--dataset=folder:{self.folder}/images'
    self.run_program(train, 'a', data)
    self.assertContainsSubset(['dataset folder'], self.config('a')['contents'])
    status, out, _ = call(train, *self.args, data, f'--workdir={self.folder}/a')
    self.assertEqual(status, 0)
    self.assertIn('already finished', out)
    # A change of one pixel makes other data.
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(place)
    status, _, err = call(train, *self.args, data, f'--workdir={self.folder}/a')
    self.assertEqual(status, 2)
    self.assertIn('holds another configuration (dataset folder: ', err)

  def test_fingerprint_of_a_folder(self):
    """It depends on names, bytes, and where one file ends and the next
    begins."""
    found = []
    for i, content in enumerate(
      (
        {'a': 'xy', 'b': 'z'},
        {'a': 'x', 'b': 'yz'},
        {'a': 'xy', 'c': 'z'},
        {'b': 'z', 'a': 'xy'},
      )
    ):
      for name, text in content.items():
        (self.folder / str(i) / 'test' / 'sub').mkdir(
          parents=True, exist_ok=True
        )
        path = self.folder / str(i) / 'train' / 'sub' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
      found.append(
        folders.contents({'dataset': f'folder:{self.folder / str(i)}'})[
          'dataset folder'
        ]
      )
    self.assertLen(set(found[:3]), 3)
    self.assertEqual(found[0], found[3])

  @parameterized.parameters(
    ('dirichlet', 'dirichlet_alpha size_sigma num_clients partition_seed'),
    (
      'dirichlet_class',
      'dirichlet_alpha min_size niid_bench num_clients partition_seed',
    ),
    ('iid', 'size_sigma num_clients partition_seed'),
    ('quantity', 'size_sigma size_power min_size num_clients partition_seed'),
    ('shards', 'shards_per_client num_clients partition_seed'),
    ('classes', 'classes_per_client niid_bench num_clients partition_seed'),
    ('natural', ''),
  )
  def test_a_flag_that_does_nothing_is_no_part_of_the_run(self, kind, used):
    with flagsaver.flagsaver():
      config = resolve.config(partition=kind, size_power=1.0)
    about = {'num_clients', 'partition_seed'} | {
      flag for _, options in flags.PARTITIONS.values() for flag in options
    }
    self.assertEqual(about & config.keys(), set(used.split()))
    self.assertNoCommonElements(
      config, ['validation_share', 'augment', 'manual_dir', 'data_dir']
    )

  def test_unit_pixels(self):
    for unit in (False, True):
      with flagsaver.flagsaver():
        config = resolve.config(dataset='synthetic', unit_pixels=unit)
      loaded = assembly.load(config, None, None)
      dataset, _, _ = assembly.share_out(config, loaded)
      self.assertEqual((dataset.mean[0], dataset.std[0]) == (0, 1), unit)

  def test_changed_files_are_read_again(self):
    with flagsaver.flagsaver():
      path = write_data(self.create_tempdir().full_path)
      config = resolve.config(dataset=f'npz:{path}')
    first = assembly.load(config, None, None)
    self.assertIs(assembly.load(config, None, None), first)
    with np.load(path) as arrays:
      np.savez(path, **{**arrays, 'train_x': 255 - arrays['train_x']})
    again = assembly.load(config, None, None)
    np.testing.assert_array_equal(again.train_x, 255 - first.train_x)


class PartitionTest(ProgramCase):
  def test_files_and_replay(self):
    out = self.run_program(
      partition, 'p', '--size_sigma=1', '--partition_seed=2', draw=True
    )
    self.assertCountEqual(
      [p.name for p in (self.folder / 'p').iterdir()],
      ['config.json', 'heatmap.png', 'measures.json', 'partition.npz'],
    )
    self.assertEqual(
      self.config('p')['config'],
      {
        'program': 'partition',
        'dataset': f'npz:{self.data}',
        'public_data': '',
        'partition': 'dirichlet',
        'dirichlet_alpha': 1.0,
        'size_sigma': 1.0,
        'num_clients': 4,
        'partition_seed': 2,
      },
    )
    measures = json.loads((self.folder / 'p' / 'measures.json').read_text())
    sizes = [*map(len, self.parts('p'))]
    self.assertEqual(measures['size_max'], max(sizes))
    self.assertEqual(measures['num_examples'], 60)
    self.assertIn(f'size max               │ {max(sizes)}', out)
    self.assertGreater(
      Image.open(self.folder / 'p' / 'heatmap.png').size[0], 300
    )
    # The partition is the one that training would draw, and it is accepted.
    self.run_program(train, 'a', '--size_sigma=1', '--partition_seed=2')
    self.run_program(
      train, 'b', f'--partition=file:{self.folder}/p/partition.npz'
    )
    self.assertEqual(self.rows('a'), self.rows('b'))
    # Drawn again, the bytes are the same; another partition is refused.
    before = (self.folder / 'p' / 'partition.npz').read_bytes()
    self.run_program(partition, 'p', '--size_sigma=1', '--partition_seed=2')
    self.assertEqual((self.folder / 'p' / 'partition.npz').read_bytes(), before)
    for program, changes, message in (
      (partition, [], 'another configuration .partition_seed: 2, not 0'),
      (train, [], 'holds a partition; choose another folder'),
    ):
      status, _, err = call(
        program, *self.args, *changes, f'--workdir={self.folder}/p'
      )
      self.assertEqual(status, 2)
      self.assertRegex(err, message)

  @parameterized.parameters(
    'iid',
    'dirichlet',
    'dirichlet_class',
    'shards',
    'classes',
    'quantity',
    'natural',
  )
  def test_all(self, kind):
    data = self.with_clients(np.arange(60) % 4)
    out = self.run_program(
      partition,
      'p',
      data,
      f'--partition={kind}',
      '--size_power=1',
      '--cohort=99',
    )  # no matter here
    self.assertIn(kind, out)
    np.testing.assert_array_equal(
      np.sort(np.concatenate(self.parts('p'))), np.arange(60)
    )
    self.assertLen(self.parts('p'), 4)

  def test_measures_are_of_what_clients_get(self):
    """Public and validation examples are not included."""
    self.run_program(
      partition,
      'p',
      '--validation_share=0.2',
      '--public_data=train:8',
      '--partition=iid',
    )
    measures = json.loads((self.folder / 'p' / 'measures.json').read_text())
    self.assertEqual(measures['num_examples'], 40)

  @parameterized.parameters((7, 3), (40, 25), (41, 2), (2000, 100))
  def test_heatmap(self, num_clients, num_classes):
    counts = np.random.RandomState(0).poisson(1, (num_clients, num_classes))
    counts[0] = 0
    path = self.folder / 'h.png'
    plots.heatmap(path, counts)
    picture = Image.open(path)
    self.assertGreater(picture.size[0], min(num_clients, 300))
    self.assertGreater(len(np.unique(np.asarray(picture.convert('L')))), 4)

  def test_heatmap_of_very_many_clients(self):
    """Drawn as means of groups, on a scale of clients."""
    counts = np.random.RandomState(0).poisson(1, (2500, 3))
    with absltest.mock.patch.object(
      figure.Figure, 'savefig', autospec=True
    ) as save:
      plots.heatmap('', counts)
    (drawn,) = save.call_args.args[0].axes[0].images
    groups = np.ma.filled(drawn.get_array(), 0)
    self.assertEqual(groups.shape, (500, 3))
    np.testing.assert_allclose(groups.mean(0), counts.mean(0))
    self.assertEqual(drawn.get_extent(), [-0.5, 2.5, 2499.5, -0.5])


class SyntheticTest(ProgramCase):
  def test_clients_of_their_own(self):
    out = self.run_program(
      train,
      'a',
      '--dataset=synthetic:clients=30',
      '--partition=natural',
      '--evaluate_clients=every',
      '--evaluated_clients=5',
    )
    self.assertIn('5 of 30 clients are evaluated', out)
    self.assertLen(self.parts('a'), 30)
    self.assertEqual(self.rows('a')[-1]['clients']['broadcast']['clients'], 5)

  @pytest.mark.slow
  def test_measurements_of_large_federations(self):
    """The script's figures, of small ones."""
    command = [sys.executable, '-m', 'experiments.large', '--clients=300,400']
    sizes = ['--rounds=20', '--cohort=9', f'--workdir={self.folder}/large']
    subprocess.run([*command, *sizes], cwd=ROOT, check=True)
    found = json.loads((self.folder / 'large/large.json').read_text())
    self.assertLen(found, 4)
    row = found['400 scaffold 20 9']
    self.assertBetween(row['examples'], 400 * 10, 400 * 30)
    # What 400 clients of a model with 650 parameters keep.
    self.assertAlmostEqual(row['slots_apparent_bytes'], 400 * 2600, delta=1e3)
    self.assertBetween(
      row['checkpoint_bytes'], 1e4, row['slots_apparent_bytes']
    )
    self.assertGreater(row['peak_memory_bytes'], 1e8)
    self.assertIn(
      '| 400 | `scaffold` |', (self.folder / 'large/table.md').read_text()
    )

  @pytest.mark.slow
  def test_measurements_of_partitions(self):
    command = [sys.executable, '-m', 'experiments.large', '--partitions']
    command += ['--clients=40', f'--workdir={self.folder}/large']
    subprocess.run(command, cwd=ROOT, check=True)
    text = (self.folder / 'large/partitions.md').read_text()
    head, _, *rows = text.splitlines()
    self.assertEqual(head, '| partition | 40 clients, s | peak memory, GB |')
    self.assertLen(rows, 11)
    for row in rows:
      self.assertRegex(row, r'^\| `[a-z_]+`.* \| [\d.e-]+ \| 0\.\d \|$')

  @pytest.mark.slow
  def test_what_a_server_could_distil(self):
    """The script's table and picture, of a small federation."""
    command = [sys.executable, '-m', 'experiments.teachers', '--seeds=1']
    command += [f'--dataset=npz:{self.data}', '--rounds=10', '--bases=fed_avg']
    command += ['--model=softmax']
    folder = self.folder / 'teachers'
    subprocess.run([*command, f'--workdir={folder}'], cwd=ROOT, check=True)
    _, _, early, row = (folder / 'teachers.md').read_text().strip().split('\n')
    self.assertStartsWith(early, '| fed_avg | 3 to 5 |')
    name, rounds, *accuracies = (x.strip() for x in row.strip('| ').split('|'))
    self.assertEqual((name, rounds), ('fed_avg', '8 to 10'))
    values = [json.loads(x) for x in accuracies]
    self.assertLen(values, 9)
    self.assertBetween(min(values), 20, 100)
    self.assertEqual(Image.open(folder / 'teachers.png').format, 'PNG')

  @pytest.mark.slow
  def test_a_student_is_broadcast(self):
    """Clients get the student, and it is held to the first, by seed."""
    command = [sys.executable, '-m', 'experiments.teachers', '--seeds=2']
    command += [f'--dataset=npz:{self.data}', '--rounds=5', '--bases=fed_avg']
    command += ['--model=softmax', '--broadcast=mean,true,labels']
    folder = self.folder / 'teachers'
    subprocess.run([*command, f'--workdir={folder}'], cwd=ROOT, check=True)
    finals = {'mean': [], 'true': [], 'labels': []}
    for kind, found in finals.items():
      name = 'fed_avg' if kind == 'mean' else f'fed_avg,_{kind}_student'
      for seed in range(2):
        text = (folder / name / f'seed{seed}/metrics.jsonl').read_text()
        last = json.loads(text.splitlines()[-1])
        found.append(100 * last['test_accuracy'])
        if kind != 'mean':
          self.assertEqual(
            last['same_models'].get(f'student_{kind}'), 'broadcast'
          )
        self.assertNotIn('student_uniform', last['same_models'])
    rows = [
      [cell.strip() for cell in row.strip('| ').split(' | ')]
      for row in (folder / 'broadcast.md').read_text().splitlines()[2:]
    ]
    self.assertEqual(
      [row[:3] for row in rows], [['fed_avg', '4 to 5', k] for k in finals]
    )
    self.assertEqual(rows[0][4], '')
    for row, found in zip(rows, finals.values()):
      self.assertEqual(row[3], f'{np.mean(found):.2f}')
    for row, kind in zip(rows[1:], ('true', 'labels')):
      gains = np.subtract(finals[kind], finals['mean'])
      self.assertEqual(row[4], statistics.with_interval(gains))

  @parameterized.parameters(
    ('teachers', '--dataset=npz:no', '--dataset=npz:no: no such file'),
    ('teachers', '--rounds=7', '--rounds=7: must be a multiple of 5'),
    (
      'teachers',
      '--broadcast=mean,tru',
      '--broadcast=mean,tru: must be some of mean, uniform, predicted, true',
    ),
    ('teachers', '--bases=fed_avgg', "--bases=fed_avgg: no method 'fed_avgg'"),
    (
      'large',
      '--cohorts=3',
      '--cohorts=3: no such flag; did you mean --cohort',
    ),
  )
  def test_script_refuses_a_wrong_value(self, script, argument, message):
    """A script ends with a line and status 2, as a program does."""
    command = [sys.executable, '-m', f'experiments.{script}', argument]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    self.assertEqual(ended.returncode, 2)
    self.assertStartsWith(ended.stderr, f'error: {message}')
    self.assertEqual(ended.stderr.count('\n'), 1)

  def test_help_of_a_script(self):
    """It lists each flag of the script once, and none of the package."""
    command = [sys.executable, '-m', 'experiments.large', '--help']
    text = subprocess.run(
      command, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    self.assertStartsWith(text, 'Measures federations of many clients')
    self.assertEqual(
      re.findall(r'^  --(?:\[no\])?(\w+)', text, re.M),
      ['clients', 'rounds', 'cohort', 'workdir', 'partitions'],
    )


class ErrorsTest(ProgramCase):
  @parameterized.parameters(
    (
      '--partition=sorted',
      '--partition=sorted: must be one of dirichlet, '
      'dirichlet_class, iid, quantity, shards, classes, natural, file:PATH',
    ),
    ('--partition=quantity', '--partition=quantity: needs --size_sigma or'),
    ('--merge_test=x', '--merge_test=x: must be true or false'),
    ('--validation_share=1', '--validation_share=1.0: must be below 1'),
    ('--validation_share=-1', '--validation_share=-1: must be'),
    ('--client_test_share=1', '--client_test_share=1.0: must be below 1'),
    ('--merge_test', '--merge_test=True: needs a --client_test_share above 0'),
    (
      '--merge_test --client_test_share=.1 --partition=natural',
      '--merge_test=True: must be false with --partition=natural',
    ),
    ('--augment=mixup', '--augment=mixup: .*none.flip_crop'),
    ('--manual_dir=/dev/null', '--manual_dir=/dev/null: must be a folder'),
    ('--shards_per_client=0', '--shards_per_client=0: must be a positive'),
    ('--dataset=cifar10', '--dataset=cifar10: no data_batch_1.bin, .*manual'),
    ('--dataset=svhn_cropped', '--dataset=svhn_cropped: is not prepared in '),
    ('--dataset=cifar', '--dataset=cifar: must be one of mnist5k, '),
    (
      '--dataset=folder:/no/where',
      '--dataset=folder:/no/where: no such folder',
    ),
  )
  def test_before_anything_is_read(self, argument, message):
    with absltest.mock.patch.object(
      assembly, 'load', side_effect=AssertionError
    ):
      for program in (train, partition):
        status, _, err = call(
          program, f'--data_dir={self.folder}', *argument.split()
        )
        self.assertEqual(status, 2)
        self.assertRegex(err, '^error: ' + message)
        self.assertEqual(err.count('\n'), 1)

  @parameterized.parameters(
    (
      ['--partition=classes', '--classes_per_client=4'],
      '--partition=classes: classes_per_client must be between 1 and the ',
    ),
    (
      ['--partition=shards', '--shards_per_client=16'],
      '--partition=shards: shards_per_client must be at least 1, and at most ',
    ),
    (
      ['--partition=dirichlet_class', '--min_size=16'],
      '--partition=dirichlet_class: min_size must be between 0 and 15',
    ),
    (
      ['--partition=shards', '--num_clients=61'],
      '--num_clients=61: num_clients must be between 1 and',
    ),
    (
      ['--validation_share=0.001'],
      '--validation_share=0.001: share must leave',
    ),
    (  # only the method knows this bound; its option is named as a flag
      ['--method=fed_dm', '--dm_ipc=0'],
      '--dm_ipc=0: must be at least 1, got 0',
    ),
  )
  def test_what_the_data_or_the_method_do_not_allow(self, changes, message):
    status, _, err = call(
      train, *self.args, *changes, f'--workdir={self.folder}/a'
    )
    self.assertEqual(status, 2)
    self.assertRegex(err, '^error: ' + message)
    self.assertEqual(err.count('\n'), 1)
    self.assertFalse(os.path.exists(self.folder / 'a'))


if __name__ == '__main__':
  absltest.main()
