"""Tests the wheel in an environment of its own, from any folder."""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest
import zipfile

from absl.testing import absltest
import pytest

import fedftg_jax
from fedftg_jax import programs

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
class WheelTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    temporary = tempfile.TemporaryDirectory()
    cls.addClassCleanup(temporary.cleanup)
    cls.folder = pathlib.Path(temporary.name)
    # A copy, because setuptools leaves files next to the sources.
    sources = cls.folder / 'sources'
    tracked = cls.call('git', 'ls-files', '-z', cwd=ROOT).split('\0')
    for name in filter(None, tracked):
      (sources / name).parent.mkdir(parents=True, exist_ok=True)
      if (ROOT / name).is_symlink():
        (sources / name).symlink_to(os.readlink(ROOT / name))
      else:
        (sources / name).write_bytes((ROOT / name).read_bytes())
    pip = 'pip', '--quiet', '--disable-pip-version-check'
    cls.call(
      sys.executable, '-m', *pip, 'wheel', '--no-deps', '-w', '.', sources
    )
    (cls.wheel,) = cls.folder.glob('*.whl')
    cls.call(sys.executable, '-m', 'venv', 'env')
    cls.bin = cls.folder / 'env' / 'bin'
    cls.call(cls.bin / 'python', '-m', *pip, 'install', cls.wheel)

  @classmethod
  def call(cls, *command, cwd=None):
    done = subprocess.run(
      [*map(str, command)],
      cwd=cwd or cls.folder,
      capture_output=True,
      text=True,
      check=False,
      env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'},
    )
    if done.returncode:
      raise AssertionError(f'{command}: {done.stdout}{done.stderr}')
    return done.stdout

  def test_holds_the_package_alone(self):
    names = zipfile.ZipFile(self.wheel).namelist()
    tops = {name.split('/')[0] for name in names}
    self.assertEqual({t for t in tops if '.dist-info' not in t}, {'fedftg_jax'})
    for name in (
      'presets/demo.flags',
      'results/templates/report.html',
      'py.typed',
    ):
      self.assertIn(f'fedftg_jax/{name}', names)

  def test_two_rounds(self):
    self.call(
      self.bin / 'fedftg',
      'train',
      '--model=mlp',
      '--method=fed_avg',
      '--train_examples=200',
      '--num_clients=4',
      '--cohort=2',
      '--rounds=2',
      '--workdir=run',
    )
    summary = json.loads((self.folder / 'run' / 'summary.json').read_text())
    self.assertEqual(summary['rounds'], 2)
    self.assertTrue((self.folder / 'run' / 'report.html').exists())

  def test_help_of_every_program(self):
    self.assertIn('fedftg compare', self.call(self.bin / 'fedftg'))
    for name in programs.NAMES:
      self.assertIn('--', self.call(self.bin / 'fedftg', name, '--help'))

  def test_preset_from_any_folder(self):
    out = self.call(
      self.bin / 'fedftg',
      'compare',
      '--preset=demo',
      '--methods=fed_avg',
      '--model=mlp',
      '--train_examples=200',
      '--rounds=2',
      '--workdir=both',
    )
    self.assertIn('report: both/report.html', out)

  @unittest.skipUnless(hasattr(fedftg_jax, 'simulate'), 'no simulate')
  def test_python_of_the_readme(self):
    (code,) = re.findall(
      r'^```python\n(.*?)^```', (ROOT / 'README.md').read_text(), re.M | re.S
    )
    small = code.replace('rounds=20', 'rounds=2')
    self.assertNotEqual(small, code)
    (self.folder / 'my.py').write_text(small)
    self.call(self.bin / 'python', 'my.py')


if __name__ == '__main__':
  absltest.main()
