"""Tests of runs of methods with personal models, their files and pages."""

import pathlib
import tempfile

from absl import flags as absl_flags
from absl.testing import absltest, parameterized
import numpy as np
import pytest

from fedftg_jax import models
from fedftg_jax.programs import train
from fedftg_jax.runs import personal
from fedftg_jax.system import files
from tests import programs


class SavedTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    absl_flags.FLAGS.mark_as_parsed()
    temporary = tempfile.TemporaryDirectory()
    cls.addClassCleanup(temporary.cleanup)
    cls.folder = pathlib.Path(temporary.name)
    cls.path = programs.write_data(cls.folder)
    cls.args = [*programs.small(cls.path), '--personalise']

  def train(self, name, *changes):
    run = self.folder / name
    status, _, err = programs.call(
      train, *self.args, f'--workdir={run}', *changes
    )
    return run, status, err

  def accuracy(self, saved, run, client):
    """Computes a loaded model's accuracy on the client's test examples.

    They are drawn as in the run.
    """
    with np.load(self.path) as data:
      x, y = data['test_x'], data['test_y']
      mean, std = (
        f(data['train_x'] / 255.0, (0, 1, 2)) for f in (np.mean, np.std)
      )
    model = models.build(saved.model, x.shape[1:], 3, mean=mean, std=std)
    hits = np.argmax(model.apply(saved.variables, x).logits, -1) == y
    counts = np.load(run / 'counts.npz')['test']
    rows = [  # of each class the clients' shares, one after the other
      np.flatnonzero(y == c)[counts[:client, c].sum() :][: counts[client, c]]
      for c in range(3)
    ]
    return np.mean(hits[np.concatenate(rows)])

  @parameterized.parameters(
    (['--method=p_fed_bred', '--me_kind=meg'], 'theta', 'mlp'),
    (
      ['--method=kd_lwof', '--lwof_models=softmax,mlp'],
      'custom',
      'softmax mlp',
    ),
  )
  def test_by_client(self, changes, name, architectures):
    self.check_by_client(changes, name, architectures)

  @pytest.mark.slow
  def test_of_three_architectures(self):
    self.check_by_client(
      ['--method=kd_lwof', '--lwof_models=softmax,lenet,mlp', '--train_all'],
      'custom',
      'softmax lenet mlp',
    )

  def check_by_client(self, changes, name, architectures):
    """The files are the same bytes wherever slots are.

    Loaded models have the accuracies that the run reports, and the page has a
    row for each client.
    """
    architectures = architectures.split()
    run, other = (
      self.train(
        f'{name}_{len(architectures)}_{place}',
        f'--client_state={place}',
        *changes,
      )[0]
      for place in ('device', 'disk')
    )
    for file in (personal.NAME, 'clients.json'):
      self.assertEqual((run / file).read_bytes(), (other / file).read_bytes())
    clients = files.read_json(run / 'clients.json')
    for k in range(4):
      saved = personal.load(run, k)
      self.assertEqual(list(saved), [name])
      model = architectures[k % len(architectures)]
      self.assertEqual(saved[name].model, model)
      want = clients['accuracy'][name][k]
      if want is not None:  # has test examples
        self.assertAlmostEqual(
          self.accuracy(saved[name], run, k), want, places=5
        )
    page = (run / 'report.html').read_text()
    expected = [name, f'personalised_{name}']
    for model in dict.fromkeys(architectures) if name == 'custom' else ():
      expected += [f'custom_{model}', f'personalised_custom_{model}']
    self.assertCountEqual(
      clients['accuracy'], ['broadcast', 'personalised', *expected]
    )
    for row in expected:
      self.assertIn(row, page.replace('<wbr>', ''))

  def test_on_request_none(self):
    run, status, err = self.train(
      'none', '--method=p_fed_me', '--nosave_personal', '--rounds=1'
    )
    self.assertEqual(status, 0, err)
    self.assertFalse((run / personal.NAME).exists())
    with self.assertRaisesRegex(ValueError, 'has no personal.npz: its method'):
      personal.load(run, 0)

  def test_a_client_that_is_not_there(self):
    run = self.folder / 'by_hand'
    run.mkdir()
    np.savez(run / personal.NAME, **{'000000/theta/model': 'mlp'})
    self.assertEqual(personal.load(run, 0)['theta'].model, 'mlp')
    with self.assertRaisesRegex(ValueError, 'has no client 4'):
      personal.load(run, 4)

  def test_methods_without_any(self):
    run, status, err = self.train('plain', '--method=fed_avg')
    self.assertEqual(status, 0, err)
    self.assertFalse((run / personal.NAME).exists())

  @parameterized.parameters(
    ('--method=p_fed_me', '--me_lam=0', '--me_lam=0.0: must be above 0'),
    ('--method=p_fed_bred', '--me_lr_p=0.2', 'must be at most 2 / --me_lam'),
    (
      '--method=p_fed_bred',
      '--server_learning_rate=0',
      '--server_learning_rate=0.0: must be above 0',
    ),
    ('--method=p_fed_me', '--momentum=0.5', 'its local steps have no momentum'),
    (
      '--method=p_fed_me+kd_lwof',
      '--rounds=3',
      'only one part can train in its own way, got p_fed_me and kd_lwof',
    ),
    ('--method=kd_lwof', '--lwof_models=mlp,lent', "no model 'lent': must be"),
    ('--method=kd_lwof', '--lwof_models=mlp,mlp', 'mlp is named twice'),
    (
      '--method=kd_lwof',
      '--lwof_models=mlp,lenet,softmax,resnet20,vgg11',
      '5 architectures for 4 clients: no client would have vgg11',
    ),
    ('--method=kd_lwof', '--lwof_alpha=2', '--lwof_alpha=2.0: must be at most'),
    ('--method=fed_mr', '--train_all', 'must be False with fed_mr'),
  )
  def test_refused(self, *flags):
    *flags, message = flags
    _, status, err = self.train('refused', *flags)
    self.assertEqual(status, 2)
    self.assertIn(message, err)
    self.assertFalse((self.folder / 'refused').exists())


if __name__ == '__main__':
  absltest.main()
