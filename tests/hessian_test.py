"""Tests of curvature: identities, and the program on the folder of a run."""

import pathlib
import shutil
import tempfile

from absl import flags as absl_flags
from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from fedftg_jax import second_order
from fedftg_jax.programs import compare, hessian, train
from fedftg_jax.system import files
from tests import problems, programs

KEY = jax.random.key(1)


class EstimatesTest(parameterized.TestCase):
  def test_diagonal_matrices_are_exact_with_one_probe(self):
    diagonal = {'a': jnp.array([3.0, -5.0]), 'b': jnp.array([[1.0], [4.0]])}
    product = lambda v: jax.tree.map(jnp.multiply, diagonal, v)
    found = second_order.traces(product, diagonal, KEY, 1)
    self.assertEqual(found.per_tensor, {'a': -2.0, 'b': 5.0})
    self.assertEqual((found.total, found.error), (3.0, 0.0))
    top = second_order.top_eigenvalue(product, diagonal, KEY, tolerance=1e-6)
    self.assertAlmostEqual(float(top.value), -5, places=4)  # by magnitude
    self.assertAlmostEqual(abs(float(top.vector['a'][1])), 1, places=3)

  def test_a_matrix_of_zeros(self):
    zero = lambda v: jax.tree.map(jnp.zeros_like, v)
    top = second_order.top_eigenvalue(zero, jnp.ones(3), KEY)
    self.assertEqual((top.value, int(top.iterations)), (0, 2))

  def test_across_clients_by_pairs(self):
    vectors = np.random.RandomState(0).normal(size=(4, 3))
    norms = np.linalg.norm(vectors, axis=1)
    pairs = [(i, j) for i in range(4) for j in range(4)]
    found = second_order.across_clients(jnp.asarray(vectors))
    np.testing.assert_allclose(
      found['H_N'],
      np.mean([(norms[i] - norms[j]) ** 2 for i, j in pairs]),
      1e-5,
    )
    cosines = [vectors[i] @ vectors[j] / norms[i] / norms[j] for i, j in pairs]
    np.testing.assert_allclose(found['H_D'], np.mean(cosines), 1e-5)
    alike = second_order.across_clients(jnp.ones((3, 2)))
    np.testing.assert_allclose([*alike.values()], [0, 1], atol=1e-6)

  def test_padding_and_batches_change_nothing(self):
    model = problems.LINEAR
    variables = model.init(KEY)
    row = problems.DATA._replace(
      index=problems.DATA.index[0], count=problems.DATA.count[0]
    )
    short = row._replace(index=row.index[: problems.SIZES[0]])
    a, b = (
      second_order.hessian_product(model, variables, data, size)(
        variables.params
      )
      for data, size in ((row, 3), (short, 7))
    )
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
      np.testing.assert_allclose(x, y, atol=1e-6)


class ProgramTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    absl_flags.FLAGS.mark_as_parsed()
    temporary = tempfile.TemporaryDirectory()
    cls.addClassCleanup(temporary.cleanup)
    cls.folder = pathlib.Path(temporary.name)
    cls.args = [
      *programs.small(programs.write_data(cls.folder)),
      '--method=scaffold',
      '--evaluate_clients=none',
    ]
    for name, every in (('whole', 2), ('kept', 1)):
      status, _, err = programs.call(
        train,
        *cls.args,
        f'--eval_every={every}',
        '--checkpoint_every=1',
        f'--workdir={cls.folder / name}',
      )
      assert status == 0, err

  def call(self, name, *args):
    few = '--examples=30', '--probes=3', '--iterations=5', '--clients=2'
    return programs.call(hessian, str(self.folder / name), *few, *args)

  @parameterized.parameters(('whole', 'initial'), ('kept', 'kept'))
  def test_what_it_writes(self, name, slots):
    """The last checkpoint of the first run is of round 2, not 3."""
    status, out, err = self.call(name)
    self.assertEqual(status, 0, err)
    self.assertIn('largest eigenvalue', out)
    found = files.read_json(self.folder / name / 'hessian.json')
    self.assertEqual((found['round'], found['examples']), (3, 30))
    self.assertGreater(found['top_eigenvalue'], 0)
    self.assertLen(found['per_tensor'], 6)
    self.assertAlmostEqual(
      sum(found['per_tensor'].values()), found['trace'], places=3
    )
    clients = found['clients']
    self.assertEqual(clients['slots'], slots)
    self.assertLen(set(clients['ids']), 2)
    self.assertBetween(clients['H_D'], 0, 1)
    self.assertGreater(clients['H_N'], 0)
    page = (self.folder / name / 'report.html').read_text()
    for text in ('Curvature', 'dense0', f'{clients["H_D"]:.4g}'):
      self.assertIn(text, page)

  def test_without_clients(self):
    self.assertEqual(self.call('kept', '--clients=0')[0], 0)
    found = files.read_json(self.folder / 'kept' / 'hessian.json')
    self.assertNotIn('clients', found)
    self.assertIn('Curvature', (self.folder / 'kept/report.html').read_text())

  def test_clients_that_train_no_model(self):
    status, _, err = programs.call(
      train,
      *self.args,
      '--method=fed_dm',
      '--dm_iterations=1',
      '--dm_server_epochs=1',
      '--rounds=1',
      f'--workdir={self.folder / "images"}',
    )
    assert status == 0, err
    status, out, err = self.call('images')
    self.assertEqual(status, 0, err)
    self.assertIn('the clients train no model', out + err)
    found = files.read_json(self.folder / 'images' / 'hessian.json')
    self.assertNotIn('clients', found)

  def test_trained_on_more_devices_than_there_are(self):
    shutil.copytree(self.folder / 'kept', self.folder / 'elsewhere')
    path = self.folder / 'elsewhere' / 'config.json'
    saved = files.read_json(path)
    saved['config']['num_devices'] = 64
    files.write_json(path, saved)
    for name in 'kept', 'elsewhere':
      status, _, err = self.call(name, '--clients=0')
      self.assertEqual(status, 0, err)
    self.assertEqual(
      files.read_json(self.folder / 'elsewhere' / 'hessian.json'),
      files.read_json(self.folder / 'kept' / 'hessian.json'),
    )

  def test_errors(self):
    folder = self.folder / 'empty'
    folder.mkdir()
    shutil.copy(self.folder / 'kept' / 'config.json', folder)
    methods = '--methods=fed_avg', '--rounds=1'
    status, _, err = programs.call(
      compare, *self.args, *methods, f'--workdir={self.folder / "both"}'
    )
    assert status == 0, err
    for name, text in (
      ('nothing', 'must be the folder of a run'),
      ('empty', 'has no model yet'),
      ('both', 'must be the folder of one run, such as METHOD'),
    ):
      with self.subTest(name):
        status, _, err = self.call(name)
        self.assertEqual(status, 2)
        self.assertIn(text, err)


if __name__ == '__main__':
  absltest.main()
