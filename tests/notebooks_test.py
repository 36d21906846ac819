"""Tests that the notebooks run from the first cell to the last, and are
clean."""

import pathlib
import shutil
import subprocess

from absl.testing import absltest, parameterized
import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = ROOT / 'experiments' / 'colab'
NAMES = 'quick_start', 'your_own_method', 'all_methods'
TINY = {
  'CLIENTS': 4,
  'COHORT': 2,
  'ROUNDS': 2,
  'LOCAL_EPOCHS': 1,
  'GENERATOR_WIDTH': 2,
  'EVALUATE_EVERY': 1,
}

# Run in the kernel, it hides the installed package (`make` installs it
# editably).
HIDDEN = """import sys
sys.meta_path[:] = [
  finder for finder in sys.meta_path
  if not getattr(finder, '__module__', '').startswith('__editable__')]
"""


def read(name):
  return nbformat.read(
    NOTEBOOKS / f'{name}.ipynb', as_version=nbformat.NO_CONVERT
  )


def with_settings(notebook, **values):
  """Adds a cell after that of the settings, which replaces them."""
  place, cell = next(
    (i, cell)
    for i, cell in enumerate(notebook.cells)
    if 'parameters' in cell.metadata.get('tags', [])
  )
  for name in values:
    assert f'\n{name} = ' in '\n' + cell.source, name
  notebook.cells.insert(
    place + 1,
    nbformat.v4.new_code_cell(
      '\n'.join(f'{name} = {value!r}' for name, value in values.items())
    ),
  )
  return notebook


def said(notebook):
  """Returns what the cells print, and how many pictures they show."""
  outputs = [o for cell in notebook.cells for o in cell.get('outputs', [])]
  text = ''.join(
    o.text
    if o.output_type == 'stream'
    else o.get('data', {}).get('text/plain', '') + '\n'
    for o in outputs
  )
  return text, sum('image/png' in o.get('data', {}) for o in outputs)


class NotebooksTest(parameterized.TestCase):
  def test_all_are_known(self):
    self.assertCountEqual([p.stem for p in NOTEBOOKS.glob('*.ipynb')], NAMES)

  @parameterized.parameters(*NAMES)
  def test_clean(self, name):
    notebook = read(name)
    nbformat.validate(notebook)
    self.assertEqual((notebook.nbformat, notebook.nbformat_minor), (4, 5))
    for cell in notebook.cells:
      self.assertEmpty(cell.get('outputs', []))
      self.assertIsNone(cell.get('execution_count'))
      for line in cell.source.split('\n'):
        self.assertLessEqual(len(line), 88, line)
    with self.subTest('nothing of one machine'):
      self.assertNotRegex(
        (NOTEBOOKS / f'{name}.ipynb').read_text(),
        r'"/|\'/|/home|/root|/content',
      )
    with self.subTest('the same first cell'):
      first = next(c for c in notebook.cells if c.cell_type == 'code')
      other = next(c for c in read(NAMES[0]).cells if c.cell_type == 'code')
      self.assertEqual(first.source, other.source)
      self.assertStartsWith(first.source, "REPOSITORY = ''")

  @pytest.mark.slow
  def test_without_the_code(self):
    """Without the code and an address, the notebook says what to do.

    It fetches nothing.
    """
    folder = self.create_tempdir().full_path
    notebook = read(NAMES[0])
    first = next(c for c in notebook.cells if c.cell_type == 'code')
    notebook.cells = [nbformat.v4.new_code_cell(HIDDEN), first]
    with self.assertRaisesRegex(
      nbclient.exceptions.CellExecutionError, 'set REPOSITORY above'
    ):
      nbclient.NotebookClient(
        notebook,
        timeout=120,
        kernel_name='python3',
        resources={'metadata': {'path': folder}},
      ).execute()
    # With an address, the code is cloned next to the notebook.
    address = pathlib.Path(self.create_tempdir().full_path, 'anywhere')
    shutil.copytree(ROOT / 'fedftg_jax', address / 'fedftg_jax')
    shutil.copy(ROOT / 'requirements.txt', address)
    for command in (
      ['init', '-q'],
      ['add', '.'],
      ['-c', 'user.name=a', '-c', 'user.email=a@b.c', 'commit', '-qm', 'all'],
    ):
      subprocess.run(['git', *command], cwd=address, check=True)
    first.source = first.source.replace(
      "REPOSITORY = ''", f"REPOSITORY = 'file://{address}'", 1
    )
    nbclient.NotebookClient(
      notebook,
      timeout=120,
      kernel_name='python3',
      resources={'metadata': {'path': folder}},
    ).execute()
    self.assertIn(f'fedftg_jax from {folder}/code', said(notebook)[0])

  @parameterized.parameters(
    ('quick_start', 3, 'fed_avg+fed_ftg: round 2/2  accuracy', {}),
    ('your_own_method', 1, 'all four hold', {'FTG_ITERATIONS': 1}),
    (
      'all_methods',
      2,
      'fed_df_public: round 2/2  accuracy',
      {'METHODS': ('fed_avg', 'ditto', 'fed_df_public'), 'TRAIN_EXAMPLES': 400},
    ),
  )
  @pytest.mark.slow
  def test_runs(self, name, num_pictures, text, more):
    notebook = with_settings(
      read(name), **TINY, **more, DATA_DIR=self.create_tempdir().full_path
    )
    nbclient.NotebookClient(
      notebook,
      timeout=600,
      kernel_name='python3',
      resources={'metadata': {'path': str(NOTEBOOKS)}},
    ).execute()
    printed, pictures = said(notebook)
    self.assertIn(text, printed)
    self.assertEqual(pictures, num_pictures)


if __name__ == '__main__':
  absltest.main()
