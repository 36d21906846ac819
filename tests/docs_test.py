"""Tests the pages: examples, links, commands, and what is generated."""

import contextlib
import functools
import importlib.util
import os
import pathlib
import re
import tomllib

from absl import flags as absl_flags
from absl.testing import absltest, parameterized
import jax
import nbformat
import numpy as np
import optax
import pytest
import yaml

from docs import run_notebooks, tables
import fedftg_jax
from fedftg_jax import base, recipes, simulation
from fedftg_jax.methods import fed_avg
from tests import mutations, problems, programs

ROOT = pathlib.Path(__file__).parents[1]
TOP = 'README.md', 'BUILD.md', 'CONTRIBUTING.md', 'AGENTS.md', 'CHANGELOG.md'
PAGES = {
  str(path.relative_to(ROOT)): path
  for path in (
    *(ROOT / name for name in TOP),
    *sorted((ROOT / 'docs').rglob('*.md')),
  )
}
METHODS = ROOT / 'docs' / 'methods'
# Sections of a method's page.
SECTIONS = (
  'Equation',
  'Use it',
  'Flags',
  'In the code',
  'Measured',
  'Deviations',
  'Source',
)


def without_code(text):
  """Returns the text of a page without its blocks of code."""
  return re.sub(r'^```.*?^```$', '', text, flags=re.M | re.S)


def examples(name):
  return re.findall(r'```python\n(.*?)```', (ROOT / name).read_text(), re.S)


def slug(heading):
  """Returns the anchor of a heading, as GitHub and the site make it."""
  text = re.sub(r'\[(.*?)\]\(.*?\)', r'\1', heading).replace('`', '')
  return re.sub(r'[^\w\- ]', '', text).strip().lower().replace(' ', '-')


def anchors(path):
  text = path.read_text()
  headings = re.findall(r'^#+ (.*)$', without_code(text), re.M)
  return {*map(slug, headings), *re.findall(r'<a id="(.*?)">', text)}


class ExamplesTest(parameterized.TestCase):
  @pytest.mark.slow
  def test_readme(self):
    (code,) = examples('README.md')
    small = code.replace('rounds=20', 'rounds=2')
    self.assertNotEqual(small, code)
    scope = {}
    with contextlib.chdir(self.create_tempdir().full_path):
      exec(small, scope)
      self.assertTrue(scope['result'].report().exists())
    self.assertNotEmpty(scope['result'].metrics)

  @parameterized.parameters('docs/python.md', 'docs/own_model.md')
  @pytest.mark.slow
  def test_runs_three_rounds(self, name):
    (code,) = examples(name)
    scope = {}
    exec(code, scope)
    self.assertLen(scope['metrics']['train_loss'], 3)

  @pytest.mark.slow
  def test_one_call(self):
    """Every example of the page, made small."""
    called = []

    def small(*args, **flags):
      flags = {'num_clients': 4, 'cohort': 2, 'local_epochs': 1} | flags
      if not args or isinstance(args[0], str):
        flags['train_examples'] = 200
      if 'fed_ftg' in flags.get('method', ''):
        flags |= {'ftg_iterations': 1, 'generator_width': 2}
      if 'workdir' not in flags and 'lr' not in flags:
        flags['rounds'] = 2
      called.append(simulation.simulate(*args, **flags))
      return called[-1]

    small_comparison = functools.partial(
      simulation.compare,
      train_examples=200,
      model='mlp',
      num_clients=4,
      cohort=2,
      local_epochs=1,
    )

    scope = {}
    with (
      contextlib.chdir(self.create_tempdir().full_path),
      absltest.mock.patch.object(fedftg_jax, 'simulate', small),
      absltest.mock.patch.object(fedftg_jax, 'compare', small_comparison),
      absltest.mock.patch.dict(os.environ, programs.QUIET),
    ):
      for code in examples('docs/simulate.md'):
        package = re.search(r"callbacks\.(WandB|MLflow)\('", code)
        if package and not importlib.util.find_spec(package[1].lower()):
          continue
        exec(code, scope)
    self.assertGreater(len(called), 8)
    self.assertEqual(scope['run'].summary['rounds'], 6)
    self.assertEqual([*scope['compared'].runs], ['FedAvg', 'pulled'])

  def test_arrays_of_ones_own(self):
    (code,) = examples('docs/own_data.md')
    file = pathlib.Path(self.create_tempdir().full_path, 'mine.npz')
    exec(code.replace("'mine.npz'", repr(str(file))), {})
    with np.load(file) as arrays:
      self.assertEqual(arrays['train_x'].shape, (160, 8, 8, 1))
      self.assertLen(arrays['test_y'], 40)

  def test_methods_of_ones_own(self):
    scope = {}
    for code in examples('docs/add_a_method.md'):
      exec(code, scope)
    key, cohort = jax.random.key(0), problems.row([0, 4])

    def after(*parts):
      fed = problems.make(method=base.chain(fed_avg.fed_avg(), *parts))
      state, _ = fed.round(fed.init(key), problems.DATA, cohort, key)
      return jax.tree.leaves(state.variables)

    plain, zero, strong = (
      after(),
      after(scope['fed_prox'](0.0)),
      after(scope['fed_prox'](5.0)),
    )
    for a, b in zip(plain, zero):
      self.assertLess(abs(a - b).max(), 1e-6)
    self.assertGreater(abs(plain[0] - strong[0]).max(), 1e-3)
    method = base.chain(fed_avg.fed_avg(), scope['drift']())
    fed = problems.make(method=method)
    state = fed.init(key)
    new, info = fed.round(state, problems.DATA, problems.row([0]), key)
    moved = optax.tree.sub(new.variables.params, state.variables.params)
    np.testing.assert_allclose(
      info.metrics['drift'], optax.tree.norm(moved, squared=True), rtol=1e-5
    )
    length = optax.tree.norm(moved)
    for most in (0.5 * length, 2 * length):
      fed = problems.make(method=scope['clipped_server'](most))
      args = fed.init(key), problems.DATA, problems.row([0]), key
      new, info = fed.round(*args)
      got = optax.tree.sub(new.variables.params, args[0].variables.params)
      np.testing.assert_allclose(
        optax.tree.norm(got), min(length, most), rtol=1e-5
      )
      np.testing.assert_allclose(
        info.metrics['clipped_server/norm'], length, rtol=1e-5
      )


class PagesTest(parameterized.TestCase):
  def test_links_lead_somewhere(self):
    for name, page in PAGES.items():
      text = without_code(page.read_text())
      for link in re.findall(r'\]\(((?!http)[^)]+)\)', text):
        with self.subTest(name, link=link):
          target, _, anchor = link.partition('#')
          path = page.parent / target if target else page
          self.assertTrue(path.exists())
          if anchor and path.suffix == '.md':
            self.assertIn(anchor, anchors(path))

  def test_flags_of_commands_exist(self):
    tables.define_flags()
    known = {*absl_flags.FLAGS, 'help', 'helpfull'}
    own = {
      script.stem: set(
        re.findall(r"DEFINE_\w+\(\s*'(\w+)'", script.read_text())
      )
      for script in (ROOT / 'experiments').glob('*.py')
    }
    for name, page in PAGES.items():
      text = page.read_text().replace('\\\n', ' ')
      for block in re.findall(r'^```\n(.*?)^```$', text, re.M | re.S):
        for line in block.splitlines():
          found = re.search(r'(?:fedftg |experiments\.(\w+))(.*)', line)
          script, rest = found.groups() if found else (None, '')
          for flag in re.findall(r'--([a-z_]+)', rest):
            here = known | own.get(script, set())
            with self.subTest(name, line=line):
              self.assertTrue({flag, flag.removeprefix('no')} & here, flag)

  def test_environment_of_the_peers(self):
    """The file, the extra, and for a GPU the JAX that this package has."""
    extras = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project'][
      'optional-dependencies'
    ]
    lines = (ROOT / 'requirements-bench.txt').read_text().splitlines()
    self.assertCountEqual(
      [line for line in lines if line[0] != '#'], extras['bench']
    )
    (on_gpu,) = extras['gpu']
    self.assertIn(
      f'-r requirements-bench.txt "{on_gpu}"\n',
      (ROOT / 'docs' / 'speed.md').read_text(),
    )

  def test_readme_is_short(self):
    self.assertLessEqual(len((ROOT / 'README.md').read_text().split('\n')), 151)

  def test_all_pages_are_in_the_navigation(self):
    text = (ROOT / 'mkdocs.yml').read_text()
    docs = ROOT / 'docs'
    for page in docs.rglob('*.md'):
      if docs / 'results' not in page.parents:
        self.assertIn(f': {page.relative_to(docs)}\n', text)

  def test_formulas(self):
    """Converts every formula; no command of LaTeX may be left in the MathML."""
    if not importlib.util.find_spec('latex2mathml'):
      self.skipTest('needs the extra docs')
    from docs import hooks

    num_formulas = 0
    for name, page in PAGES.items():
      text = page.read_text()
      blocks = re.findall(r'^```math\n(.*?)^```$', text, re.M | re.S)
      plain = re.sub(r'`[^`\n]*`', '', without_code(text))
      inline = re.findall(r'(?<![\w$])\$([^$\n]+)\$(?!\w)', plain)
      for latex in [*blocks, *inline]:
        num_formulas += 1
        self.assertNotIn('\\', hooks.mathml(latex), f'{name}: {latex}')
    self.assertGreater(num_formulas, 100)

  def test_citation_and_changelog_have_the_version(self):
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    self.assertEqual(citation['version'], fedftg_jax.__version__)
    changelog = (ROOT / 'CHANGELOG.md').read_text()
    self.assertIn(f'## [{fedftg_jax.__version__}]', changelog)

  def test_faults_fit_their_files(self):
    for fault in mutations.FAULTS:
      text = (ROOT / fault.path).read_text()
      self.assertEqual(text.count(fault.old), 1, fault.name)


class MethodPagesTest(parameterized.TestCase):
  def test_every_method_has_one(self):
    pages = {path.stem for path in METHODS.glob('*.md')}
    self.assertEqual(pages - {'remembering'}, {*recipes.RECIPES})

  @parameterized.parameters(*recipes.RECIPES)
  def test_sections(self, name):
    text = (METHODS / f'{name}.md').read_text()
    headings = re.findall(r'^## (.*)$', text, re.M)
    self.assertEqual([h for h in headings if h in SECTIONS], [*SECTIONS])
    for kind in ('method', 'measured'):
      self.assertIn(f'<!-- {kind}: {name} -->', text)
    self.assertRegex(text.partition('## Source')[2], r'https://arxiv\.org/abs/')

  @parameterized.parameters(*(p.stem for p in sorted(METHODS.glob('*.md'))))
  def test_code_is_where_it_says(self, name):
    text = (METHODS / f'{name}.md').read_text()
    section = text.partition('## In the code')[2].partition('\n## ')[0]
    items = re.findall(r'^- `(.*?)`: (.*?)(?=^- |^$)', section, re.M | re.S)
    self.assertNotEmpty(items)
    for path, names in items:
      source = (ROOT / path).read_text()
      for word in re.findall(r'`(\w+)`', names):
        defined = rf'^ *(def|class) {word}\b|^{word}\b.* = |^ +{word}='
        self.assertTrue(re.search(defined, source, re.M), f'{word} in {path}')


class GeneratedTest(absltest.TestCase):
  def test_is_current(self):
    """Fails until `make tables` has brought the pages up to date."""
    tables.define_flags()
    for page in tables.pages():
      self.assertNotIn(str(ROOT), page.read_text(), 'a path of this machine')
    for page, text in tables.stale().items():
      self.assertMultiLineEqual(page.read_text(), text, str(page))

  def test_a_page_that_is_not_is_seen(self):
    page = pathlib.Path(self.create_tempdir().full_path, 'page.md')
    page.write_text('a\n<!-- rows: demo -->\nold\n<!-- end -->\nb\n')
    text = tables.updated(page)
    self.assertIn('\n| fed_avg | ', text)
    self.assertNotIn('old', text)
    page.write_text(text)
    self.assertEqual(tables.updated(page), text)
    for wrong, why in (
      ('<!-- rows: demo -->\n', 'no <!-- end -->'),
      ('<!-- rows: dp -->\n<!-- rows: dp -->\n<!-- end -->\n', 'no <!-- end'),
      ('<!-- tabel: demo -->\n<!-- end -->\n', "no part 'tabel'"),
    ):
      page.write_text(wrong)
      with self.assertRaisesRegex(ValueError, why):
        tables.updated(page)

  def test_every_measured_table_is_shown(self):
    names = {path.stem for path in tables.RESULTS.glob('*.yaml')}
    self.assertEqual({*tables.shown_on()}, names)
    for name in names:
      read = tables.result(name)
      self.assertRegex(read['date'], r'^\d{4}-\d\d-\d\d$', name)

  def test_rows_of_a_method_are_found(self):
    page = METHODS / 'moon.md'
    rows = tables.PARTS['measured']('moon', page).split('\n')[2:]
    self.assertTrue(all('moon' in row for row in rows))
    self.assertTrue(any('`moon+fed_ftg` | 86.53' in row for row in rows))
    self.assertEqual(
      tables.PARTS['measured']('fed_other', page), 'Not measured yet.'
    )


class NotebookPagesTest(parameterized.TestCase):
  @parameterized.parameters(
    *(p.stem for p in sorted(run_notebooks.NOTEBOOKS.glob('*.ipynb')))
  )
  def test_has_the_cells_of_its_notebook(self, name):
    """Fails until `python -m docs.run_notebooks NAME` has run the notebook."""
    page = (run_notebooks.PAGES / f'{name}.md').read_text()
    notebook = nbformat.read(
      run_notebooks.NOTEBOOKS / f'{name}.ipynb', nbformat.NO_CONVERT
    )
    at = 0
    for cell in notebook.cells[1:]:
      is_code = cell.cell_type == 'code'
      text = run_notebooks.code(cell) if is_code else cell.source.strip()
      self.assertIn(text, page[at:])
      at = page.index(text, at)
    for picture in re.findall(r'\]\((\w+\.png)\)', page):
      self.assertTrue((run_notebooks.PAGES / picture).exists(), picture)
    self.assertNotIn(str(ROOT), page)


if __name__ == '__main__':
  absltest.main()
