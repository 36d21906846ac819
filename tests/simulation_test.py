"""One call from Python: the same bytes as the program, objects for names,
callbacks, trackers."""

import contextlib
import importlib.util
import inspect
import io
import json
import os
import pathlib
import struct
import subprocess
import sys
import tempfile

from absl.testing import absltest, parameterized
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedftg_jax
from fedftg_jax import base, models, recipes
from fedftg_jax.configuration import flags as flags_lib
from fedftg_jax.configuration import resolve
from fedftg_jax.data import datasets
from fedftg_jax.data import images as images_lib
from fedftg_jax.models import modules
from fedftg_jax.programs import compare, evaluate, train
from fedftg_jax.results import rows as rows_lib
from fedftg_jax.runs import callbacks
from fedftg_jax.system import files, own_flags
from tests import programs

SMALL = {
  'num_clients': 4,
  'cohort': 2,
  'model': 'mlp',
  'rounds': 3,
  'local_epochs': 1,
  'batch_size': 10,
  'eval_every': 2,
  'dirichlet_alpha': 1,
  'method': 'fed_avg',
  'evaluate_clients': 'none',
}
# What says how long it took, or where data come from.
NOT_THE_SAME = (
  'timings.jsonl',
  'summary.json',
  'report.html',
  'ro-crate-metadata.json',  # written with report.html
  'table.md',
)


class Dense(nn.Module):
  """A linear layer, and nothing that the library asks for."""

  scale: float = 1.0

  @nn.compact
  def __call__(self, x):
    return self.scale * nn.Dense(3)(x.reshape(len(x), -1))


class Normed(nn.Module):
  """A BatchNorm, of a module that knows nothing of masks."""

  @nn.compact
  def __call__(self, x, train: bool):
    x = nn.Dense(4)(x.reshape(len(x), -1))
    x = nn.BatchNorm(use_running_average=not train)(x)
    return nn.Dense(3, name='head')(nn.relu(x))


class DenseOfNnx(nnx.Module):
  def __init__(self, *, rngs):
    self.head = nnx.Linear(64, 3, rngs=rngs)

  def __call__(self, x):
    return self.head(x.reshape(len(x), -1))


class NormedOfNnx(nnx.Module):
  def __init__(self, rngs):
    self.norm = nnx.BatchNorm(64, rngs=rngs)

  def __call__(self, x):
    return self.norm(x.reshape(len(x), -1))


class Dropping(nn.Module):
  @nn.compact
  def __call__(self, x, deterministic=True):
    x = nn.Dense(3)(x.reshape(len(x), -1))
    return nn.Dropout(0.5)(x, deterministic=deterministic)


class DroppingOfNnx(nnx.Module):
  def __init__(self, rngs):
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    return self.dropout(x.reshape(len(x), -1)[:, :3])


class Asking(nn.Module):
  @nn.compact
  def __call__(self, x, temperature):
    return x / temperature


def pull(mu):
  """A local method of one's own, FedProx by hand."""

  def penalty(variables, output, batch, view, key):
    distance = optax.tree.sub(variables.params, view.received.params)
    return mu / 2 * optax.tree.norm(distance, squared=True)

  return base.Method(penalty=penalty)


def content(folder, *without):
  return {
    path.name: path.read_bytes()
    for path in pathlib.Path(folder).iterdir()
    if path.is_file() and path.name not in (*NOT_THE_SAME, *without)
  }


class SimulateCase(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    temporary = tempfile.TemporaryDirectory()
    cls.addClassCleanup(temporary.cleanup)
    cls.folder = pathlib.Path(temporary.name)
    cls.path = programs.write_data(cls.folder)
    with np.load(cls.path) as data:
      cls.arrays = tuple(
        data[name] for name in ('train_x', 'train_y', 'test_x', 'test_y')
      )

  def simulate(self, dataset=None, **changes):
    """A small run, without pictures on the way."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
      return fedftg_jax.simulate(
        dataset or f'npz:{self.path}', **{**SMALL, **changes}
      )


class SameBytesTest(SimulateCase):
  def program(self, name, **changes):
    status, _, err = programs.call(
      train,
      *(f'--{k}={v}' for k, v in {**SMALL, **changes}.items()),
      f'--dataset=npz:{self.path}',
      f'--workdir={self.folder / name}',
      draw=True,
    )
    self.assertEqual(status, 0, err)
    return self.folder / name

  def test_of_a_generating_method(self):
    options = {
      'method': 'fed_avg+fed_ftg',
      'ftg_iterations': 1,
      'ftg_student_steps': 1,
      'generator_width': 2,
      'noise_dim': 4,
      'evaluate_clients': 'final',
    }
    there = self.program('program', **options)
    run = self.simulate(workdir=self.folder / 'call', **options)
    self.assertEqual(content(there), content(run.folder))
    self.assertIn('params.npz', content(there))
    with self.subTest('what the object says'):
      self.assertEqual(run.metrics['test_accuracy'].tolist(), [
        row['test_accuracy'] for row in run.rows
      ])  # fmt: skip
      self.assertEqual(run.images.shape, (3, 8, 8, 8, 1))
      self.assertEqual(run.images.max(), 255)
      self.assertIn('fed_avg+fed_ftg', repr(run))
      self.assertIn('data:image/png;base64,', run._repr_html_())
      self.assertTrue(run.report().exists())
    with self.subTest('finished: nothing is trained'):
      again = self.simulate(workdir=self.folder / 'call', **options)
      self.assertEqual(again.rows, run.rows)

  def test_of_arrays_in_memory(self):
    there = self.program('npz')
    run = self.simulate(self.arrays)
    for name in ('metrics.jsonl', 'params.npz', 'partition.npz'):
      self.assertEqual(
        (there / name).read_bytes(), (run.folder / name).read_bytes(), name
      )
    folder = run.folder
    self.assertFalse((folder / 'checkpoints').exists())
    del run
    self.assertFalse(folder.exists())  # goes with the object

  def test_goes_on(self):
    whole = self.simulate(rounds=4, workdir=self.folder / 'whole')
    for rounds in 2, 4:
      run = self.simulate(
        rounds=rounds, checkpoint_every=2, workdir=self.folder / 'parts'
      )
    self.assertEqual(content(whole.folder), content(run.folder))

  def test_from_yaml(self):
    file = self.folder / 'some.yaml'
    file.write_text('rounds: 2\nlearning_rate: 1e-2\nnesterov: no\n')
    changes = {'rounds': None, 'config': file}
    run = self.simulate(**{k: v for k, v in changes.items() if v}, rounds=1)
    self.assertEqual(run.config['rounds'], 1)  # an argument goes before
    self.assertEqual(run.config['learning_rate'], 0.01)


class ObjectsTest(SimulateCase):
  def test_predict_and_evaluate(self):
    run = self.simulate()
    x, y = self.arrays[2:]
    found = run.predict(x)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-6)
    last = run.rows[-1]
    hits = np.mean(found.argmax(1) == y)
    self.assertAlmostEqual(hits, last['test_accuracy'], places=5)
    for scores in (run.evaluate(), run.evaluate((x, y))):
      self.assertEqual(scores['accuracy'], last['test_accuracy'])
      self.assertEqual(scores['loss'], last['test_loss'])
      self.assertEqual(scores['class_accuracy'], last['class_accuracy'])
      self.assertEqual(np.trace(scores['confusion']), round(30 * hits))
    with self.assertRaisesRegex(ValueError, r'\[M, 8, 8, 1\] of uint8'):
      run.predict(x / 255)
    with self.assertRaisesRegex(ValueError, 'from 0 to 2'):
      run.evaluate((x, y + 1))
    axes = run.plot()
    self.assertEqual(list(axes.lines[0].get_xdata()), [2, 3])

  @parameterized.parameters(
    (lambda: Dense(), 'none'),
    (lambda: Normed(), 'batch'),
    (lambda: DenseOfNnx, 'none'),
  )
  def test_modules(self, make, norm):
    run = self.simulate(model=make())
    self.assertGreater(run.rows[-1]['test_accuracy'], 0.5)
    self.assertEqual(run.config['norm'], norm)
    hits = run.predict(self.arrays[2]).argmax(1) == self.arrays[3]
    self.assertAlmostEqual(hits.mean(), run.rows[-1]['test_accuracy'], places=5)

  def test_a_module_that_is_made(self):
    """Every seed begins with its weights."""
    module = DenseOfNnx(rngs=nnx.Rngs(7))
    begun = np.array(module.head.kernel[...])
    run = self.simulate(model=module, rounds=1, learning_rate=0.0)
    np.testing.assert_array_equal(run.variables.params['head']['kernel'], begun)

  def test_padding_does_not_count(self):
    """Where a module has BatchNorm, but no mask."""
    model = modules.from_module(Normed(), (8, 8, 1), 3)
    variables = model.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    mask = jnp.array([True, True, True, False])
    (a, b), (whole, _) = (
      [
        model.apply(variables, x.at[3].set(value), mask=m, train=True)
        for value in (0.0, 9.0)
      ]
      for m in (mask, None)
    )
    np.testing.assert_array_equal(a.logits[:3], b.logits[:3])
    for p, q, r in zip(*(jax.tree.leaves(o.stats) for o in (a, b, whole))):
      np.testing.assert_array_equal(p, q)
      self.assertGreater(np.abs(p - r).max(), 1e-4)

  def test_is_known_by_what_it_computes(self):
    folder = self.folder / 'module'
    run = self.simulate(model=Dense(), workdir=folder)
    again = self.simulate(model=Dense(), workdir=folder)
    self.assertEqual(run.rows, again.rows)
    with self.assertRaisesRegex(ValueError, 'another configuration .comput'):
      self.simulate(model=Dense(2.0), workdir=folder)
    with self.assertRaisesRegex(
      ValueError, 'was trained with a module of its program'
    ):
      fedftg_jax.load_run(folder).predict(self.arrays[2])
    loaded = fedftg_jax.load_run(folder, model=Dense())
    np.testing.assert_array_equal(
      loaded.predict(self.arrays[2]), run.predict(self.arrays[2])
    )

  def test_own_method(self):
    """FedProx by hand is FedProx; alone it gets FedAvg's mean."""
    named = self.simulate(method='fed_prox', prox_mu=0.1)
    own = self.simulate(method=pull(0.1))
    self.assertEqual(own.config['method'], 'part:pull')
    self.assertEqual(
      [row['test_loss'] for row in own.rows],
      [row['test_loss'] for row in named.rows],
    )
    self.assertNotEqual(
      named.rows[-1]['test_loss'], self.simulate().rows[-1]['test_loss']
    )

  def test_names_of_own_parts(self):
    whole = base.chain(fedftg_jax.fed_avg(), pull(1.0))
    named = recipes.name_own([pull(1.0), pull(2.0), whole])
    self.assertEqual(list(named), ['part:pull', 'part:pull2', 'method:chain'])
    self.assertEqual(
      recipes.parse('fed_ftg+part:pull'), ['fed_avg', 'part:pull', 'fed_ftg']
    )
    self.assertEqual(recipes.parse('method:chain'), ['method:chain'])

  def test_other_models_of_the_last_round(self):
    run = self.simulate(method='running_average', average_decay=0.5)
    (name,) = run.models
    self.assertEqual(name, 'running_average')
    scores = run.evaluate(self.arrays[2:], model=run.models[name])
    row = run.rows[-1]
    self.assertEqual(scores['accuracy'], row['accuracy'][name])
    self.assertNotEqual(scores['loss'], row['test_loss'])
    self.assertEmpty(self.simulate(rounds=1).models)  # FedAvg's is broadcast

  def test_personal(self):
    run = self.simulate(method='ditto', rounds=1)
    own = run.personal(1)
    (name,) = own
    found = run.predict(self.arrays[2], own[name])
    self.assertGreater(np.abs(found - run.predict(self.arrays[2])).max(), 1e-4)
    with self.assertRaisesRegex(ValueError, 'has no client 9'):
      run.personal(9)

  def test_fingerprints(self):
    dataset = datasets.from_arrays(self.arrays)
    x, *others = self.arrays
    changed = x.copy()
    changed[0, 0, 0] ^= 1
    other = datasets.from_arrays((changed, *others))
    self.assertNotEqual(*map(datasets.fingerprint, (dataset, other)))
    self.assertEqual(
      datasets.fingerprint(dataset),
      datasets.fingerprint(datasets.load(f'npz:{self.path}')),
    )


class CompareTest(SimulateCase):
  def compare(self, methods, name, **changes):
    with contextlib.redirect_stdout(io.StringIO()):
      return fedftg_jax.compare(
        methods,
        **{**SMALL, 'dataset': f'npz:{self.path}', **changes},
        workdir=str(self.folder / name),
      )

  def test_same_bytes_as_the_program(self):
    methods = {
      'fed_avg': 'fed_avg',
      'fed_prox:prox_mu=0.5': {'method': 'fed_prox', 'prox_mu': 0.5},
    }
    several = {'seeds': 2, 'seed': 1, 'vary_partition': True, 'rounds': 2}
    flags = {k: v for k, v in SMALL.items() if k != 'method'} | several
    status, _, err = programs.call(
      compare,
      *(f'--{k}={v}' for k, v in flags.items()),
      f'--methods={",".join(methods)}',
      f'--dataset=npz:{self.path}',
      f'--workdir={self.folder / "program"}',
    )
    self.assertEqual(status, 0, err)
    got = self.compare(methods, 'call', **several)
    there = self.folder / 'program'
    summary, own = (
      {
        k: v for k, v in files.read_json(f / 'summary.json').items()
        if k != 'methods'
      }
      for f in (there, got.folder)
    )  # fmt: skip
    self.assertEqual(summary, own)
    for place in ('fed_avg/seed2', 'fed_prox_prox_mu=0.5/seed1'):
      for name in ('params.npz', 'metrics.jsonl', 'partition.npz'):
        self.assertEqual(
          (there / place / name).read_bytes(),
          (got.folder / place / name).read_bytes(),
          place,
        )
    self.assertEqual([*got.runs], [*methods])
    self.assertEqual([r.config['seed'] for r in got.runs['fed_avg']], [1, 2])
    self.assertIn('Compared with fed_avg over 2 seeds', repr(got))
    self.assertTrue(got.report().exists())

  def test_own_method_and_resume(self):
    methods = {'FedAvg': {}, 'mine': {'method': pull(0.5), 'momentum': 0.5}}
    rounds = []
    first = self.compare(
      methods,
      'own',
      rounds=1,
      callbacks=[lambda row, run: rounds.append(row['round'])],
    )
    self.assertEqual(rounds, [1, 1])
    kept = (first.folder / 'mine/seed0/params.npz').stat().st_mtime_ns
    again = self.compare(methods, 'own', rounds=1)
    self.assertEqual(
      (again.folder / 'mine/seed0/params.npz').stat().st_mtime_ns, kept
    )
    self.assertEqual(again.runs['mine'][0].config['method'], 'part:pull')
    self.assertIn('applies pull, an own method', again.report().read_text())
    self.assertRegex(repr(again), r'^FedAvg: \d.*\nmine: \d+\.\d\d %')

  @parameterized.parameters(
    ({}, {}, 'methods.*must map at least one name'),
    (['fed_avg'], {}, 'methods.*must map at least one name'),
    ({'..': 'fed_avg'}, {}, 'methods=..: must be a name that can be a folder'),
    ({1: 'fed_avg'}, {}, 'methods=1: must be a name'),
    ({'summary.json': 'fed_avg'}, {}, 'must be a name that can be'),
    ({'a b': 'fed_avg', 'a:b': 'fed_prox'}, {}, 'methods=a:b: must be a name'),
    ({'a': {'seed': 7}}, {}, 'seed=7: must be the same for all methods'),
    ({'a': {'workdir': 'b'}}, {}, 'workdir=b: must be the same'),
    (
      {'a': 'fed_avg', 'b': 'fed_gen'},
      {'model': Dense()},
      'needs a model that has a head',
    ),
    (
      {'a': 'fed_avg', 'b': {'rounds': 9}},
      {},
      'rounds=9: b must have the same',
    ),
    ({'a': 'fed_avg', 'b': {'dirichlet_alpha': 9}}, {}, 'dirichlet_alpha=9'),
    ({'a': 'fed_avg', 'b': 'fed_avgg'}, {}, 'did you mean fed_avg'),
    ({'a': 'fed_avg'}, {'seeds': 0}, 'seeds=0: must be an integer of at'),
    ({'a': 'fed_avg'}, {'seeds': 1.5}, 'seeds=1.5: must be an integer'),
  )
  def test_refused_before_any_training(self, methods, changes, why):
    with self.assertRaisesRegex(ValueError, why):
      self.compare(methods, 'refused', **changes)
    self.assertFalse((self.folder / 'refused').exists())


class RefusedTest(SimulateCase):
  @parameterized.parameters(
    ({'rounds': 0}, ValueError),
    ({'rounds': 'many'}, ValueError),
    ({'rounds': 2.5}, ValueError),
    ({'cohort': 9}, ValueError),
    ({'model': 'lent'}, ValueError),
    ({'method': 'fed_avgg'}, ValueError),
    ({'momentum': 1.0}, ValueError),
    ({'partition': 'file:no'}, ValueError),
    ({'dataset': 'arrays:ab'}, ValueError),
    ({'method': 'part:mine'}, ValueError),
    ({'preset': 'dem'}, ValueError),
    ({'config': 'no.yaml'}, ValueError),
  )
  def test_as_the_program_says(self, wrong, kind):
    flags = {'dataset': f'npz:{self.path}', **SMALL, **wrong}
    with self.assertRaises(kind) as caught:
      fedftg_jax.simulate(**flags)
    status, _, err = programs.call(
      train,
      *(f'--{k}={v}' for k, v in flags.items()),
      f'--workdir={self.folder / "refused"}',
    )
    self.assertEqual(status, 2)
    self.assertEqual(err.strip(), f'error: {caught.exception}')

  def test_unknown_argument(self):
    for wrong, meant in (('lr', 'learning_rate'), ('ronds', 'rounds')):
      with self.assertRaisesRegex(TypeError, f'did you mean {meant}'):
        fedftg_jax.simulate(**{wrong: 1})

  @parameterized.parameters(
    ({'model': Dropping()}, 'draws random numbers during training'),
    ({'model': DroppingOfNnx}, 'variables of type RngCount, RngKey'),
    ({'model': NormedOfNnx}, 'takes no mask'),
    ({'model': Asking()}, 'needs temperature'),
    ({'model': nn.Dense(3)}, r'gives \[2, 8, 8, 3\] for 2 images'),
    ({'model': 3}, 'int is no model'),
    ({'model': Dense}, 'Dense is a class of flax.linen; must be a module'),
    ({'model': Dense(), 'norm': 'batch'}, 'is a flag of models by name'),
    ({'model': Dense(), 'method': 'moon'}, 'needs a model that has features'),
    ({'model': Normed(), 'dp_clip': 1.0}, 'must not be batch'),
    ({'method': pull(1.0), 'dp_clip': 1.0}, 'cannot protect part:pull'),
    ({'method': ['fed_avg', 3]}, 'must be a name, a base.Method'),
  )
  def test_objects(self, wrong, why):
    with self.assertRaisesRegex(ValueError, why):
      self.simulate(**wrong)

  @parameterized.parameters(
    (lambda x, *rest: (x[..., 0], *rest), r'get their channel by x\[..., None'),
    (lambda *arrays: arrays[:3], 'arrays: must be .train_x, train_y, test_x'),
    (lambda x, y, *rest: (x, y + 0.5, *rest), 'must be one integer for each'),
  )
  def test_arrays(self, change, why):
    with self.assertRaisesRegex(ValueError, why):
      self.simulate(change(*self.arrays))

  def test_says_what_changes_nothing(self):
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
      self.simulate(rounds=1, prox_mu=0.3)
    self.assertIn('note: --prox_mu: used by no method', err.getvalue())

  def test_a_folder_that_is_no_run(self):
    with self.assertRaisesRegex(ValueError, 'must be the folder of a run'):
      fedftg_jax.load_run(self.folder)

  def test_signature_has_every_flag(self):
    parameters = inspect.signature(fedftg_jax.simulate).parameters
    for names in flags_lib.SECTIONS.values():
      for name in names:
        self.assertEqual(
          parameters[name].default, own_flags.FLAGS[name].default, name
        )

  def test_beside_flags_of_the_same_names(self):
    """A program's own flags stay what they are."""
    code = (
      'from absl import flags\n'
      'flags.DEFINE_string("seed", "mine", "")\n'
      'flags.DEFINE_string("config", "mine", "")\n'
      'import fedftg_jax\n'
      'try:\n'
      '  fedftg_jax.simulate(rounds=0)\n'
      'except ValueError as error:\n'
      '  print(error)\n'
      'flags.FLAGS(["program", "--seed=other"])\n'
      'print(flags.FLAGS.seed, "rounds" in flags.FLAGS)\n'
    )
    done = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True, check=True
    )
    self.assertEqual(
      done.stdout, '--rounds=0: must be a positive integer\nother False\n'
    )


class CallbacksTest(SimulateCase):
  def test_a_function(self):
    seen = []

    def look(row, run):
      found = run.model.apply(run.variables, self.arrays[2]).logits.argmax(-1)
      seen.append((row, np.mean(found == self.arrays[3])))
      self.assertEqual(run.rows[-1], row)
      self.assertEqual(run.config['method'], 'fed_avg')

    run = self.simulate(callbacks=[look])
    self.assertEqual([row for row, _ in seen], run.rows)
    for row, accuracy in seen:
      self.assertAlmostEqual(accuracy, row['test_accuracy'], places=5)

  def test_a_tracker_is_told_of_the_end(self):
    told = []

    class Tracker(callbacks.Tracker):
      def start(self, run):
        told.append(('start', len(run.rows)))

      def __call__(self, row, run):
        told.append(row['round'])
        if row['round'] == stop_after:
          raise KeyError('stop')

      def finish(self, run, failed):
        told.append(('finish', failed, (run.folder / 'summary.json').exists()))

    stop_after = None
    self.simulate(callbacks=[Tracker()])
    self.assertEqual(told, [('start', 0), 2, 3, ('finish', False, True)])
    told.clear()
    stop_after = 2
    with self.assertRaises(KeyError):
      self.simulate(callbacks=[Tracker()])
    self.assertEqual(told, [('start', 0), 2, ('finish', True, False)])

  def test_a_package_that_is_missing(self):
    for tracker in callbacks.WandB('mine'), callbacks.MLflow('mine'):
      with (
        absltest.mock.patch.dict(sys.modules, {'wandb': None, 'mlflow': None}),
        self.assertRaisesRegex(
          RuntimeError, r"is not installed: pip install 'fedftg_jax\["
        ),
      ):
        self.simulate(callbacks=[tracker])
    found = importlib.util.find_spec
    with (
      absltest.mock.patch.object(
        importlib.util, 'find_spec', lambda n: n != 'wandb' and found(n)
      ),
      self.assertRaisesRegex(ValueError, '--wandb=mine: needs wandb: pip inst'),
    ):
      self.simulate(wandb='mine')

  @parameterized.parameters('wandb', 'mlflow')
  def test_images(self, name):
    """Generated images are logged beside the row of their round."""
    if not importlib.util.find_spec(name):
      self.skipTest(f'needs {name}')
    folder = pathlib.Path(self.create_tempdir().full_path)
    tracker = {
      'wandb': lambda: callbacks.WandB('p', mode='offline', dir=str(folder)),
      'mlflow': lambda: callbacks.MLflow('e', f'sqlite:///{folder}/ml.db'),
    }[name]()
    row, images = (
      {'round': 2, 'test_accuracy': 0.5},
      np.zeros((3, 8, 8, 1), 'u1'),
    )
    run = callbacks.Context(
      folder, {'method': 'fed_ftg'}, 0, None, (), [row], [row], {2: images}
    )
    with (
      contextlib.chdir(folder),
      absltest.mock.patch.dict(os.environ, programs.QUIET),
    ):
      with callbacks.following([tracker], run._replace(rows=[]), lambda: run):
        tracker(row, run)
    (path,) = folder.rglob('*generated*2*.png' if name == 'mlflow' else '*.png')
    self.assertEqual(images_lib.decode(path).shape, (8, 24, 3))

  @absltest.skipUnless(importlib.util.find_spec('wandb'), 'needs wandb')
  def test_wandb(self):
    """Offline, its file read as it is written: a log of blocks."""
    import wandb

    wandb.teardown()  # it reads its environment once
    self.addCleanup(wandb.teardown)
    place = self.folder / 'wandb_home'
    place.mkdir()
    with absltest.mock.patch.dict(
      os.environ, programs.QUIET, WANDB_DIR=str(place), WANDB_MODE='offline'
    ):
      for rounds in 2, 3:  # goes on under the same id
        run = self.simulate(
          rounds=rounds,
          checkpoint_every=2,
          wandb='project',
          workdir=self.folder / 'of_wandb',
        )
    wandb.teardown()  # its service writes what is left
    history, config, names = [], {}, set()
    logs = sorted(place.glob('wandb/offline-run-*/run-*.wandb'))
    self.assertLen(logs, 2)
    for path in logs:
      names.add(path.name)
      for record in wandb_records(path):
        config |= {
          item.key: item.value_json for item in record.run.config.update
        }
        if record.history.item:
          history.append(
            {
              '/'.join([item.key] if item.key else item.nested_key): json.loads(
                item.value_json
              )
              for item in record.history.item
            }
          )
    self.assertLen(names, 1)
    self.assertEqual(json.loads(config['method']), 'fed_avg')
    self.assertLen(history, len(run.rows))
    for logged, row in zip(history, run.rows):
      for name, value in rows_lib.flat(row).items():
        self.assertEqual(logged[name], value, name)
      self.assertIn('train_seconds', logged)

  @absltest.skipUnless(importlib.util.find_spec('mlflow'), 'needs mlflow')
  def test_mlflow(self):
    import mlflow

    home = self.folder / 'mlflow'
    uri = f'sqlite:///{home}.db'
    tracker = callbacks.MLflow('experiment', uri)
    with (
      contextlib.chdir(self.folder),  # where artifacts go by default
      absltest.mock.patch.dict(os.environ, programs.QUIET),
    ):
      for rounds in 2, 3:
        run = self.simulate(
          rounds=rounds,
          checkpoint_every=2,
          callbacks=[tracker],
          workdir=self.folder / 'of_mlflow',
        )
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name('experiment')
    (there,) = client.search_runs([experiment.experiment_id])
    self.assertEqual(there.info.status, 'FINISHED')
    self.assertEqual(there.data.params['method'], 'fed_avg')
    for name in ('test_accuracy', 'bytes_up'):
      logged = client.get_metric_history(there.info.run_id, name)
      self.assertEqual(
        [(metric.step, metric.value) for metric in logged],
        [(row['round'], row[name]) for row in run.rows],
      )
    self.assertEqual(
      there.data.metrics['final_accuracy'], run.summary['final_accuracy']
    )


def wandb_records(path):
  """The records of a file of Weights & Biases, which are laid out in blocks as
  LevelDB's log: checksum, length and kind before each part."""
  from wandb.proto import wandb_internal_pb2

  data, place, record = path.read_bytes(), 7, b''
  while place < len(data):
    left = 2**15 - place % 2**15
    if left < 7:
      place += left
      continue
    _, length, kind = struct.unpack('<IHB', data[place : place + 7])
    record += data[place + 7 : place + 7 + length]
    place += 7 + length
    if kind in (1, 4):  # whole, or the last part
      yield wandb_internal_pb2.Record.FromString(record)
      record = b''


class EvaluateTest(SimulateCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    with contextlib.redirect_stdout(io.StringIO()):
      cls.trained = fedftg_jax.simulate(
        f'npz:{cls.path}', **SMALL, workdir=cls.folder / 'run'
      )

  def call(self, *flags):
    return programs.call(evaluate, str(self.folder / 'run'), *flags)

  def test_its_own_data(self):
    status, out, err = self.call()
    self.assertEqual(status, 0, err)
    last = self.trained.rows[-1]
    self.assertIn(f'{100 * last["test_accuracy"]:.2f}', out)
    (path,) = (self.folder / 'run' / 'evaluations').glob('*-test.json')
    scores = files.read_json(path)
    self.assertEqual(scores['loss'], last['test_loss'])
    self.assertEqual(np.sum(scores['confusion']), 30)

  def test_says_what_it_does_not_use(self):
    _, _, err = self.call('--train_examples=10', '--split=train')
    self.assertEqual(err, 'note: --train_examples: not used by evaluate\n')

  def test_images_of_the_training_are_named(self):
    with contextlib.redirect_stdout(io.StringIO()):
      fedftg_jax.simulate(
        f'npz:{self.path}',
        **SMALL,
        merge_test=True,
        client_test_share=0.3,
        workdir=self.folder / 'merged',
      )
    status, out, err = programs.call(evaluate, str(self.folder / 'merged'))
    self.assertEqual(status, 0, err)
    self.assertIn('was trained on images of this data set (--merge_test)', out)

  def test_which_model(self):
    status, _, err = self.call('--which=running_average')
    self.assertEqual(status, 2)
    self.assertEqual(
      err, 'error: --which=running_average: must be one of broadcast\n'
    )

  def write(self, change):
    """--dataset of a data set whose splits are changed."""
    x, y, *test = self.arrays
    names = 'train_x', 'train_y', 'test_x', 'test_y'
    arrays = dict(zip(names, (*change(x, y), *change(*test))))
    path = pathlib.Path(self.create_tempdir().full_path, 'other.npz')
    np.savez(path, **arrays)
    return f'--dataset=npz:{path}'

  def test_other_data(self):
    """Images without what tells their classes apart."""
    flag = self.write(lambda x, y: (x * 0, y))
    status, out, err = self.call(flag, '--split=train')
    self.assertEqual(status, 0, err)
    self.assertRegex(out, r'accuracy, percent.*33\.33')

  @parameterized.named_parameters(
    ('shape', lambda x, y: (x[:, :6], y), r'must be .M, 8, 8, 1. of uint8'),
    ('type', lambda x, y: (x.astype('f4'), y), 'of float32'),
    ('classes', lambda x, y: (x, y // 2), 'has 2 classes, the model 3'),
  )
  def test_unlike(self, change, why):
    status, _, err = self.call(self.write(change))
    self.assertEqual(status, 2)
    self.assertRegex(err, '^error: --dataset=npz:.*' + why)
    self.assertEqual(err.count('\n'), 1)

  def test_no_run(self):
    status, _, err = programs.call(evaluate, str(self.folder))
    self.assertEqual(status, 2)
    self.assertIn('must be the folder of a run', err)

  def test_calibration_by_hand(self):
    found = fedftg_jax.evaluation.calibration(
      np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]]), np.array([0, 1, 1]), 2
    )
    # All lie in the upper bin: 2 of 3 right, said with 2.3 / 3.
    self.assertAlmostEqual(found['calibration_error'], 0.3 / 3)
    self.assertAlmostEqual(found['brier'], (0.02 + 1.28 + 0.32) / 3)


class YamlTest(parameterized.TestCase):
  def config(self, text, *flags):
    """What a program reads of a YAML file; an error's line."""
    path = self.create_tempfile(content=text).full_path
    module = absltest.mock.Mock(
      spec=['main', '__doc__'], main=lambda: print(dict(resolve.config()))
    )
    return programs.call(module, f'--config={path}', *flags)

  def test_values(self):
    text = (
      'method: fed_avg+fed_prox\nlearning_rate: 1e-2\nrounds: 7\n'
      'momentum: 0.9\nnesterov: yes\nprox_mu: null\n'
      'lwof_models: [mlp, lenet]\n'
    )
    status, out, err = self.config(text, '--rounds=8')
    self.assertEqual(status, 0, err)
    config = eval(out)  # printed above
    self.assertEqual(config['rounds'], 8)
    self.assertEqual(config['learning_rate'], 0.01)
    self.assertTrue(config['nesterov'])
    self.assertEqual(config['prox_mu'], 1e-4)

  def test_says_what_changes_nothing(self):
    path = self.create_tempfile(content='niid_bench: yes\nrounds: 1').full_path
    module = absltest.mock.Mock(
      spec=['main', '__doc__'],
      main=lambda: resolve.say_unused([resolve.config(method='fed_avg')]),
    )
    _, _, err = programs.call(module, f'--config={path}')
    self.assertIn('note: --niid_bench: used by no method', err)

  @parameterized.parameters(
    (
      'lerning_rate: 1',
      'lerning_rate: no such flag; did you mean learning_rate',
    ),
    ('rounds: 0', '--rounds=0: must be a positive integer'),
    ('- rounds', 'must have a line NAME: VALUE'),
    ('rounds: {a: 1}', "rounds is {'a': 1}; must be text, a number"),
    ('rounds: [', 'is not YAML'),
    ('a: !!python/object/apply:os.getcwd []', 'is not YAML'),
    ('config: other.yaml', "has the key 'config'; keys must be names"),
    ('3: 4', 'has the key 3; keys must be names'),
  )
  def test_refused(self, text, why):
    status, _, err = self.config(text)
    self.assertEqual(status, 2)
    self.assertIn(why, err)
    self.assertEqual(err.count('\n'), 1, err)

  def test_no_such_file(self):
    status, _, err = programs.call(train, '--config=no.yaml')
    self.assertEqual(status, 2)
    self.assertIn('--config=no.yaml: cannot be read: No such file', err)


class NnxModelTest(absltest.TestCase):
  def test_head_is_found(self):
    model = models.modules.from_nnx(DenseOfNnx, (8, 8, 1))
    self.assertIsNotNone(model.head)
    self.assertIsNone(model.features)


if __name__ == '__main__':
  absltest.main()
