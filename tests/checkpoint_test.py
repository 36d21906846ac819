"""Tests of checkpoints: exact restoration, and refusals that name the
reason."""

import os
import pathlib
import resource
import shutil
import signal
import threading
import time

from absl.testing import absltest, parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from fedftg_jax import base, checkpoint

NOTE = {'seed': 3, 'method': 'fed_avg'}


def make_state(scale=1.0):
  return base.State(
    base.Variables({'w': scale * jnp.arange(6.0).reshape(2, 3) / 7}, {}),
    ((), {'count': jnp.int32(4), 'mask': jnp.array([True, False])}),
    (np.arange(5, dtype=np.uint8), jnp.zeros((0, 2)), jnp.float32('nan')),
    jnp.int32(2),
  )


class CheckpointTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path) / 'run' / 'kept'

  def save(self, *rounds, keep=2):
    for round_ in rounds:
      checkpoint.save(self.folder, round_, make_state(round_), NOTE)
      checkpoint.prune(self.folder, round_, keep)

  def test_back_bit_for_bit(self):
    self.save(2, 4)
    self.assertEqual(checkpoint.rounds(self.folder), [2, 4])
    like = jax.eval_shape(make_state)
    for round_ in (2, 4):
      got = checkpoint.restore(self.folder, round_, like, NOTE)
      chex.assert_trees_all_equal(got, jax.device_get(make_state(round_)))
      chex.assert_trees_all_equal_dtypes(got, make_state())

  def test_the_last_ones_are_kept(self):
    self.assertEqual(checkpoint.rounds(self.folder), [])
    (self.folder / '3.orbax-checkpoint-tmp').mkdir(parents=True)
    self.save(2, 10, 4, keep=2)
    # Of the rounds up to 4, two are kept.
    self.assertEqual(checkpoint.rounds(self.folder), [2, 4, 10])
    self.assertCountEqual(os.listdir(self.folder), ['2', '4', '10'])
    self.save(10, keep=1)
    self.assertEqual(checkpoint.rounds(self.folder), [10])

  def assert_refused(self, why, like=None, note=NOTE):
    like = make_state() if like is None else like
    with self.assertRaisesRegex(checkpoint.Refused, f'kept/2: {why}'):
      checkpoint.restore(self.folder, 2, like, note)

  def test_of_something_else(self):
    self.save(2)
    why = 'is the checkpoint of another run; these differ: seed'
    self.assert_refused(why, note={**NOTE, 'seed': 4})
    state = make_state()
    wider = state._replace(
      variables=state.variables._replace(params={'w': jnp.zeros((2, 4))})
    )
    self.assert_refused(
      r'variables.params.w is float32\[2, 3\], not float32\[2, 4\]', wider
    )
    shared, counts = state.shared
    self.assert_refused(
      r'shared.1.count is int32\[\], not float32\[\]',
      (state._replace(shared=(shared, {**counts, 'count': jnp.float32(4)}))),
    )
    self.assert_refused(
      'lacks variables.params.b',
      state._replace(
        variables=state.variables._replace(
          params={'w': state.variables.params['w'], 'b': jnp.zeros(2)}
        )
      ),
    )
    self.assert_refused(
      'has variables.params.w', state._replace(variables=base.Variables({}, {}))
    )

  def test_every_damaged_file_is_noticed(self):
    """A file that is truncated, emptied or changed in a byte is refused or
    harmless."""
    self.save(2)
    whole = self.folder.parent / 'whole'
    shutil.move(self.folder, whole)
    files = [p for p in whole.rglob('*') if p.is_file() and p.stat().st_size]
    self.assertGreater(len(files), 4)
    refused = 0
    for file in files:
      for damage in (
        lambda b: b[: len(b) // 2],
        lambda b: b'',
        lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:],
      ):
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(whole, self.folder)
        victim = self.folder / file.relative_to(whole)
        victim.write_bytes(damage(victim.read_bytes()))
        try:
          got = checkpoint.restore(self.folder, 2, make_state(), NOTE)
          chex.assert_trees_all_equal(got, jax.device_get(make_state(2)))
        except checkpoint.Refused:
          refused += 1
    self.assertGreater(refused, 5)

  def test_other_arrays_of_the_same_shapes(self):
    self.save(2, 4)
    shutil.rmtree(self.folder / '2' / 'arrays')
    shutil.copytree(self.folder / '4' / 'arrays', self.folder / '2' / 'arrays')
    self.assert_refused('is damaged: arrays/')
    (self.folder / '2' / 'digests.json').unlink()
    self.assert_refused('is damaged: its arrays are not those that were saved')

  def test_a_missing_one(self):
    self.assert_refused('cannot be read')
    (self.folder / '2').mkdir(parents=True)
    self.assert_refused('cannot be read')

  def test_a_full_disk_loses_nothing(self):
    self.save(2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
      with self.assertRaisesRegex(
        OSError, 'the checkpoint of round 4 cannot be written .*File too large'
      ):
        checkpoint.save(
          self.folder, 4, {'noise': np.random.RandomState(0).rand(10_000)}, NOTE
        )
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, before)
    checkpoint.restore(self.folder, 2, make_state(), NOTE)
    self.save(4)
    self.assertCountEqual(os.listdir(self.folder), ['2', '4'])

  def test_ctrl_c_lets_it_end(self):
    """The signal arrives while the folder is incomplete; it is completed
    first."""
    self.save(2)
    caught = []

    def interrupt():
      deadline = time.time() + 60
      while time.time() < deadline and not caught:
        caught.extend(n for n in os.listdir(self.folder) if n.startswith('4.'))
      os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    try:
      with self.assertRaises(KeyboardInterrupt):
        thread.start()
        checkpoint.save(self.folder, 4, make_state(4), NOTE)
        thread.join()
    finally:
      thread.join()
      signal.signal(signal.SIGINT, before)
    self.assertTrue(caught)
    self.assertCountEqual(os.listdir(self.folder), ['2', '4'])
    checkpoint.restore(self.folder, 4, make_state(), NOTE)


if __name__ == '__main__':
  absltest.main()
