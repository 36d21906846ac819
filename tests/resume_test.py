"""Tests that runs that are stopped in any way resume to the same bytes."""

import contextlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from upath import UPath

from fedftg_jax.programs import compare, train
from fedftg_jax.runs import personal, resume, scoring, writer
from fedftg_jax.system import files
from tests import programs

# All files of a finished run, except those with times.
SAME = (
  'params.npz',
  'metrics.jsonl',
  'metrics.csv',
  'clients.json',
  'classes.json',
  'partition.npz',
  'schedule.npz',
)


class PowerCut(BaseException):
  """An exception that nothing catches."""


class ResumeTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.args = [
      *programs.small(programs.write_data(self.folder)),
      '--rounds=5',
      '--eval_every=1',
      '--checkpoint_every=2',
    ]

  def train(self, name, *changes, method='scaffold'):
    return programs.call(
      train,
      *self.args,
      f'--method={method}',
      f'--workdir={self.folder / name}',
      *changes,
    )

  def assert_same(self, a, b, names=SAME):
    for name in names:
      self.assertEqual(
        (self.folder / a / name).read_bytes(),
        (self.folder / b / name).read_bytes(),
        name,
      )

  def test_stopped_at_any_file(self):
    """The power may fail before or after any file is in its place."""
    method = 'scaffold+running_average'
    self.assertEqual(self.train('whole', method=method)[0], 0)
    replace, replaced = os.replace, []

    def cut(here, there):
      replaced.append(pathlib.Path(there).name)
      if len(replaced) == stop and not late:
        raise PowerCut
      replace(here, there)
      if len(replaced) == stop:
        raise PowerCut

    stop, late = None, False
    with absltest.mock.patch.object(files.os, 'replace', cut):
      self.train('counted', method=method)
    total, finished = len(replaced), replaced.index('summary.json') + 1
    self.assertGreater(finished, 25)
    for stop, late, says in (
      (5, True, 'results in'),
      (finished // 3, False, 'results in'),
      (finished // 2 + 1, True, 'going on after round'),
      (finished, False, 'going on after round'),
      (finished, True, 'already finished'),
      (total, True, 'already finished'),
    ):
      name = f'cut{stop}{late}'
      replaced.clear()
      with absltest.mock.patch.object(files.os, 'replace', cut):
        with self.assertRaises(PowerCut):
          self.train(name, method=method)
      status, out, err = self.train(name, method=method)
      self.assertEqual(status, 0, err)
      self.assertIn(says, out)
      self.assert_same('whole', name, (*SAME, writer.MODELS))

  @parameterized.parameters(
    ('fed_ftg', ['--ftg_preset=robust', '--tensorboard']),
    ('moon', ['--client_state=disk', '--momentum=0.5', '--keep_momentum']),
  )
  def test_all_that_a_run_holds_comes_back(self, method, changes):
    self.check_all(method, changes)

  @parameterized.parameters(
    ('fed_ftg', []),
    ('p_fed_bred', ['--me_kind=mh', '--client_state=disk', '--train_all']),
    (
      'kd_lwof',
      [
        '--lwof_models=softmax,mlp',
        '--dropout_rate=0.3',
        '--dropout_after_work',
      ],
    ),
    (
      'fed_avg',
      [
        '--server_optimizer=adam',
        '--eval_every=2',
        '--rounds=7',
        '--dropout_rate=0.3',
      ],
    ),
  )
  @pytest.mark.slow  # below `parameters`: applies to all cases
  def test_all_that_other_runs_hold_comes_back(self, method, changes):
    self.check_all(method, changes)

  def check_all(self, method, changes):
    self.assertEqual(self.train('whole', *changes, method=method)[0], 0)
    written = writer.RunWriter.add_timing

    def cut(run, timing):
      written(run, timing)
      if timing['round'] >= 3:
        raise PowerCut

    with absltest.mock.patch.object(writer.RunWriter, 'add_timing', cut):
      with self.assertRaises(PowerCut):
        self.train('cut', *changes, method=method)
    status, out, err = self.train('cut', *changes, method=method)
    self.assertEqual(status, 0, err)
    self.assertIn('going on after round 2', out)
    self.assert_same('whole', 'cut')
    if method in ('p_fed_bred', 'kd_lwof'):
      self.assert_same('whole', 'cut', (personal.NAME,))
    if method == 'fed_ftg':
      self.assert_same('whole', 'cut', ('nearest.npz',))
      with (
        np.load(self.folder / 'whole/generated.npz') as whole,
        np.load(self.folder / 'cut/generated.npz') as cut,
      ):
        self.assertEqual(whole.files, cut.files)
        for name in whole.files:
          np.testing.assert_array_equal(whole[name], cut[name])

  @parameterized.parameters('host', 'disk')
  def test_a_checkpoint_has_the_slots_of_who_has_worked(self, place):
    """Others are as in the beginning; also where all are in it, as before."""
    changes = (
      f'--client_state={place}',
      '--num_clients=12',
      '--dropout_rate=0.3',
      '--dropout_after_work',
      '--schedule_seed=7',  # client 10 has worked, but arrives in round 5 first
    )
    self.assertEqual(self.train('whole', *changes)[0], 0)
    self.assertEqual(self.train('cut', '--rounds=4', *changes)[0], 0)
    num = 5  # of 12 have worked
    shapes, restored = [], resume.checkpoint.restore

    def restore(folder, done, like, note):
      shapes.extend(a.shape[0] for a in jax.tree.leaves(like.clients))
      return restored(folder, done, like, note)

    with absltest.mock.patch.object(resume.checkpoint, 'restore', restore):
      status, out, err = self.train('cut', *changes)
    self.assertEqual(status, 0, err)
    self.assertEqual(set(shapes), {num})
    self.assertIn('going on after round 4', out)
    self.assert_same('whole', 'cut')
    # As versions before wrote it.
    with absltest.mock.patch.object(
      resume, '_worked', lambda *_: np.arange(12)
    ):
      self.assertEqual(self.train('old', '--rounds=4', *changes)[0], 0)
    status, out, err = self.train('old', *changes)
    self.assertEqual(status, 0, err)
    self.assertIn('going on after round 4', out)
    self.assert_same('whole', 'old')

  @pytest.mark.slow
  def test_seeds_at_once(self):
    args = [*self.args, '--methods=scaffold', '--seeds=2', '--seeds_at_once=2']

    def run(name):
      return programs.call(compare, *args, f'--workdir={self.folder / name}')

    self.assertEqual(run('whole')[0], 0)
    written = writer.RunWriter.add_timing

    def cut(run, timing):
      written(run, timing)
      if timing['round'] == 5 and run._seed == 1:
        raise PowerCut

    with absltest.mock.patch.object(writer.RunWriter, 'add_timing', cut):
      with self.assertRaises(PowerCut):
        run('cut')
    status, out, err = run('cut')
    self.assertEqual(status, 0, err)
    self.assertIn('going on after round 4', out)
    for seed in (0, 1):
      self.assert_same(f'whole/scaffold/seed{seed}', f'cut/scaffold/seed{seed}')

  def test_in_a_store_without_rename(self):
    """In a store of fsspec the files are the same, and a run there resumes,
    too."""
    self.assertEqual(self.train('whole')[0], 0)
    there = UPath('memory://runs') / self.folder.name
    args = [*self.args, '--method=scaffold', f'--workdir={there}']
    written = writer.RunWriter.add_timing

    def cut(run, timing):
      written(run, timing)
      if timing['round'] == 5:
        raise PowerCut

    with absltest.mock.patch.object(writer.RunWriter, 'add_timing', cut):
      with self.assertRaises(PowerCut):
        programs.call(train, *args)
    status, out, err = programs.call(train, *args)
    self.assertEqual(status, 0, err)
    self.assertIn('going on after round 4', out)
    self.assertCountEqual(files.names(there), os.listdir(self.folder / 'whole'))
    self.assertCountEqual(files.names(there / resume.FOLDER), ['4', '5'])
    for name in SAME:
      self.assertEqual(
        (there / name).read_bytes(),
        (self.folder / 'whole' / name).read_bytes(),
        name,
      )
    status, out, _ = programs.call(train, *args)
    self.assertEqual(status, 0)
    self.assertIn('already finished', out)

  @parameterized.parameters(
    ('foo://a/b', 'cannot be reached .*Unsupported'),
    ('memory://a/b --tensorboard', 'needs a --workdir on this machine'),
  )
  def test_stores_that_cannot_be(self, where, message):
    status, _, err = programs.call(
      train, *self.args, *f'--workdir={where}'.split()
    )
    self.assertEqual(status, 2)
    self.assertRegex(err, f'^error: --.*{message}')
    self.assertEqual(err.count('\n'), 1)

  def test_more_rounds_go_on(self):
    self.check_more_rounds('exact')

  @pytest.mark.slow
  def test_more_rounds_of_more_clients_go_on(self):
    self.check_more_rounds('bernoulli')

  def check_more_rounds(self, kind):
    """Covers later rounds with larger cohorts, which widen the schedule."""
    kind = [f'--schedule={kind}', '--schedule_seed=3']
    self.assertEqual(self.train('whole', '--rounds=6', *kind)[0], 0)
    self.assertEqual(self.train('more', '--rounds=4', *kind)[0], 0)
    status, out, err = self.train('more', '--rounds=6', *kind)
    self.assertEqual(status, 0, err)
    self.assertIn('going on after round 4', out)
    self.assert_same('whole', 'more')

  def test_fewer_rounds_than_are_there(self):
    """For a stopped run it is refused, and nothing is lost."""
    self.assertEqual(self.train('a')[0], 0)
    (self.folder / 'a/summary.json').unlink()
    status, _, err = self.train('a', '--rounds=3')
    self.assertEqual(status, 2)
    self.assertRegex(
      err, '^error: --rounds=3: .* goes on from round 5; must be'
    )
    self.assertEqual(self.train('a')[0], 0)

  def test_asked_to_end(self):
    self.assertEqual(self.train('whole')[0], 0)
    asked = threading.Event()
    asked.set()
    with absltest.mock.patch.object(
      resume, 'listening', lambda: contextlib.nullcontext(asked)
    ):
      status, _, err = self.train('cut')
    self.assertEqual(status, 143)
    self.assertEqual(
      err, 'terminated: round 1 of 5 is kept; the same command continues\n'
    )
    status, out, _ = self.train('cut')
    self.assertEqual(status, 0)
    self.assertIn('going on after round 1', out)
    self.assert_same('whole', 'cut')

  def test_a_bad_checkpoint_is_named_and_the_one_before_used(self):
    self.assertEqual(self.train('whole')[0], 0)
    kept = self.folder / 'whole' / resume.FOLDER
    self.assertCountEqual(os.listdir(kept), ['4', '5'])
    self.train('other', '--seed=1')
    for name, spoil in (
      (
        'truncated',
        lambda: [
          p.write_bytes(p.read_bytes()[:100])
          for p in (kept / '5').rglob('*')
          if p.is_file()
        ],
      ),
      (
        'foreign',
        lambda: (
          shutil.rmtree(kept / '5'),
          shutil.copytree(
            self.folder / 'other' / resume.FOLDER / '5', kept / '5'
          ),
        ),
      ),
    ):
      (self.folder / 'whole/summary.json').unlink()
      spoil()
      before = (self.folder / 'whole/params.npz').read_bytes()
      status, out, err = self.train('whole')
      self.assertEqual(status, 0, err)
      why = (
        'is damaged: digests.json'
        if name == 'truncated'
        else ('is the checkpoint of another run')
      )
      self.assertRegex(
        out, f'{kept}/5: {why}.*; it is left out\ngoing on after round 4'
      )
      self.assertEqual((self.folder / 'whole/params.npz').read_bytes(), before)
      self.assertCountEqual(os.listdir(kept), ['4', '5', '5.refused'])

  def test_rows_that_are_lost(self):
    self.assertEqual(self.train('whole')[0], 0)
    self.assertEqual(self.train('cut')[0], 0)
    (self.folder / 'cut/summary.json').unlink()
    (self.folder / 'cut/metrics.jsonl').write_text('{"round": 1, "half a li')
    status, out, err = self.train('cut')
    self.assertEqual(status, 0, err)
    self.assertEqual(out.count('metrics.jsonl does not reach that round'), 2)
    self.assertIn('\nno checkpoint that can be used: begins at round 1\n', out)
    self.assert_same('whole', 'cut')

  def test_of_rows_that_were_cut_the_whole_ones_count(self):
    self.assertEqual(self.train('whole')[0], 0)
    self.assertEqual(self.train('cut')[0], 0)
    (self.folder / 'cut/summary.json').write_text('{')  # counts as missing
    rows = self.folder / 'cut/metrics.jsonl'
    rows.write_text(rows.read_text()[:-20])
    status, out, err = self.train('cut')
    self.assertEqual(status, 0, err)
    self.assertIn('going on after round 4', out)
    self.assert_same('whole', 'cut')

  def test_rows_that_cannot_be_read_now(self):
    """A problem that may pass ends the run, and costs no checkpoint."""
    self.assertEqual(self.train('a', '--rounds=4')[0], 0)
    with absltest.mock.patch.object(
      files, 'read_jsonl', side_effect=PermissionError('no permission: rows')
    ):
      status, _, err = self.train('a')
    self.assertEqual((status, err), (1, 'error: no permission: rows\n'))
    self.assertIn('4', os.listdir(self.folder / 'a' / resume.FOLDER))

  def test_a_damaged_file_of_the_run_is_named(self):
    self.assertEqual(self.train('a', '--rounds=4')[0], 0)
    for name, text, why in (
      ('clients.json', '{}', ': a file of the run is damaged '),
      (
        'metrics.jsonl',
        '{"round": 4}\n',
        '/metrics.jsonl: its rows up to round 4',
      ),
    ):
      good = (self.folder / 'a' / name).read_text()
      (self.folder / 'a' / name).write_text(text)
      status, _, err = self.train('a')
      self.assertEqual(status, 1)
      self.assertRegex(err, f'^error: .*{why}.*\n$')
      (self.folder / 'a' / name).write_text(good)
    self.assertEqual(self.train('a')[0], 0)

  def test_seeds_trained_at_once_keep_a_checkpoint_in_common(self):
    """Wherever it stops, even if one checkpoint is kept of each."""
    args = (
      *self.args,
      '--methods=fed_avg',
      '--seeds=2',
      '--seeds_at_once=2',
      '--keep_checkpoints=1',
      f'--workdir={self.folder / "c"}',
    )
    saved, save = [], resume.save

    def cut(*run):
      if len(saved) == 3:  # this is the first seed's second checkpoint
        raise PowerCut
      saved.append(run[3])
      save(*run)

    with absltest.mock.patch.object(resume, 'save', cut):
      with self.assertRaises(PowerCut):
        programs.call(compare, *args)
    self.assertEqual(saved, [2, 2, 4])
    status, out, err = programs.call(compare, *args)
    self.assertEqual(status, 0, err)
    self.assertIn('going on after round 2', out)

  def test_a_finished_run_where_one_may_only_read(self):
    self.assertEqual(self.train('a')[0], 0)
    with absltest.mock.patch.object(os, 'access', return_value=False):
      status, out, err = self.train('a')
      self.assertEqual(status, 0, err)
      self.assertIn('already finished', out)
      status, _, err = self.train('a', '--rounds=6')
    self.assertEqual(status, 2)
    self.assertIn('a folder that you may write to', err)

  def test_files_that_were_begun_go(self):
    self.assertEqual(self.train('a', '--rounds=4')[0], 0)
    (self.folder / 'a' / '.part-0123.json').touch()
    self.assertEqual(self.train('a')[0], 0)
    self.assertEqual(list((self.folder / 'a').glob('.*')), [])

  def test_fewer_rounds_than_are_finished(self):
    self.assertEqual(self.train('a')[0], 0)
    status, _, err = self.train('a', '--rounds=3')
    self.assertEqual(status, 2)
    self.assertRegex(err, r'^error: --rounds=3: .* holds 5 rounds; must be')

  def test_not_finite(self):
    """The last finite checkpoint stays, and the error names the rounds."""
    self.assertEqual(self.train('a', '--rounds=4')[0], 0)
    with absltest.mock.patch.object(
      scoring, '_all_finite', lambda tree: jnp.array(False)
    ):
      status, _, err = self.train('a')
    self.assertEqual(status, 1)
    self.assertRegex(err, 'no longer finite after a round between 5 and 5; ')
    self.assertIn('4', os.listdir(self.folder / 'a' / resume.FOLDER))
    self.assertNotIn('5', os.listdir(self.folder / 'a' / resume.FOLDER))
    self.assertEqual(self.train('a')[0], 0)

  def test_none(self):
    self.assertEqual(self.train('a', '--checkpoint_every=0')[0], 0)
    self.assertFalse((self.folder / 'a' / resume.FOLDER).exists())

  def test_when(self):
    config = {'eval_every': 4, 'rounds': 30}
    due = [t for t in range(31) if t and resume.is_due(t, config, 10)]
    self.assertEqual(due, [12, 24])
    config = {'eval_every': 4, 'rounds': 32}
    due = [t for t in range(33) if t and resume.is_due(t, config, 10)]
    self.assertEqual(due, [12, 24, 32])

  @pytest.mark.slow
  def test_a_full_disk(self):
    """It ends with one line, and nothing that was written before is lost."""
    self.assertEqual(self.train('whole')[0], 0)
    limit = (
      100_000  # bytes of a file: metrics fit, a checkpoint's models do not
    )
    process = subprocess.run(
      [
        sys.executable,
        '-m',
        'experiments.train',
        *self.args,
        '--method=scaffold',
        '--compile_cache=',
        f'--workdir={self.folder / "full"}',
      ],
      cwd=programs.ROOT,
      text=True,
      capture_output=True,
      check=False,
      preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (limit, limit)
      ),
    )
    self.assertEqual(process.returncode, 1, process.stderr)
    self.assertRegex(
      process.stderr.splitlines()[-1],
      '^error: .*the checkpoint of round 2 cannot be written',
    )
    rows = (self.folder / 'full/metrics.jsonl').read_text().splitlines()
    self.assertEqual([json.loads(row)['round'] for row in rows], [1, 2])
    self.assertEqual(self.train('full')[0], 0)
    self.assert_same('whole', 'full')

  @parameterized.parameters(signal.SIGKILL, signal.SIGTERM)
  @pytest.mark.slow  # below `parameters`: applies to all cases
  def test_killed_at_random(self, number):
    """Kills a real process several times, and compares with one that was
    not."""
    cache = {**os.environ, 'XDG_CACHE_HOME': str(self.folder / 'cache')}
    args = [*self.args, '--rounds=400', '--checkpoint_every=3']
    command = [
      sys.executable,
      '-m',
      'experiments.train',
      *args,
      '--method=scaffold',
    ]

    def start(name):
      return subprocess.Popen(
        [*command, f'--workdir={self.folder / name}'],
        text=True,
        env=cache,
        cwd=programs.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
      )

    whole = start('whole')
    whole.communicate(timeout=300)
    self.assertEqual(whole.returncode, 0)
    seed = time.time_ns()
    draw = random.Random(seed)
    for _ in range(4):
      process = start('cut')
      lines = draw.randrange(1, 80)  # number of lines of output
      for _ in range(lines):
        line = process.stdout.readline()
      time.sleep(draw.random() / 50)
      process.send_signal(number)
      _, err = process.communicate(timeout=60)
      in_order = number == signal.SIGTERM and ': round ' in line
      # Before the first round nothing listens: there is nothing to save.
      wanted = {0, 143} if in_order else {0, 143, -number}
      self.assertIn(process.returncode, wanted, f'{seed}: {err}')
    last = start('cut')
    _, err = last.communicate(timeout=300)
    self.assertEqual(last.returncode, 0, err)
    self.assert_same('whole', 'cut')
    rounds = [
      json.loads(line)['round']
      for line in (self.folder / 'cut/metrics.jsonl').read_text().splitlines()
    ]
    self.assertEqual(rounds, list(range(1, 401)))


if __name__ == '__main__':
  absltest.main()
