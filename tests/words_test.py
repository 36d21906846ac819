"""Tests how docstrings begin: with a verb, on one line, with a period."""

import ast
import pathlib
import re

from absl.testing import absltest, parameterized

ROOT = pathlib.Path(__file__).parents[1] / 'fedftg_jax'
# A first line that begins with one of these words describes nothing.
RIDDLES = re.compile(r'(What|Who|Whose|Where|How|If|As|So|Of|But|Which)\b')
VERB = re.compile(r'[A-Z][a-z]+s\b')  # Returns, Builds, Computes


def documented(path):
  """Yields (name, node, docstring) of a module and what it defines."""
  tree = ast.parse(path.read_text())
  for node in ast.walk(tree):
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
      text = ast.get_docstring(node)
      if text is not None:
        yield getattr(node, 'name', path.name), node, text


def is_property(node):
  return any('property' in ast.unparse(d) for d in node.decorator_list)


class FirstLineTest(parameterized.TestCase):
  @parameterized.parameters(
    *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.rglob('*.py'))
  )
  def test_first_line(self, name):
    for what, node, text in documented(ROOT / name):
      first, _, rest = text.partition('\n')
      with self.subTest(what):
        self.assertEndsWith(first, '.', 'ends with a period, on one line')
        self.assertNotRegex(first, Rf'^{RIDDLES.pattern}')
        self.assertTrue(not rest or rest.startswith('\n'), 'then a blank line')
        if isinstance(node, ast.FunctionDef) and not is_property(node):
          self.assertRegex(first, Rf'^{VERB.pattern}', 'begins with a verb')


if __name__ == '__main__':
  absltest.main()
