"""Tests of two processes in one folder, and of wrong or harmful data."""

import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import types
import zipfile

from absl.testing import absltest, parameterized
import jax
import numpy as np
from PIL import Image
import pytest
from upath import UPath

from fedftg_jax import federation
from fedftg_jax.configuration import folders
from fedftg_jax.data import clients, datasets, images, partition, prepared
from fedftg_jax.programs import train
from fedftg_jax.system import cli, files, lock
from tests import problems, programs


def in_another_process(code, *args):
  return subprocess.run(
    [sys.executable, '-c', code, *map(str, args)],
    cwd=programs.ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


HOLD = """
import sys
from upath import UPath
from fedftg_jax.system import cli, lock
try:
  with lock.held(UPath(sys.argv[1])):
    print('held')
except cli.UsageError as error:
  print(error)
"""


class LockTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = UPath(self.create_tempdir().full_path) / 'new' / 'run'

  def test_names_its_holder_and_ends(self):
    with lock.held(self.folder):
      with lock.held(self.folder):  # the same process enters again
        pass
      out = in_another_process(HOLD, self.folder).stdout
      self.assertIn(f'in use by another process ({os.getpid()} on ', out)
    self.assertFalse(self.folder.parent.exists())  # nothing was written
    self.assertEqual(in_another_process(HOLD, self.folder).stdout, 'held\n')

  def test_ends_with_its_process(self):
    self.folder.mkdir(parents=True)
    (self.folder / lock.FILE).write_text('1 on a machine that is gone')
    with lock.held(self.folder):
      pass
    self.assertEqual(list(self.folder.iterdir()), [])

  def test_of_a_link_nothing_is_written(self):
    self.folder.mkdir(parents=True)
    (self.folder / lock.FILE).symlink_to(self.folder / 'elsewhere')
    with self.assertRaises(OSError):
      with lock.held(self.folder):
        pass

  @pytest.mark.slow
  def test_second_training_is_refused(self):
    data = programs.write_data(self.create_tempdir().full_path)
    args = [
      *programs.small(data),
      f'--workdir={self.folder}',
      '--method=scaffold',
      '--client_state=disk',
      '--eval_every=20',
    ]
    command = [sys.executable, '-m', 'experiments.train', *args]
    first = subprocess.Popen(
      [*command, '--rounds=50000', '--checkpoint_every=0'],
      cwd=programs.ROOT,
      stdout=subprocess.PIPE,
      text=True,
    )
    try:
      for line in first.stdout:
        if 'round 20/' in line:
          break
      second = subprocess.run(
        command, cwd=programs.ROOT, capture_output=True, text=True, check=False
      )
      self.assertEqual(second.returncode, 2)
      self.assertIn(f'in use by another process ({first.pid} on', second.stderr)
      self.assertIsNone(first.poll())
    finally:
      first.kill()
      first.communicate()
    status, _, err = programs.call(train, *args)  # slots of a killed one go
    self.assertEqual(status, 0, err)
    self.assertEqual(list(self.folder.glob('.*')), [])


class DataTest(parameterized.TestCase):
  def refused(self, right, num_classes=0, **changes):
    folder = self.create_tempdir().full_path
    path = programs.write_data(folder)
    with np.load(path) as file:
      arrays = {**file, **changes}
    np.savez(path, **arrays)
    with self.assertRaisesRegex(ValueError, right):
      datasets.load(f'npz:{path}', num_classes=num_classes)

  @parameterized.parameters(
    (10**6, 'the label 1000000, but the training .* only 4'),
    (10**12, 'the label 1000000000000'),
    (2**32 + 1, 'the label 4294967297'),
    (255, 'set --num_classes'),
    (-1, 'must be at least 0, has -1'),
  )
  def test_label(self, label, right):
    labels = np.arange(60) % 3
    labels[0] = label
    self.refused(right, train_y=labels)

  def test_class_of_the_test_set_alone(self):
    self.refused('the class 7, which is not in', test_y=np.full(30, 7))
    self.refused(
      'must be below --num_classes=5', num_classes=5, test_y=np.full(30, 7)
    )

  def test_num_classes(self):
    path = programs.write_data(self.create_tempdir().full_path)
    with np.load(path) as file:
      np.savez(path, **{**file, 'test_y': np.full(30, 7)})
    loaded = datasets.load(f'npz:{path}', num_classes=9)
    self.assertEqual(loaded.num_classes, 9)

  def test_shapes(self):
    self.refused('channels first', train_x=np.zeros((60, 1, 8, 8), np.uint8))
    self.refused('no pixels', train_x=np.zeros((60, 8, 8, 0), np.uint8))
    self.refused('one integer for each', train_y=np.zeros(59, int))

  def test_bomb(self):
    path = pathlib.Path(self.create_tempdir().full_path, 'bomb.npz')
    np.savez(path, train_x=np.zeros((1, 1), np.uint8))
    head = np.lib.format.header_data_from_array_1_0(np.zeros((1, 1), np.uint8))
    npy = io.BytesIO()
    np.lib.format.write_array_header_1_0(npy, {**head, 'shape': (10**13, 1)})
    with zipfile.ZipFile(path, 'w') as file:
      file.writestr('train_x.npy', npy.getvalue())
    with self.assertRaisesRegex(ValueError, 'not a readable'):
      datasets.load(f'npz:{path}')

  def test_no_postscript(self):
    path = pathlib.Path(self.create_tempdir().full_path, '1.png')
    path.write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n')
    with self.assertRaisesRegex(ValueError, 'not a readable image'):
      images.decode(path)

  def test_image_bomb(self):
    path = pathlib.Path(self.create_tempdir().full_path, '1.png')
    with absltest.mock.patch.object(Image, 'MAX_IMAGE_PIXELS', 30):
      Image.new('L', (8, 8)).save(path)
      with self.assertRaisesRegex(ValueError, '1.png: .*exceeds limit'):
        images.decode(path)

  def test_pipe_among_images(self):
    root = pathlib.Path(self.create_tempdir().full_path)
    for split in ('train', 'test'):
      (root / split / 'a').mkdir(parents=True)
    os.mkfifo(root / 'train' / 'a' / '1.png')
    with self.assertRaisesRegex(ValueError, 'must be a file with an image'):
      datasets.load(f'folder:{root}')

  def test_linked_data_are_in_the_fingerprint(self):
    root = pathlib.Path(self.create_tempdir().full_path)
    for name in ('one', 'other'):
      (root / name / 'a').mkdir(parents=True)
      (root / name / 'a' / '1.png').write_text(name)
    data = root / 'data'
    (data / 'test' / 'a').mkdir(parents=True)
    (data / 'test' / 'a' / 'round').symlink_to(data)  # a link in a circle
    found = set()
    for name in ('one', 'other'):
      (data / 'train').unlink(missing_ok=True)
      (data / 'train').symlink_to(root / name)
      found.add(
        folders.contents({'dataset': f'folder:{data}'})['dataset folder']
      )
    self.assertLen(found, 2)

  def test_features_with_code(self):
    root = pathlib.Path(self.create_tempdir().full_path)
    folder = root / 'nice' / '1.0.0'
    folder.mkdir(parents=True)
    (folder / 'features.json').write_text(
      json.dumps({'type': 'own.codec.Image', 'content': {}})
    )
    with self.assertRaisesRegex(ValueError, 'names own.codec.Image'):
      prepared.check('nice', str(root), None)

  def test_key_that_leads_out_of_a_store(self):
    store = UPath('memory://safety/run')
    store.fs.pipe_file('/safety/run/8/../../../out', b'')
    self.addCleanup(store.fs.store.clear)
    with tempfile.TemporaryDirectory() as here:
      with self.assertRaisesRegex(OSError, 'points outside of'):
        files.download(store, pathlib.Path(here, 'a', 'b'))

  def test_parts_and_labels_from_python(self):
    x, y = np.zeros((4, 2, 2, 1), np.uint8), np.arange(4)
    for parts, labels, right in (
      ([[0, 1], [1, 2]], y, 'more than one client'),
      ([[0, 4]], y, 'rows from 0 to 3'),
      ([[0]], y[:3], 'one integer for each of the 4'),
      ([[0]], y - 1, 'got -1'),
    ):
      with self.assertRaisesRegex(ValueError, right):
        clients.from_partition(x, labels, [np.array(p) for p in parts])

  def test_a_partition_that_leaves_examples_out(self):
    path = f'{self.create_tempdir().full_path}/parts.npz'
    partition.save(path, [np.arange(20)])
    with self.assertRaisesRegex(ValueError, 'gives 20 of the 60'):
      partition.load(path, 60)

  def test_a_state_that_was_donated(self):
    fed = problems.make()
    key = jax.random.key(0)
    state = fed.init(key)
    rows = problems.schedule([[0, 1]])
    federation.run(fed, state, problems.DATA, rows, key)
    with self.assertRaisesRegex(ValueError, 'was given to `run` before'):
      federation.run(fed, state, problems.DATA, rows, key)

  def test_memory_that_does_not_suffice(self):
    def main():
      raise MemoryError('Unable to allocate 730. GiB')

    data = programs.write_data(self.create_tempdir().full_path)
    program = types.SimpleNamespace(main=main)
    status, _, err = programs.call(program, *programs.small(data))
    self.assertEqual(status, 1)
    self.assertRegex(err, r'^error: not enough memory \(Unable.*\n$')

  def test_numbers_that_cannot_be_meant(self):
    data = programs.write_data(self.create_tempdir().full_path)
    for flag, right in (
      ('--dropout_rate=1.0', 'must be below 1'),
      ('--rounds=99999999999999999999', 'must be at most 10000000'),
    ):
      status, _, err = programs.call(train, *programs.small(data), flag)
      self.assertEqual((status, err), (2, f'error: {flag}: {right}\n'))

  def test_behind_two_dashes_nothing_is_a_flag(self):
    argv = ['p', '--rounds=1', '--', '--flagfile=f', '--preset=demo']
    self.assertEqual(cli.with_files(argv), argv)

  def test_a_locale_without_the_letters(self):
    path = pathlib.Path(self.create_tempdir().full_path, 'table.md')
    subprocess.run(
      [
        sys.executable,
        '-c',
        'import sys; from fedftg_jax.system import files; '
        'files.write_text(sys.argv[1], chr(177)); '
        'assert files.read_jsonl(sys.argv[1]) == []',
        str(path),
      ],
      env={**os.environ, 'LC_ALL': 'C', 'PYTHONUTF8': '0'},
      check=True,
    )
    self.assertEqual(path.read_bytes(), '±'.encode())

  def test_home(self):
    home = os.path.expanduser('~')
    argv = [
      'p',
      '--workdir=~/x',
      '--dataset=npz:~/d.npz',
      '--partition=file:~',
      '--method=a~b',
    ]
    self.assertEqual(
      cli.with_files(argv),
      [
        'p',
        f'--workdir={home}/x',
        f'--dataset=npz:{home}/d.npz',
        f'--partition=file:{home}',
        '--method=a~b',
      ],
    )


if __name__ == '__main__':
  absltest.main()
