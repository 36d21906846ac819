"""Tests of --help: groups, one line per flag, methods, everything."""

import contextlib
import importlib
import io
import re

from absl import flags as absl_flags
from absl.testing import absltest, parameterized

from fedftg_jax import programs, recipes
from fedftg_jax.configuration import flags, resolve
from fedftg_jax.programs import benchmark, compare, partition, train
from fedftg_jax.system import cli
from fedftg_jax.system import help as help_


def call(program, *args):
  """Returns status, stdout and stderr of a program that is asked for help."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    try:
      cli.parse(['program', *args], program)
    except SystemExit as stop:
      return stop.code, out.getvalue(), err.getvalue()
  raise AssertionError('it did not end')


def flags_in(text):
  return re.findall(r'^  --(?:\[no\])?(\w+)', text, re.M)


class HelpTest(parameterized.TestCase):
  @parameterized.parameters(*programs.NAMES)
  def test_fits_a_screen(self, name):
    program = importlib.import_module(f'fedftg_jax.programs.{name}')
    status, text, err = call(program, '--help')
    self.assertEqual((status, err), (0, ''))
    lines = text.splitlines()
    self.assertLess(len(lines), 80)
    self.assertLessEqual(max(map(len, lines)), 80)
    self.assertIn(f'  fedftg {name} ', text)
    self.assertIn('--helpfull', text)

  def test_groups_in_order(self):
    _, text, _ = call(train, '--rounds=3', '-h')
    titles = re.findall(r'^(\w+):$', text, re.M)
    self.assertEqual(titles, list(help_.COMMON))
    self.assertIn('\n  --rounds=30  ', text)
    self.assertRegex(text, r'  Methods: ditto,[^.]* fed_ftg, ')

  def test_common_flags_are_there_and_described_in_a_line(self):
    _, text, _ = call(compare, '--help')
    for name in [name for names in help_.COMMON.values() for name in names]:
      self.assertIn(name, absl_flags.FLAGS)
      (line,) = re.findall(rf'^  --(?:\[no\])?{name}\b.*', text, re.M)
      self.assertGreater(len(line), 31, name)
      if absl_flags.FLAGS.find_module_defining_flag(name) == flags.__name__:
        self.assertTrue(line.endswith(('.', '.)')), line)
        self.assertNotIn('...', line)

  def test_own_flags_first_and_groups_of_a_program(self):
    _, text, _ = call(benchmark, '--help')
    self.assertNotIn('--dataset', text)
    self.assertIn('workloads', flags_in(text))
    _, text, _ = call(partition, '--help')
    self.assertEqual(
      flags_in(text), [*help_.COMMON['Data'], *help_.COMMON['Partition']]
    )

  def test_methods(self):
    for name, recipe in recipes.RECIPES.items():
      status, text, _ = call(train, f'--help={name}')
      self.assertEqual(status, 0)
      self.assertStartsWith(text, f'{name}: ')
      self.assertContainsSubset(flags.of_method(name), flags_in(text))
      self.assertEqual(recipe.generates, 'noise_dim' in flags_in(text))
    _, text, _ = call(train, '--help=fed_nova')
    self.assertIn('server_optimizer', flags_in(text))
    _, text, _ = call(train, '--help=scaffold+fed_ftg')
    self.assertIn('scaffold_option', flags_in(text))
    self.assertIn('ftg_student_bn', flags_in(text))
    _, text, _ = call(train, '--help=fed_mr')
    self.assertIn('It requires --schedule=exact: ', ' '.join(text.split()))

  def test_groups(self):
    _, text, _ = call(train, '--help=privacy')
    self.assertEqual(
      flags_in(text),
      ['dp_clip', 'dp_noise', 'dp_delta', 'dp_quantile', 'secure_aggregation'],
    )

  @parameterized.parameters(
    ('fed_fgt', '; did you mean --help=fed_ftg?'),
    ('privcy', '; did you mean --help=privacy?'),
    ('xyzzy', ''),
    ('', ''),
  )
  def test_unknown(self, name, hint):
    status, out, err = call(train, f'--help={name}')
    self.assertEqual((status, out), (2, ''))
    want = f'error: --help={name}: no such method or group{hint}\n'
    self.assertEqual(err, want)

  def test_everything(self):
    status, text, _ = call(train, '--helpfull')
    self.assertEqual(status, 0)
    self.assertStartsWith(text, train.__doc__)
    shown = flags_in(text)
    self.assertLen(set(shown), len(shown))  # each once
    self.assertContainsSubset([f.name for f in resolve._ours()], shown)
    for name in 'preset', 'compile_cache', 'verbosity':
      self.assertIn(name, shown)
    self.assertNotIn('workloads', shown)  # another program's


if __name__ == '__main__':
  absltest.main()
