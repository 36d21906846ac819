"""Tests of results: scores of clients and classes, tables, the page."""

import base64
import contextlib
import csv
import functools
import hashlib
import html.parser
import io
import pathlib
import re
import shutil
import struct
import tempfile
from urllib import parse

from absl import flags as absl_flags
from absl.testing import absltest, flagsaver, parameterized
import matplotlib.figure
import numpy as np
from PIL import Image

import fedftg_jax
from fedftg_jax import evaluation
from fedftg_jax.data import images
from fedftg_jax.programs import compare, report, train
from fedftg_jax.results import (
  crate,
  glossary,
  pictures,
  reader,
  sections,
  svg,
  tables,
  verdicts,
)
from fedftg_jax.results import page as page_lib
from fedftg_jax.results import rows as rows_lib
from fedftg_jax.runs import scoring, writer
from fedftg_jax.system import cli, files
from tests import programs


def run_by_hand(accuracy, seed=0, megabytes=1.0, **fields):
  """Makes a run with one evaluation per round, of the broadcast model."""
  rows = [
    {
      'round': t + 1,
      'accuracy': {},
      'same_models': {'average': 'broadcast'},
      'test_accuracy': a,
      'bytes_up': megabytes * 5e5 * (t + 1),
      'bytes_down': megabytes * 5e5 * (t + 1),
    }
    for t, a in enumerate(accuracy)
  ]
  empty = dict(
    versions={},
    timings=[],
    clients={},
    classes={},
    counts={},
    images={},
    nearest={},
  )
  return reader.Recorded(
    **{'config': {'seed': seed}, 'rows': rows, **empty, **fields}
  )


class Page(html.parser.HTMLParser):
  """The content of a page."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.links, self.words, self.tables = [], [], [], []
    self.samples, self.still = 0, []
    self.in_cell = False
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.links += [v for k, v in attrs if k in ('src', 'href', 'xlink:href')]
    self.samples += ('class', 'sample') in attrs
    if tag == 'source':
      values = dict(attrs)
      self.still.append((values['media'], values['srcset'].split(',')[1]))
    if tag == 'table':
      self.tables.append([])
    elif tag == 'tr':
      self.tables[-1].append([])
    elif tag in ('td', 'th'):
      self.tables[-1][-1].append('')
      self.in_cell = True

  def handle_endtag(self, tag):
    self.in_cell = self.in_cell and tag not in ('td', 'th')

  def handle_data(self, data):
    self.words.append(data.strip())
    if self.in_cell:
      self.tables[-1][-1][-1] += data.strip()


def make(*argv):
  """Runs the program `report`; returns (exit status, stderr)."""
  err = io.StringIO()
  with (
    flagsaver.flagsaver(),
    contextlib.redirect_stderr(err),
    contextlib.redirect_stdout(io.StringIO()),
  ):
    try:
      rest = cli.parse(['report', *argv], report)
      cli.guarded(functools.partial(report.main, *rest[1:]))
      return 0, err.getvalue()
    except SystemExit as stop:
      return stop.code, err.getvalue()


class RunTest(parameterized.TestCase):
  """A run that evaluates everything, every time."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    absl_flags.FLAGS.mark_as_parsed()
    temporary = tempfile.TemporaryDirectory()
    cls.addClassCleanup(temporary.cleanup)
    cls.folder = pathlib.Path(temporary.name)
    cls.args = [
      *programs.small(programs.write_data(cls.folder)),
      '--method=fed_ftg',
    ]
    cls.run_folder = cls.folder / 'run'
    status, _, err = programs.call(
      train,
      *cls.args,
      '--evaluate_clients=every',
      '--personalise',
      '--tensorboard',
      f'--workdir={cls.run_folder}',
      draw=True,
    )
    assert status == 0, err
    cls.rows = files.read_jsonl(cls.run_folder / 'metrics.jsonl')

  def json(self, name):
    return files.read_json(self.run_folder / name)

  def test_clients_together_are_the_test_set(self):
    clients = self.json('clients.json')
    self.assertEqual(clients['round'], 3)
    self.assertEqual(sum(clients['test_examples']), 30)
    self.assertEqual(sum(clients['train_examples']), 60)
    accuracy = np.array(clients['accuracy']['broadcast'], float)
    self.assertAlmostEqual(
      np.nansum(accuracy * clients['test_examples']) / 30,
      self.rows[-1]['test_accuracy'],
      places=5,
    )

  def test_summaries_agree(self):
    clients = self.json('clients.json')
    for name in ('broadcast', 'personalised'):
      want = evaluation.fairness(np.array(clients['accuracy'][name], float))
      for key, value in want.items():
        self.assertAlmostEqual(
          clients['summary'][name][key], value, places=5, msg=key
        )
    self.assertEqual(self.json('summary.json')['clients'], clients['summary'])
    self.assertEqual(self.rows[-1]['clients'], clients['summary'])
    self.assertIn('personalised', self.rows[0]['clients'])

  def test_classes_together_are_the_test_set(self):
    classes = self.json('classes.json')
    self.assertEqual(classes['test_examples'], [10, 10, 10])
    self.assertEqual(set(classes['accuracy']), {'broadcast', 'average'})
    for name, values in classes['accuracy'].items():
      self.assertAlmostEqual(
        np.mean(values), rows_lib.accuracy(self.rows[-1], name), places=5
      )

  def test_confusions_are_those_of_the_last_model(self):
    classes = self.json('classes.json')
    confusion = np.array(classes['confusion'])
    np.testing.assert_array_equal(confusion.sum(1), classes['test_examples'])
    np.testing.assert_allclose(
      np.diag(confusion) / confusion.sum(1),
      classes['accuracy']['broadcast'],
      rtol=1e-5,
    )

  def test_fingerprints_of_the_data(self):
    with np.load(self.folder / 'own.npz') as data:
      content = (
        data['train_x'].tobytes() + data['train_y'].astype(np.int32).tobytes()
      )
    found = self.json('model_input.json')
    self.assertEqual(
      found['data']['train'],
      {'examples': 60, 'sha256': hashlib.sha256(content).hexdigest()},
    )
    self.assertEqual(found['class_names'], [])

  def test_counts_are_the_partition_s(self):
    labels = np.arange(60) % 3
    with (
      np.load(self.run_folder / 'counts.npz') as counts,
      np.load(self.run_folder / 'partition.npz') as parts,
    ):
      rows = np.split(parts['rows'], np.cumsum(parts['sizes'])[:-1])
      np.testing.assert_array_equal(
        counts['train'],
        [np.bincount(labels[part], minlength=3) for part in rows],
      )
      self.assertEqual(counts['test'].sum(), 30)

  def test_csv_is_the_same(self):
    with open(self.run_folder / 'metrics.csv', newline='') as file:
      rows = list(csv.DictReader(file))
    self.assertIn('clients/personalised/jain', rows[0])
    self.assertEqual(
      [{k: v if v == '' else float(v) for k, v in row.items()} for row in rows],
      [
        {
          k: '' if v is None else float(v)
          for k, v in rows_lib.flat(row).items()
        }
        for row in self.rows
      ],
    )

  def test_tensorboard(self):
    """Reads events as TensorFlow writes them: length, checksum, event,
    checksum."""
    from tensorboardX.proto import event_pb2

    (path,) = (self.run_folder / 'tensorboard').iterdir()
    data, found, pictures = path.read_bytes(), {}, []
    while data:
      (length,) = struct.unpack('<Q', data[:8])
      event = event_pb2.Event.FromString(data[12 : 12 + length])
      data = data[16 + length :]
      for value in event.summary.value:
        if value.HasField('image'):
          pictures.append((event.step, value.image.width))
        else:
          found[event.step, value.tag] = value.simple_value
    for row in self.rows:
      for name, value in rows_lib.flat(row).items():
        if name != 'round':
          np.testing.assert_allclose(
            found[row['round'], name], value, rtol=1e-6
          )
      self.assertGreater(found[row['round'], 'rounds_per_second'], 0)
    self.assertEqual([step for step, _ in pictures], [2, 3])

  def test_generated_images(self):
    with np.load(self.run_folder / 'generated.npz') as images:
      self.assertEqual(images.files, ['round_000002', 'round_000003'])
      for name in images.files:
        self.assertEqual(images[name].shape, (3, 8, 8, 1))
        self.assertEqual(images[name].dtype, np.uint8)
        np.testing.assert_array_equal(images[name].max((1, 2, 3)), 255)

  def test_images_of_each_class(self):
    found = files.read_arrays(self.run_folder / 'images.npz')
    self.assertEqual((found['x'].shape, found['round']), ((3, 8, 8, 8, 1), 3))
    uri = pictures.grid(found['x'])
    self.assertIn(uri, (self.run_folder / 'report.html').read_text())
    png = base64.b64decode(uri.partition(',')[2])
    decoded = images.decode(png)
    self.assertEqual(decoded.shape[:2], (3 * 8, 8 * 8))  # rows of 8 images
    want = images.scaled(found['x'][1, 2:3])[0]
    np.testing.assert_allclose(
      decoded[8:16, 16:24, 0], np.round(255 * want[..., 0]), atol=1
    )

  def test_damaged_files_are_a_line(self):
    for name, text in (
      ('config.json', '[' * 100_000),
      ('config.json', '{"config": [], "versions": {}}'),
      ('config.json', '{"config": {"program": "sweep"}}'),
      ('metrics.jsonl', '5\n'),
      ('metrics.jsonl', f'{{"round": {10**400}}}\n'),
      ('classes.json', '[]'),
      ('timings.jsonl', '[]\n'),
      ('counts.npz', '{}'),
    ):
      folder = pathlib.Path(self.create_tempdir().full_path) / 'run'
      shutil.copytree(self.run_folder, folder)
      (folder / name).write_text(text)
      with self.assertRaisesRegex(cli.ArgumentError, 'or a damaged file'):
        page_lib.write(folder)
    (folder / 'config.json').unlink()
    with self.assertRaisesRegex(cli.ArgumentError, 'must be a folder that'):
      page_lib.write(folder)

  def copy(self):
    folder = pathlib.Path(self.create_tempdir().full_path) / 'run'
    shutil.copytree(self.run_folder, folder)
    return folder

  def test_nothing_is_written_through_a_link(self):
    folder = self.copy()
    shutil.rmtree(folder / 'report')
    elsewhere = folder.parent / 'elsewhere'
    elsewhere.mkdir()
    (elsewhere / 'mine.csv').touch()
    (folder / 'report').symlink_to(elsewhere)
    with self.assertRaisesRegex(cli.ArgumentError, 'report: must be a folder'):
      page_lib.write(folder)
    self.assertEqual([p.name for p in elsewhere.iterdir()], ['mine.csv'])

  def test_names_of_classes_are_text(self):
    folder = self.copy()
    path = folder / 'model_input.json'
    data = files.read_json(path)
    names = ['<script>', '=1+1', '$x_1$']
    files.write_json(path, {**data, 'class_names': names})
    page_lib.write(folder)
    text = (folder / 'report.html').read_text()
    self.assertNotIn('<script', text)
    table = next(t for t in Page(text).tables if t[0][0] == 'class')
    self.assertEqual([row[0] for row in table[1:]], names)
    with open(folder / 'report' / 'by_class-accuracy.csv', newline='') as file:
      cells = [row[0] for row in csv.reader(file)]
    self.assertEqual(cells, ['class', '<script>', "'=1+1", '$x_1$'])
    for picture in (folder / 'report').glob('*.svg'):
      self.assertNotIn('<script', picture.read_text())

  def test_files_beside_the_page(self):
    """Each table and each picture has one, and nothing else is there."""
    page = Page((self.run_folder / 'report.html').read_text())
    links = {parse.unquote(link) for link in page.links if link[0] not in 'd#'}
    links -= {'report/', crate.NAME}
    there = {f'report/{p.name}' for p in (self.run_folder / 'report').iterdir()}
    self.assertEqual(links, there)
    tables_ = [link for link in links if link.endswith('.csv')]
    confusion = 1  # as a picture, on the page
    self.assertLen(tables_, page.tags.count('table') + confusion)
    self.assertLen(
      [link for link in links if link.endswith('.svg')],
      page.tags.count('svg') - page.samples,
    )

  def test_files_of_an_earlier_page_go(self):
    folder = self.copy()
    (folder / 'report' / 'old.csv').touch()
    (folder / 'report' / 'mine.txt').touch()
    page_lib.write(folder)
    names = [p.name for p in (folder / 'report').iterdir()]
    self.assertNotIn('old.csv', names)
    self.assertIn('mine.txt', names)

  def test_images_move_but_for_those_who_want_none(self):
    path = self.run_folder / 'report' / 'generated-fed_ftg.png'
    with Image.open(path) as moving:
      self.assertEqual(moving.n_frames, 2)  # after rounds 2 and 3
    page = Page((self.run_folder / 'report.html').read_text())
    self.assertIn(pictures.data_uri(path.read_bytes()), page.links)
    (still,) = page.still
    with Image.open(io.BytesIO(base64.b64decode(still[1]))) as last:
      self.assertEqual(getattr(last, 'n_frames', 1), 1)
    self.assertIn('(prefers-reduced-motion: reduce)', still[0])

  def test_crate(self):
    """RO-Crate 1.1 by hand: each file is there and as described, each reference
    has its entity, and the action has program, inputs and results."""
    document = self.json(crate.NAME)
    entities = {one['@id']: one for one in document['@graph']}
    self.assertLen(entities, len(document['@graph']))
    root = entities['./']
    self.assertEqual(entities[crate.NAME]['about'], {'@id': './'})
    self.assertContainsSubset(
      ['name', 'description', 'datePublished', 'license', 'hasPart'], root
    )
    for name in ('metrics.jsonl', 'report.html', 'report/final.csv'):
      self.assertIn({'@id': name}, root['hasPart'])
    for part in root['hasPart']:
      entity = entities[part['@id']]
      content = (self.run_folder / parse.unquote(part['@id'])).read_bytes()
      self.assertEqual(entity['contentSize'], str(len(content)))
      self.assertEqual(entity['sha256'], hashlib.sha256(content).hexdigest())
    self.assertNotIn('checkpoints', str(root['hasPart']))

    def references(value):
      if isinstance(value, list):
        for one in value:
          yield from references(one)
      elif isinstance(value, dict):
        yield value['@id']

    for entity in entities.values():
      for key, value in entity.items():
        for identity in references(value):
          if not identity.startswith('https://w3id.org/ro/crate/'):
            self.assertIn(identity, entities, f'{entity["@id"]} {key}')
    action = entities['#training']
    program = entities[action['instrument']['@id']]
    self.assertEqual(program['softwareVersion'], fedftg_jax.__version__)
    self.assertIn({'@id': 'config.json'}, action['object'])
    self.assertEqual(entities['#flag-batch_size']['value'], '10')
    digest = self.json('model_input.json')['data']['train']['sha256']
    self.assertEqual(entities[f'#data-train-{digest[:16]}']['sha256'], digest)
    (figure,) = root['variableMeasured']
    self.assertEqual(
      entities[figure['@id']]['value'],
      self.json('summary.json')['final_accuracy'],
    )

  def test_classes_together_are_the_change(self):
    counts = np.array(self.json('classes.json')['test_examples'])
    for row in self.rows:
      change = np.array(row['class_change'], float)
      np.testing.assert_allclose(
        np.nansum(change * counts) / counts.sum(),
        row['test_accuracy'] - row['accuracy']['average'],
        atol=1e-5,
      )
    header, *_ = (self.run_folder / 'metrics.csv').read_text().splitlines()
    self.assertNotIn('class', header)

  def test_nearest_real_images(self):
    found = files.read_arrays(self.run_folder / 'nearest.npz')
    self.assertEqual(found['generated'].shape, (3, 8, 8, 1))
    self.assertEqual(found['real'].shape, (3, 8, 8, 1))
    with np.load(self.folder / 'own.npz') as data:
      scaled, labels = (
        255 * images.scaled(data['train_x'] / 1.0),
        data['train_y'],
      )
    for image, label in zip(found['real'], found['label']):
      alike = (np.abs(scaled - image) <= 1).all((1, 2, 3))
      self.assertIn(label, labels[alike])

  def test_nearest_against_all_pairs(self):
    rng = np.random.RandomState(0)
    real = rng.randint(0, 256, (700, 3, 2, 1)).astype(np.uint8)
    seen = lambda x: x / np.float32(255)
    apart = np.sqrt(
      ((seen(real)[:, None] - seen(real)[None]) ** 2).mean((2, 3, 4))
    )
    place, distance = scoring._nearest(seen(real[5:8]), real, seen)
    np.testing.assert_array_equal(place, [5, 6, 7])
    np.testing.assert_allclose(distance, 0, atol=1e-3)
    place, distance = scoring._nearest(
      seen(real[5:8]), real, seen, np.arange(5, 8)
    )
    np.fill_diagonal(apart, np.inf)
    np.testing.assert_array_equal(place, apart[5:8].argmin(1))
    np.testing.assert_allclose(distance, apart[5:8].min(1), rtol=1e-4)

  def test_page(self):
    path = self.run_folder / 'report.html'
    self.assertLess(path.stat().st_size, 2e6)
    page = Page(path.read_text())
    own = len(rows_lib.measures(self.rows[-1]))
    # Curves, round, classes and their change, confusions, clients, who holds
    # what, what fine-tuning changes.
    pictures_ = 3 + 1 + 2 + 1 + 1 + 1 + 1
    self.assertEqual(page.tags.count('svg') - page.samples, pictures_ + own)
    self.assertIn('What fine-tuning changes, class by class', page.words)
    self.assertIn('Inside the training', page.words)
    # What moves, grid, rounds, nearest.
    self.assertEqual(page.tags.count('img'), 1 + 1 + 2 + 2)
    self.assertNotIn('script', page.tags)
    for link in page.links:
      self.assertRegex(link, '^(data:image/png;base64,|data:,|#|report/|ro-)')
    for name in rows_lib.measures(self.rows[-1]):
      self.assertNotIn('not described', str(glossary.of_metric(name)), name)
    headers = [table[0] for table in page.tables]
    self.assertIn(
      [
        '',
        'mean',
        'worst 10 %',
        'best 10 %',
        'variance',
        'Jain index',
        'clients',
      ],
      headers,
    )
    self.assertIn(['flag', 'value'], headers)
    final = dict(row[:2] for row in page.tables[0])
    name = next(k for k in final if 'broadcast' in k)
    self.assertEqual(
      final[name], f'{100 * self.json("summary.json")["final_accuracy"]:.2f}'
    )

  def test_again_by_hand(self):
    path = self.run_folder / 'report.html'
    before = path.read_text()
    path.unlink()
    self.assertEqual(make(str(self.run_folder)), (0, ''))
    self.assertEqual(path.read_text(), before)

  def test_what_is_missing_is_left_out(self):
    """Uses folders of runs that did not evaluate clients, classes or images."""
    bare = self.folder / 'bare'
    bare.mkdir()
    for name in ('config.json', 'metrics.jsonl'):
      shutil.copy(self.run_folder / name, bare)
    self.assertEqual(make(str(bare)), (0, ''))
    page = Page((bare / 'report.html').read_text())
    own = len(rows_lib.measures(self.rows[-1]))
    # Two curves, round, change of classes, what fine-tuning changes.
    self.assertEqual(page.tags.count('svg') - page.samples, 5 + own)
    self.assertNotIn('Clients', page.words)

  def test_flags_are_text(self):
    evil = self.folder / 'evil'
    shutil.copytree(self.run_folder, evil)
    text = '</title><script>alert("1")</script>&amp;$x_1$'
    saved = files.read_json(evil / 'config.json')
    saved['config'] |= {'method': text, 'dataset': text}
    files.write_json(evil / 'config.json', saved)
    page_lib.write(evil)
    page = (evil / 'report.html').read_text()
    self.assertNotIn('<script', page)
    self.assertIn(text, ''.join(Page(page).words))
    self.assertIn(['method', text], Page(page).tables[-1])

  @parameterized.parameters(
    ([], 'error: no argument: must be one FOLDER'),
    (['a', 'b'], 'error: a b: must be one FOLDER'),
    (
      ['/no/folder'],
      'error: /no/folder: must be a folder that train, compare, sweep or',
    ),
    (['--workdir=x'], 'error: .*--workdir=x: no such flag|error: no argument'),
  )
  def test_errors(self, argv, message):
    status, err = make(*argv)
    self.assertEqual(status, 2)
    self.assertRegex(err, f'^{message}')
    self.assertEqual(err.count('\n'), 1)

  @parameterized.parameters('none', 'final')
  def test_when_clients_are_evaluated(self, when):
    folder = self.folder / when
    status, _, err = programs.call(
      train, *self.args, f'--evaluate_clients={when}', f'--workdir={folder}'
    )
    self.assertEqual(status, 0, err)
    self.assertEqual((folder / 'clients.json').exists(), when == 'final')
    # Evaluation changes nothing; the rows are the first ones of a longer run.
    for row, watched in zip(
      files.read_jsonl(folder / 'metrics.jsonl'), self.rows
    ):
      self.assertEqual(
        row, {k: v for k, v in watched.items() if k != 'clients'}
      )
    self.assertFalse((folder / 'tensorboard').exists())

  @parameterized.parameters(10, 1)
  def test_clients_of_a_large_federation(self, listed):
    """Some are evaluated; scores of many are arrays beside clients.json."""
    folder = self.folder / f'large{listed}'
    with absltest.mock.patch.object(writer, '_LISTED', listed):
      status, out, err = programs.call(
        train, *self.args, '--evaluated_clients=2', f'--workdir={folder}'
      )
    self.assertEqual(status, 0, err)
    self.assertIn('2 of 4 clients are evaluated one by one', out)
    config = files.read_json(folder / 'config.json')['config']
    self.assertEqual(config['evaluated_clients'], 2)
    self.assertNotIn(
      'evaluated_clients', files.read_json(self.run_folder / 'config.json')
    )
    self.assertEqual(listed == 1, (folder / 'clients.npz').exists())
    clients, every = reader.read(folder).clients, self.json('clients.json')
    ids = np.asarray(clients['ids'])
    self.assertEqual(ids.tolist(), [0, 3])
    self.assertEqual(clients['summary']['broadcast']['clients'], 2)
    for name in ('train_examples', 'test_examples'):
      np.testing.assert_array_equal(clients[name], np.take(every[name], ids))
    for name in ('accuracy', 'loss'):
      np.testing.assert_allclose(
        clients[name]['broadcast'],
        np.take(every[name]['broadcast'], ids),
        rtol=1e-5,
      )
    self.assertIn(
      'Accuracy of each client', (folder / 'report.html').read_text()
    )


class ScoringTest(parameterized.TestCase):
  def test_a_model_under_two_names_is_scored_once(self):
    folder = self.create_tempdir().full_path
    args = programs.small(programs.write_data(folder))
    with absltest.mock.patch.object(
      evaluation, 'evaluate', wraps=evaluation.evaluate
    ) as evaluate:
      status, _, err = programs.call(
        train,
        *args,
        '--method=fed_avg',
        '--evaluate_clients=none',
        f'--workdir={folder}/run',
      )
    self.assertEqual(status, 0, err)
    for row in files.read_jsonl(pathlib.Path(folder) / 'run' / 'metrics.jsonl'):
      self.assertEqual(row['accuracy'], {})
      self.assertEqual(row['same_models'], {'average': 'broadcast'})
    self.assertEqual(evaluate.call_count, 2)  # after rounds 2 and 3


class ComparisonTest(absltest.TestCase):
  def test_page(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    status, out, err = programs.call(
      compare,
      *programs.small(programs.write_data(folder)),
      '--seeds=2',
      '--methods=fed_avg,fed_avg:batch_size=5',
      f'--workdir={folder / "c"}',
    )
    self.assertEqual(status, 0, err)
    page = Page((folder / 'c' / 'report.html').read_text())
    summary = files.read_json(folder / 'c' / 'summary.json')
    self.assertEqual(summary['seeds'], [0, 1])
    self.assertEqual(
      page.tables[0][0],
      ['method', 'final', 'plain average', 'best', 'seed 0', 'seed 1'],
    )
    for row in page.tables[0][1:]:
      figures = summary['methods'][row[0]]['final_accuracy']
      self.assertEqual(
        row[1], f'{100 * figures["mean"]:.2f} ± {100 * figures["std"]:.2f}'
      )
      self.assertEqual(row[4:], [f'{100 * a:.2f}' for a in figures['per_seed']])
    self.assertIn(
      [['flag', 'fed_avg', 'fed_avg:batch_size=5'], ['batch_size', '10', '5']],
      page.tables,
    )
    self.assertIn(summary['conclusion'], page.words)
    self.assertEqual(out.splitlines()[-1], summary['conclusion'])
    self.assertContainsSubset(
      ['tests.csv', 'fronts-megabytes.csv', 'curves-seconds.svg'],
      [p.name for p in (folder / 'c' / 'report').iterdir()],
    )
    of_clients = summary['methods']['fed_avg']['clients']['broadcast']
    per_seed = [
      files.read_json(folder / f'c/fed_avg/seed{s}/summary.json')['clients'][
        'broadcast'
      ]['worst']
      for s in (0, 1)
    ]
    self.assertEqual(of_clients['worst']['per_seed'], per_seed)


class TablesTest(absltest.TestCase):
  """Tables of numbers computed by hand."""

  def test_on_validation_data(self):
    """Only the broadcast model is evaluated on it: mean of the last rounds."""
    run = run_by_hand([0.5, 0.5])
    for row, accuracy in zip(run.rows, (0.6, 0.7)):
      row['validation_accuracy'] = accuracy
    entries = {name: [(run, name)] for name in ('broadcast', 'average')}
    self.assertEqual(
      tables.final(entries, 'model'),
      (
        ['model', 'on validation data', 'final', 'best'],
        [
          ['broadcast', '65.00', '50.00', '50.00'],
          ['average', '–', '50.00', '50.00'],
        ],
      ),
    )
    # Identical models, and several seeds.
    models = rows_lib.different_models(run.rows)
    self.assertEqual(models, {'broadcast = average': 'broadcast'})
    entries = {'a': [(run, 'broadcast')] * 2}
    self.assertEqual(
      tables.final(entries, 'method', average=True),
      (
        [
          'method',
          'on validation data',
          'final',
          'plain average',
          'best',
          'seed 0',
          'seed 0',
        ],
        [
          [
            'a',
            '65.00 ± 0.00',
            '50.00 ± 0.00',
            '50.00 ± 0.00',
            '50.00 ± 0.00',
            '50.00',
            '50.00',
          ]
        ],
      ),
    )

  def test_names_of_models(self):
    row = {
      'test_accuracy': 0.5,
      'accuracy': {'average': 0.5, 'all': 0.4},
      'same_models': {'aggregated': 'average', 'fine_tuned': 'broadcast'},
    }
    self.assertEqual(
      rows_lib.different_models([row]),
      {
        'broadcast = fine_tuned': 'broadcast',
        'average = aggregated': 'average',
        'all': 'all',
      },
    )
    row['accuracy']['average'] = 0.3
    got = {name: rows_lib.accuracy(row, name) for name in rows_lib.models(row)}
    self.assertEqual(
      got,
      {
        'broadcast': 0.5,
        'average': 0.3,
        'all': 0.4,
        'aggregated': 0.3,
        'fine_tuned': 0.5,
      },
    )

  def test_rounds_to_targets(self):
    entries = {
      'a': [
        (run_by_hand([0.4, 0.6, 0.8]), 'broadcast'),
        (run_by_hand([0.4, 0.5, 0.6]), 'broadcast'),
      ],
      'b': [(run_by_hand([0.1, 0.2, 0.3], megabytes=4), 'broadcast')] * 2,
    }
    self.assertEqual(
      tables.targets(entries, 0.3),
      tables.Table(
        ['', '30 %', '50 %', '70 %', '80 %'],
        [
          [
            'a',
            '1 (1 MB)',
            '2 (2 MB)',
            '3 (3 MB), 1 of 2 never',
            '3 (3 MB), 1 of 2 never',
          ],
          ['b', '3 (12 MB)', 'never', 'never', 'never'],
        ],
      ),
    )
    self.assertIsNone(tables.targets({'b': entries['b']}))

  def test_verdict_of_a_comparison(self):
    def entries(*finals):
      return {
        name: [(run_by_hand([a]), 'broadcast') for a in values]
        for name, values in zip('abc', finals)
      }

    verdict = verdicts.of_comparison
    self.assertEqual(
      verdict(entries([0.5, 0.6], [0.7, 0.9])),
      'b ends highest, at 80.00 ± 14.14 % test accuracy, 25.00 points above a.',
    )
    self.assertEqual(
      verdict(entries([0.5])), 'a ends at 50.00 % test accuracy.'
    )

  def test_fairness(self):
    summary = {
      'broadcast': {
        'mean': 0.5,
        'worst': 0.2,
        'best': 0.9,
        'variance': 0.0123,
        'jain': 0.87654,
        'clients': 7,
      }
    }
    run = run_by_hand([0.5], clients={'summary': summary})
    self.assertEqual(
      tables.fairness({'a': [(run, 'broadcast')]}).rows,
      [['a', '50.00', '20.00', '90.00', '123.0', '0.877', '7']],
    )

  def test_times(self):
    timings = [
      {
        'train_seconds': 3.0,
        'evaluate_seconds': 1.0,
        'checkpoint_seconds': 0.5,
        'compile_seconds': 2.0,
      }
    ] * 2
    run = run_by_hand([0.1, 0.2, 0.3], timings=timings)
    self.assertEqual(
      tables.times({'a': [run]}).rows,
      [['a', '6.0', '2.0', '1.0', '4.0', '0.5']],
    )

  def test_strips_have_few_rounds_and_the_first_and_last(self):
    images = {t: np.full((2, 4, 4, 1), t, np.uint8) for t in range(1, 40)}
    rounds = [t for t, _ in pictures.strip(images)]
    self.assertLen(rounds, 6)
    self.assertEqual([rounds[0], rounds[-1]], [1, 39])
    self.assertEqual([t for t, _ in pictures.strip({3: images[3]})], [3])

  def test_kept_images_have_been_kept_all_along(self):
    rounds = [2 * t for t in range(1, 101)]
    before = set()
    for length in range(1, 101):
      kept = writer.kept_rounds(rounds[:length])
      self.assertLessEqual(len(kept), 13)
      self.assertContainsSubset({2, rounds[length - 1]}, kept)
      self.assertContainsSubset(kept - {rounds[length - 1]}, before)
      before = kept

  def test_many_clients_make_no_large_page(self):
    rng = np.random.RandomState(0)
    counts = rng.poisson(3, (5000, 10))
    accuracy = rng.rand(5000)
    run = run_by_hand(
      [0.5, 0.6],
      counts={'train': counts},
      clients={
        'summary': {'broadcast': evaluation.fairness(accuracy)},
        'accuracy': {'broadcast': accuracy.tolist()},
      },
    )
    config = {'seed': 0, 'partition': 'iid', 'method': 'fed_avg'}
    run = run._replace(config=config)
    entries = {'a': [(run, 'broadcast')]}
    found = sections.build(entries, {'': entries}, {'a': [run]})
    self.assertLess(len(found['partition'].file), 1e5)
    self.assertLess(sum(len(str(v)) for v in found.values()), 5e5)

  def test_flat(self):
    self.assertEqual(
      rows_lib.flat({'a': 1, 'b': {'c': 2, 'd': {'e': None}}}),
      {'a': 1, 'b/c': 2, 'b/d/e': None},
    )


class SvgTest(absltest.TestCase):
  def test_two_pictures_on_a_page(self):
    """Ids are unique, references have targets, and labels are text."""

    def draw(file, color):
      figure = matplotlib.figure.Figure()
      axes = figure.add_subplot()
      axes.plot([1, 2], [3, 4], 'o-', color=color)
      figure.savefig(file)

    page = ''.join(
      svg.draw(name, 'a "label" <b>', draw, '#1845fb').inline for name in 'ab'
    )
    ids = re.findall(r' id="([^"]+)"', page)
    used = re.findall(r'(?:url\(|href=")#([^")]+)', page)
    self.assertLen(set(ids), len(ids))
    self.assertNotEmpty(used)
    self.assertContainsSubset(used, ids)
    self.assertIn('aria-label="a &quot;label&quot; &lt;b&gt;"', page)
    self.assertIn('currentColor', page)
    self.assertNotIn('<style', page)
    self.assertNotIn('0a0b0c', page)
    self.assertIn('var(--c0)', page)
    self.assertNotIn('1845fb', page)


if __name__ == '__main__':
  absltest.main()
