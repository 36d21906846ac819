"""Tests that every preset is valid and documents command, time and score."""

import contextlib
import importlib
import pathlib
import re
import struct
import tempfile

from absl import flags as absl_flags
from absl.testing import absltest, flagsaver, parameterized
import numpy as np
import pytest

from fedftg_jax.configuration import assembly, resolve
from fedftg_jax.programs import (
  compare,
  compression,
  influence,  # noqa: F401, its flags
  sweep,
)
from fedftg_jax.system import cli
from tests import programs

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / 'experiments' / 'presets'
PROGRAMS = 'train', 'compare', 'sweep', 'compression', 'influence'
NAMES = sorted(path.stem for path in FOLDER.glob('*.flags'))
# What the table of a program has, if not accuracies alone.
COLUMNS = {'influence': 'loss: Pearson', 'compression': 'distortion'}


def write_cifar(folder, files, num_labels, num):
  """Writes files of CIFAR's binary version, with random images."""
  folder.mkdir(parents=True)
  for name in files:
    records = (
      np.random.RandomState(0)
      .randint(256, size=(num, num_labels + 3072))
      .astype(np.uint8)
    )
    records[:, :num_labels] = (np.arange(num) % 10)[:, None]
    records.tofile(folder / name)


def write_idx(folder, prefix, num):
  """Writes files of the MNIST family, with black images."""
  folder.mkdir(exist_ok=True)
  for kind, values in (
    ('images-idx3', np.zeros((num, 28, 28), np.uint8)),
    ('labels-idx1', (np.arange(num) % 10).astype(np.uint8)),
  ):
    head = struct.pack(
      f'>BBBB{values.ndim}I', 0, 0, 8, values.ndim, *values.shape
    )
    (folder / f'{prefix}-{kind}-ubyte').write_bytes(head + values.tobytes())


@contextlib.contextmanager
def parsed(name, *more):
  """Sets the flags to a preset's, and `more`, in the context.

  Yields:
    The program that the preset's first line calls.
  """
  command = re.match(
    rf'# \.venv/bin/python -m experiments\.({"|".join(PROGRAMS)}) '
    rf'--flagfile=experiments/presets/{name}\.flags\n',
    (FOLDER / f'{name}.flags').read_text(),
  )
  assert command, 'the first line must be the command'
  with flagsaver.flagsaver(), contextlib.chdir(ROOT):
    cli.parse(
      ['program', f'--flagfile=experiments/presets/{name}.flags', *more]
    )
    yield command[1]


def configurations(program):
  """Returns the configurations of the parsed flags, by name."""
  if program == 'compare':
    return compare.parse_methods(absl_flags.FLAGS.methods)
  if program == 'sweep':
    return {
      name: entry.config
      for name, entry in sweep.parse(
        absl_flags.FLAGS.grid, absl_flags.FLAGS.list
      ).items()
    }
  if program == 'compression':
    FLAGS = absl_flags.FLAGS
    entries = compression.parse(
      FLAGS.bases, FLAGS.codecs, FLAGS.lattices, FLAGS.rates
    )
    return {name: config for name, (_, _, config) in entries.items()}
  return {'': resolve.config()}


class PresetsTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    absl_flags.FLAGS.mark_as_parsed()
    temporary = tempfile.TemporaryDirectory()
    cls.addClassCleanup(temporary.cleanup)
    cls.folder = pathlib.Path(temporary.name)
    originals = cls.folder / 'originals'
    write_cifar(
      originals / 'cifar-10-batches-bin',
      [*(f'data_batch_{i}.bin' for i in range(1, 6)), 'test_batch.bin'],
      1,
      1000,
    )
    write_cifar(
      originals / 'cifar-100-binary', ['train.bin', 'test.bin'], 2, 300
    )
    for prefix in ('train', 't10k'):
      write_idx(originals / 'fashion_mnist', prefix, 500)
    for name, prefix, num in (
      ('mnist', 'train', 15_000),
      ('mnist', 't10k', 100),
      ('emnist', 'emnist-balanced-train', 10_000),
      ('emnist', 'emnist-balanced-test', 100),
    ):
      write_idx(originals / name, prefix, num)

  def parsed(self, name):
    """Calls `parsed` with the folders of the small data."""
    return parsed(
      name,
      f'--manual_dir={self.folder}/originals',
      f'--data_dir={self.folder}/data',
    )

  @parameterized.parameters(*(n for n in NAMES if not n.startswith('mnist5k')))
  def test_is_valid(self, name):
    self.check(name)

  @parameterized.parameters(*(n for n in NAMES if n.startswith('mnist5k')))
  @pytest.mark.slow  # below `parameters`: applies to all cases
  def test_of_mnist5k_is_valid(self, name):
    self.check(name)

  def check(self, name):
    with self.parsed(name) as program:
      self.assertTrue(absl_flags.FLAGS.workdir.startswith('runs/'))
      configs = configurations(program)
    first = next(iter(configs.values()))
    # A large federation is built with few clients.
    dataset = re.sub(r'clients=\d+', 'clients=1000', first['dataset'])
    first = first.replace(dataset=dataset)
    # Outside of the context, whose end would forget the flags of modules that
    # are imported here.
    built = assembly.build(
      first, f'{self.folder}/data', f'{self.folder}/originals'
    )
    if dataset.startswith('synthetic:'):
      self.assertLen(built.problem.parts, 1000)
    else:
      self.assertLen(built.problem.parts, first['num_clients'])
    self.assertLen(built.problem.schedule.client_id, first['rounds'])

  @parameterized.named_parameters(
    ('fed_ftg', 'cifar10_table', '--list=partition=iid', '--norm=none'),
    ('fed_gen', 'mnist_fed_gen', '--model=fedgen_cnn'),
    ('fed_ntd', 'cifar10_fed_ntd'),
    ('fed_dm', 'cifar10_fed_dm', '--dm_iterations=2', '--dm_server_epochs=1'),
    ('fed_mr', 'cifar10_fed_mr', '--norm=none'),
    ('fed_align', 'cifar100_fed_align', '--model=resnet20'),
    ('p_fed_bred', 'fashion_mnist_p_fed_bred'),
    ('fed_influence', 'emnist_fed_influence', '--curvatures=exact'),
    ('uveqfed', 'cifar10_uveqfed', '--codecs=uveqfed', '--lattices=d4'),
    ('niid_bench', 'niid_bench'),
  )
  @pytest.mark.slow  # below the parameters: applies to all cases
  def test_ends_with_a_table(self, name, *flags):
    """Trains a preset to its end in miniature, mostly with another model.

    Of lists only the first and the last value are trained.
    """
    with self.parsed(name) as program:
      pass
    preset = self.folder / f'{name}.flags'
    preset.write_text(
      re.sub(
        r'^(--(?:grid=\w+|methods|list)=[^,\n]*),.*?([^,\n]*)$',
        r'\1,\2',
        (FOLDER / f'{name}.flags').read_text(),
        flags=re.M,
      )
    )
    workdir = self.folder / f'{name}_run'
    small = {
      'train_examples': 300,
      'num_clients': 10,
      'cohort': 2,
      'rounds': 1,
      'eval_every': 1,
      'local_epochs': 1,
      'batch_size': 10,
      'model': 'softmax',
    }
    if program != 'influence':
      small['seeds'] = 1
    status, _, err = programs.call(
      importlib.import_module(f'fedftg_jax.programs.{program}'),
      f'--flagfile={preset}',
      f'--manual_dir={self.folder}/originals',
      f'--data_dir={self.folder}/data',
      f'--workdir={workdir}',
      *(f'--{flag}={value}' for flag, value in small.items()),
      *flags,
    )
    self.assertEqual(status, 0, err[-3000:])
    header, _, *table = (workdir / 'table.md').read_text().splitlines()
    self.assertIn(COLUMNS.get(program, 'final accuracy'), header)
    for methods in re.findall(
      r'^--(?:grid=method|methods)=(.*)', preset.read_text(), re.M
    ):
      for method in methods.split(','):
        self.assertRegex('\n'.join(table), rf'\| {re.escape(method)} \|')
    self.assertNotEmpty(table)
    self.assertNotIn('diverged', '\n'.join(table))

  @parameterized.parameters(*NAMES)
  def test_says_what_was_measured(self, name):
    text = (FOLDER / f'{name}.flags').read_text()
    for what in ('Time', 'Score'):
      (line,) = re.findall(rf'^# {what}: (.*)', text, re.M)
      self.assertRegex(line, r'^not measured\.$|\d')

  def test_folders_are_their_own(self):
    folders = []
    for name in NAMES:
      with self.parsed(name):
        folders.append(absl_flags.FLAGS.workdir)
    self.assertLen(set(folders), len(NAMES))

  def test_the_official_setting(self):
    """The numbers are from the official code's scripts."""
    with self.parsed('cifar100'):
      config = resolve.config()
    self.assertContainsSubset(
      {
        'num_clients': 100,
        'cohort': 10,
        'rounds': 1000,
        'local_epochs': 5,
        'batch_size': 50,
        'learning_rate': 0.1,
        'lr_decay': 0.998,
        'weight_decay': 1e-3,
        'clip_norm': 10.0,
        'ftg_batch_size': 50,
        'ftg_iterations': 10,
        'ftg_generator_steps': 1,
        'ftg_student_steps': 5,
        'ftg_student_lr': 0.1,
        'ftg_generator_lr': 0.01,
        'noise_dim': 256,
        'generator_width': 64,
        'batch_norm': 'aggregate',
        'torch_bn': True,
        'augment': 'flip_crop',
        'schedule': 'bernoulli',
      }.items(),
      config.items(),
    )
    with self.parsed('cifar10_table'):
      names = configurations('sweep')
    self.assertLen(names, 3 * 11)
    self.assertEqual(
      names['partition=iid,method=fed_dyn+fed_ftg']['partition'], 'iid'
    )
    self.assertTrue(
      names['dirichlet_alpha=0.6,method=scaffold']['scaffold_lr0']
    )
    with self.parsed('cifar10_ablations'):
      self.assertLen(configurations('compare'), 7)


if __name__ == '__main__':
  absltest.main()
