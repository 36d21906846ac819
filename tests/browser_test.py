"""Tests report.html and the site in a real browser, for requests and width."""

import contextlib
import functools
import html.parser
import http.server
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading

from absl.testing import absltest, parameterized
import numpy as np
from PIL import Image
import pytest

from fedftg_jax.configuration import folders
from fedftg_jax.results import page as page_lib
from fedftg_jax.system import files

# Measurements of the page once it is laid out at a given width. A page in a
# frame has the width of the frame.
_PROBE = """<!DOCTYPE html><title>probe</title>
<link rel="icon" href="data:,"><body style="margin:0">
<iframe src="%s" style="border:0;width:%dpx;height:%dpx"></iframe>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const inner = frame.contentDocument, root = inner.documentElement;
  for (const d of inner.querySelectorAll("details")) d.open = true;
  const count = tag => inner.querySelectorAll(tag).length;
  const pre = document.createElement("pre");
  pre.textContent = JSON.stringify({
    width: root.clientWidth, scroll: root.scrollWidth,
    height: root.scrollHeight,
    headings: [...inner.querySelectorAll("h1, h2")].map(
        h => h.firstChild.textContent.trim()),
    formulas: count("math"),
    tables: count("table"), pictures: count("figure svg"), images: count("img"),
    broken: [...inner.images].filter(i => !i.naturalWidth).length,
    tiny: [...inner.querySelectorAll("figure svg text")].filter(
        t => t.getBoundingClientRect().height < 8).length,
    cut: [...inner.querySelectorAll(".flow svg")].filter(s => {
      const right = s.getBoundingClientRect().right;
      return [...s.querySelectorAll("text")].some(
          t => t.getBoundingClientRect().right > right); }).length,
    flat: [...inner.querySelectorAll("figure svg")].filter(
        s => s.getBoundingClientRect().height < 80).length,
    fetched: frame.contentWindow.performance.getEntriesByType("resource").map(
        r => r.name)});
  document.body.append(pre);
};
</script>"""


def browser(*argv):
  """Starts Chromium as a process of its own, with a profile of its own."""
  program = shutil.which('chromium') or shutil.which('google-chrome')
  if program is None:
    raise FileNotFoundError(
      'this test needs chromium (apt-get install chromium)'
    )
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
    return subprocess.run(
      [
        program,
        '--headless',
        '--no-sandbox',
        '--disable-gpu',
        '--no-first-run',
        '--disable-background-networking',
        '--disable-component-update',
        '--disable-sync',
        '--hide-scrollbars',
        '--enable-logging=stderr',
        f'--user-data-dir={profile}',
        *argv,
      ],
      capture_output=True,
      text=True,
      timeout=60,
      check=True,
    )


@contextlib.contextmanager
def served(folder):
  """Serves `folder`; gives its address and the status of each request."""
  asked = {}

  class Handler(http.server.SimpleHTTPRequestHandler):
    def log_request(self, code='-', size='-'):
      asked[self.path] = int(code)

    def log_message(self, *args):
      pass

  server = http.server.ThreadingHTTPServer(
    ('localhost', 0), functools.partial(Handler, directory=folder)
  )
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  try:
    yield f'http://localhost:{server.server_port}', asked
  finally:
    server.shutdown()
    thread.join()
    server.server_close()


def write_run(folder, method, seed, accuracy, long):
  """Writes a run's folder with everything that a page can show."""
  rng = np.random.RandomState(seed)
  names = 'average', 'broadcast', 'fine_tuned'
  config = {
    'method': method,
    'dataset': 'npz:' + long,
    'seed': seed,
    'rounds': 40,
    'partition': 'dirichlet',
    'dirichlet_alpha': 0.1,
    'partition_seed': 0,
    'model': 'lenet',
    'num_clients': 20,
    'cohort': 5,
    'ftg_iterations': 10,
    **{f'flag_{i}': i / 3 for i in range(30)},
  }
  files.write_json(
    folder / 'config.json',
    {'config': config, 'contents': {}, 'versions': {'jax': '0.10.2'}},
  )
  values = np.minimum(0.98, accuracy * (1 - np.exp(-np.arange(1, 21) / 5)))
  rows = [
    {
      'round': 2 * t + 2,
      'test_accuracy': a,
      'bytes_up': 1e7 * (t + 1),
      'bytes_down': 1e7 * (t + 1),
      'accuracy': {name: a - i / 50 for i, name in enumerate(names)},
      'class_change': rng.normal(0, 0.05, 10).tolist(),
      'class_accuracy': rng.beta(8, 2, 10).tolist(),
      'train_loss': 1 - a,
    }
    for t, a in enumerate(values)
  ]
  files.write_jsonl(folder / 'metrics.jsonl', rows)
  files.write_jsonl(
    folder / 'timings.jsonl',
    [
      {
        'round': row['round'],
        'train_seconds': 1.5,
        'evaluate_seconds': 0.1,
        'compile_seconds': 0.2,
      }
      for row in rows
    ],
  )
  counts = rng.multinomial(200, rng.dirichlet([0.1] * 10), 20).astype(np.int32)
  files.write_tree(folder / 'counts.npz', {'train': counts, 'test': counts})
  of_clients = {
    name: rng.beta(8, 2, 20).tolist() for name in ('broadcast', 'personalised')
  }
  summary = {
    'clients': 20,
    'mean': 0.8,
    'worst': 0.5,
    'best': 0.95,
    'variance': 0.01,
    'jain': 0.97,
  }
  names_ = [f'class {c} ' + 'n' * 7 * c for c in range(10)]
  files.write_json(
    folder / 'model_input.json',
    {
      'class_names': names_,
      'data': {
        split: {'examples': 10, 'sha256': split} for split in ('train', 'test')
      },
    },
  )
  files.write_json(
    folder / 'clients.json',
    {
      'round': 40,
      'accuracy': of_clients,
      'summary': {name: summary for name in of_clients},
    },
  )
  files.write_json(
    folder / 'classes.json',
    {
      'round': 40,
      'accuracy': {name: rng.beta(8, 2, 10).tolist() for name in names},
      'confusion': rng.multinomial(100, [0.1] * 10, 10).tolist(),
    },
  )
  files.write_tree(
    folder / 'generated.npz',
    {
      f'round_{t:06d}': rng.randint(0, 255, (10, 28, 28, 1)).astype(np.uint8)
      for t in range(2, 42, 4)
    },
  )
  files.write_tree(
    folder / 'nearest.npz',
    {
      **{
        name: rng.randint(0, 255, (10, 28, 28, 1)).astype(np.uint8)
        for name in ('generated', 'real')
      },
      'label': np.arange(10),
      'distance': rng.uniform(0.5, 1, 10),
      'between_real': np.float32(0.7),
      'round': np.int32(40),
    },
  )


class _Pre(html.parser.HTMLParser):
  text = ''

  def handle_data(self, data):
    if data.startswith('{'):
      self.text = data


def look(folder, page, width):
  """Returns (the page's measurements, the status of each request, what the
  console says, its screenshot)."""
  (folder / 'probe.html').write_text(_PROBE % (page, width, 9000))
  with served(folder) as (address, asked):
    dom = browser(
      '--virtual-time-budget=5000', '--dump-dom', f'{address}/probe.html'
    )
    browser(
      f'--window-size={max(width, 500)},3000',
      f'--screenshot={folder / "shot.png"}',
      f'{address}/probe.html',
    )
  parser = _Pre()
  parser.feed(dom.stdout)
  found = json.loads(parser.text)
  found['elsewhere'] = [
    url for url in found['fetched'] if not url.startswith(address)
  ]
  complaints = [line for line in dom.stderr.splitlines() if 'CONSOLE' in line]
  with Image.open(folder / 'shot.png') as picture:
    pixels = np.asarray(picture.convert('RGB'))
  return found, asked, complaints, pixels


@pytest.mark.browser
class SiteTest(parameterized.TestCase):
  """Builds the site as `make docs` does, and looks at some pages."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    if not importlib.util.find_spec('mkdocs'):
      raise absltest.SkipTest('needs the extra docs')
    cls.enterClassContext(
      folder := tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    )
    cls.folder = pathlib.Path(folder.name)
    done = subprocess.run(
      [sys.executable, '-m', 'mkdocs', 'build', '--site-dir', cls.folder],
      cwd=pathlib.Path(__file__).parents[1],
      env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'},
      capture_output=True,
      text=True,
    )
    assert not done.returncode, done.stderr
    assert 'WARNING' not in done.stderr, done.stderr

  @parameterized.product(
    page=(
      ('index.html', ('fedftg_jax', 'Where to go', 'The demo'), 0),
      ('methods/fed_ftg/index.html', ('FedFTG', 'Equation', 'Flags'), 10),
      ('concepts/index.html', ('A round', 'The names'), 0),
    ),
    width=(390, 1280),
  )
  def test_page(self, page, width):
    path, headings, formulas = page
    found, asked, complaints, pixels = look(self.folder, path, width)
    self.assertEqual(found['width'], width)
    self.assertEqual(found['scroll'], width, 'wider than the window')
    self.assertContainsSubset(headings, found['headings'])
    self.assertGreaterEqual(found['formulas'], formulas)
    self.assertEqual(found['broken'], 0)
    self.assertEmpty(found['elsewhere'])
    self.assertEmpty(complaints)
    self.assertEmpty([path for path, code in asked.items() if code >= 400])
    self.assertGreater(len(np.unique(pixels.reshape(-1, 3), axis=0)), 100)


@pytest.mark.browser
class BrowserTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def look(self, width):
    return look(self.folder, 'report.html', width)

  def assert_fine(self, **counts):
    for width in (360, 1280):
      page, asked, complaints, pixels = self.look(width)
      self.assertEqual(page['width'], width)
      self.assertEqual(page['scroll'], width, 'wider than the window')
      self.assertEqual({k: page[k] for k in counts}, counts)
      self.assertEqual((page['broken'], page['flat']), (0, 0))
      self.assertEqual((page['tiny'], page['cut']), (0, 0))
      self.assertEmpty(page['fetched'])
      self.assertEmpty(complaints)
      self.assertEqual({*asked}, {'/probe.html', '/report.html'})
      # The screenshot shows something: ink on paper, and the colours of curves.
      colors = np.unique(pixels.reshape(-1, 3), axis=0)
      self.assertGreater(len(colors), 300)

  def test_run(self):
    write_run(self.folder, 'fed_ftg', 0, 0.9, 'x' * 200)
    page_lib.write(self.folder)
    # Three curves, the round, two of classes, confusions, clients, who holds
    # what, the training loss, what fine-tuning changes. Images: what moves,
    # six rounds, the nearest.
    self.assert_fine(tables=8, pictures=11, images=1 + 6 + 2)

  def test_comparison(self):
    """Has long names, many methods and several seeds."""
    long = (
      'fed_ftg:ftg_teacher_weight=uniform:ftg_hard_samples=false' + 'y' * 60
    )
    methods = {
      'fed_avg': 0.95,
      'fed_avg+fed_ftg': 0.93,
      long: 0.9,
      **{f'method_{i}': 0.8 for i in range(6)},
    }
    for name, accuracy in methods.items():
      for seed in (0, 1):
        write_run(
          self.folder / folders.folder_name(name) / f'seed{seed}',
          name,
          seed,
          accuracy - seed / 30,
          'z' * 200,
        )
    config = {'program': 'compare', 'dataset': 'npz:' + 'z' * 200, 'rounds': 40}
    files.write_json(self.folder / 'config.json', {'config': config})
    files.write_json(
      self.folder / 'summary.json',
      {
        'methods': dict.fromkeys(methods),
        'target_accuracy': 0.75,
        'seeds': [0, 1],
      },
    )
    page_lib.write(self.folder)
    self.assertLess((self.folder / 'report.html').stat().st_size, 3e6)
    # Rounds of the two methods that are known; of each, confusions and what
    # fine-tuning changes. Three curves, two of classes, two of clients, who
    # holds what, the training loss.
    self.assert_fine(
      tables=11, pictures=2 + 2 * len(methods) + 9, images=9 * len(methods)
    )

  def test_the_probe_sees_what_is_wrong(self):
    """Uses a page that is too wide, fetches a picture and logs an error."""
    (self.folder / 'report.html').write_text(
      '<p style="width: 2000px">wide</p><img src="missing.png">'
      '<script>console.error("oh")</script>'
    )
    page, asked, complaints, _ = self.look(360)
    self.assertGreater(page['scroll'], 1000)
    self.assertEqual(page['broken'], 1)
    self.assertLen(page['fetched'], 1)
    self.assertIn('/missing.png', asked)
    self.assertNotEmpty(complaints)


if __name__ == '__main__':
  absltest.main()
