"""Tests of models: shapes, sizes, convolutions, and masked normalisation."""

import functools
import itertools
import re

from absl.testing import absltest, parameterized
import chex
from flax import linen as nn
from flax import nnx
import jax
from jax import enable_x64
import jax.numpy as jnp
import numpy as np
import pytest

from fedftg_jax import federation, losses, models
from fedftg_jax.models import (
  classifiers,
  convolution,
  layers,
  modules,
  resnet,
  windows,
  winograd,
)
from tests import problems

KEY = jax.random.key(0)
SMALL_RESNET = models.from_flax(
  resnet.ResNet(3, (4, 6), 1, True, True, layers.Variant('batch')), (4, 4, 3)
)
DEEP = ('resnet18', 'resnet18_cifar', 'resnet20', 'resnet56', 'vgg11')
NUM_FEATURES = {'resnet20': 64, 'resnet56': 256}  # the others have 512


def _size(params):
  return sum(a.size for a in jax.tree.leaves(params))


def _random_variables(model, seed=0):
  """Draws positive scales and variances, and the rest of either sign.

  Nothing is compiled.
  """
  random = np.random.RandomState(seed)

  def fill(path, leaf):
    name = path[-1].key
    if name in ('scale', 'var'):
      return random.uniform(0.5, 1.5, leaf.shape)
    bound = np.prod(leaf.shape[:-1]) ** -0.5 if name == 'kernel' else 0.1
    return random.uniform(-bound, bound, leaf.shape)

  variables = jax.tree.map_with_path(fill, jax.eval_shape(model.init, KEY))
  return jax.tree.map(jnp.asarray, variables)


class ClassifiersTest(parameterized.TestCase):
  @parameterized.parameters(
    # 28x28x1: conv weights + biases, then dense, by hand
    ('softmax', (28, 28, 1), 784 * 10 + 10, 784),
    ('mlp', (28, 28, 1), 784 * 200 + 200 + 200 * 200 + 200 + 2010, 200),
    (
      'lenet',
      (28, 28, 1),
      25 * 32 + 32 + 25 * 32 * 64 + 64 + 3136 * 128 + 128 + 1290,
      128,
    ),
    (
      'fedavg_cnn',
      (32, 32, 3),
      75 * 64 + 64 + 1600 * 64 + 64 + 4096 * 384 + 384 + 384 * 192 + 192 + 1930,
      192,
    ),
    ('fedgen_cnn', (28, 28, 1), 26_434, 32),  # as FedGen's code has it
    ('convnet', (32, 32, 3), 320_010, 2048),  # as FedDM's
    (  # 28 - 4 = 24, pooled 12, - 4 = 8, pooled 4
      'pfllib_cnn',
      (28, 28, 1),
      25 * 32 + 32 + 25 * 32 * 64 + 64 + 4 * 4 * 64 * 512 + 512 + 5130,
      512,
    ),
    (
      'niid_cnn',
      (28, 28, 1),
      156 + 16 * 150 + 16 + 256 * 120 + 120 + 120 * 84 + 84 + 850,
      84,
    ),
  )
  def test_sizes(self, name, image_shape, num_params, num_features):
    model = models.build(name, image_shape, 10)
    variables = jax.eval_shape(model.init, KEY)
    self.assertEqual(_size(variables.params), num_params)
    out = jax.eval_shape(model.apply, variables, jnp.zeros((2, *image_shape)))
    self.assertEqual(out.logits.shape, (2, 10))
    self.assertEqual(out.features.shape, (2, num_features))
    self.assertEqual(bool(variables.stats), name == 'fedgen_cnn')

  def test_fedgen_cnn_with_pooling(self):
    model = models.from_flax(classifiers.FedGenCNN(10, pool=True), (28, 28, 1))
    params = jax.eval_shape(model.init, KEY).params
    self.assertEqual(params['dense0']['linear']['kernel'].shape, (64, 32))

  @parameterized.parameters('none', 'batch', 'group', 'instance')
  def test_norms(self, norm):
    model = models.build('lenet', (8, 8, 1), 3, norm=norm)
    variables = _random_variables(model)
    x = jax.random.normal(KEY, (4, 8, 8, 1))
    out = jax.jit(lambda *a: model.apply(*a, train=True))(
      variables, x, jnp.ones(4, bool)
    )
    chex.assert_tree_all_finite(out)
    chex.assert_trees_all_equal_structs(out.stats, variables.stats)
    self.assertEqual(bool(variables.stats), norm == 'batch')
    self.assertEqual('bias' in variables.params['conv0'], norm != 'batch')

  def test_raw_pixels_are_normalised(self):
    model = models.build(
      'mlp', (2, 2, 3), 3, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)
    )
    variables = _random_variables(model)
    raw = (
      np.random.RandomState(0).randint(0, 256, (4, 2, 2, 3)).astype(np.uint8)
    )
    scaled = (raw / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    np.testing.assert_allclose(
      model.apply(variables, jnp.asarray(raw)).logits,
      model.apply(variables, jnp.asarray(scaled, jnp.float32)).logits,
      atol=1e-5,
    )

  def test_unknown_model(self):
    with self.assertRaisesRegex(ValueError, "lenet.*got 'vgg'"):
      models.build('vgg', (8, 8, 1), 3)

  @parameterized.parameters(
    (dict(norm='layer'), "norm must be one of.*'group'.*got 'layer'"),
    (dict(conv='fft'), "conv must be one of.*'matmul'.*got 'fft'"),
    (dict(projection_dim=-1), 'projection_dim must be at least 0, got -1'),
    (dict(image_shape=(8, 3, 1)), 'at least 4 x 4, got 8 x 3'),
    (dict(name='vgg11', image_shape=(0, 8, 1)), 'at least 1 x 1, got 0 x 8'),
  )
  def test_bad_arguments(self, change, message):
    arguments = dict(name='lenet', image_shape=(8, 8, 1), num_classes=3)
    with self.assertRaisesRegex(ValueError, message):
      models.build(**{**arguments, **change})

  @parameterized.parameters(
    ('softmax', {'head/linear'}),
    ('mlp', {'dense0/linear', 'dense1/linear', 'head/linear'}),
    ('lenet', {'conv0', 'conv1', 'mlp/dense0/linear', 'mlp/head/linear'}),
    (
      'fedavg_cnn',
      {
        'conv0',
        'conv1',
        'mlp/dense0/linear',
        'mlp/dense1/linear',
        'mlp/head/linear',
      },
    ),
  )
  def test_names_of_parameters(self, name, want):
    """Saved models depend on these names."""
    params = jax.eval_shape(models.build(name, (8, 8, 1), 3).init, KEY).params
    paths = [
      jax.tree_util.keystr(path, simple=True, separator='/')
      for path, _ in jax.tree.leaves_with_path(params)
    ]
    self.assertCountEqual(
      paths, [f'{p}/{kind}' for p in want for kind in ('kernel', 'bias')]
    )

  @parameterized.parameters(*sorted(set(models.CLASSIFIERS).difference(DEEP)))
  def test_projection_head(self, name):
    self.check_projection(name)

  @parameterized.parameters(*DEEP)
  @pytest.mark.slow  # below `parameters`: applies to all cases
  def test_projection_head_of_deep_nets(self, name):
    self.check_projection(name)

  def check_projection(self, name):
    plain, model = (
      models.build(name, (16, 16, 3), 5, projection_dim=p) for p in (0, 7)
    )
    before, variables = (jax.eval_shape(m.init, KEY) for m in (plain, model))
    x = jnp.zeros((2, 16, 16, 3))
    width = jax.eval_shape(plain.apply, before, x).features.shape[-1]
    out = jax.eval_shape(model.apply, variables, x)
    self.assertEqual(out.logits.shape, (2, 5))
    self.assertEqual(out.features.shape, (2, 7))
    self.assertEqual(  # two more layers, and a narrower output layer
      _size(variables.params) - _size(before.params),
      width * width + width + width * 7 + 7 - (width - 7) * 5,
    )

  def test_projection_by_hand(self):
    model = models.build('mlp', (2, 2, 1), 3, projection_dim=4)
    variables = _random_variables(model)
    x = jax.random.normal(KEY, (5, 2, 2, 1))
    linear = {
      k: (v['linear']['kernel'], v['linear']['bias'])
      for k, v in variables.params.items()
    }
    value = x.reshape(5, 4)
    for name in ('dense0', 'dense1', 'projection0', 'projection1', 'head'):
      weight, bias = linear[name]
      features, value = value, value @ weight + bias
      if name in ('dense0', 'dense1', 'projection0'):
        value = nn.relu(value)
    out = model.apply(variables, x)
    np.testing.assert_allclose(out.features, features, atol=1e-5)
    np.testing.assert_allclose(out.logits, value, atol=1e-5)


class TwoHeads(nn.Module):
  @nn.compact
  def __call__(self, x, mask=None, train=False):
    x = layers.Dense(2, name='head')(x.reshape(len(x), -1))
    return nn.Dense(3, name='out')(classifiers.MLP(3, (), name='mlp')(x)[0]), x


class NormOfFlax(nn.Module):
  @nn.compact
  def __call__(self, x, mask=None, train=False):
    x = nn.BatchNorm(not train)(x.reshape(len(x), -1))
    return nn.Dense(3, False, name='head')(x), x


class PiecesTest(parameterized.TestCase):
  """The pieces of a model that some methods need besides its forward pass."""

  @parameterized.parameters(
    ('mlp', 0, jnp.bfloat16), ('lenet', 0, None), ('lenet', 5, None)
  )
  def test_head(self, name, projection_dim, dtype):
    model = models.build(
      name,
      (4, 4, 1),
      3,
      conv='slices',
      projection_dim=projection_dim,
      dtype=dtype,
    )
    variables = [_random_variables(model, seed) for seed in (0, 1)]
    x = jax.random.normal(KEY, (5, 4, 4, 1))
    outs = [model.apply(v, x) for v in variables]
    heads = [model.head.params(v) for v in variables]
    for out, head in zip(outs, heads):
      chex.assert_trees_all_equal(
        model.head.apply(head, out.features), out.logits
      )
    params, features, logits = (
      jax.tree.map(lambda *a: jnp.stack(a), *trees)
      for trees in (heads, [o.features for o in outs], [o.logits for o in outs])
    )
    np.testing.assert_allclose(
      jax.vmap(model.head.apply)(params, features), logits, atol=1e-5
    )

  def test_heads_of_modules(self):
    for module, has_head in (
      (classifiers.MLP(3, (2,)), True),
      (NormOfFlax(), True),
      (TwoHeads(), False),
      (problems.Net(), False),
    ):
      model = models.from_flax(module, (2, 2, 1))
      self.assertEqual(model.head is not None, has_head)
      if has_head:
        variables = _random_variables(model)
        out = model.apply(variables, jnp.ones((2, 2, 2, 1)))
        np.testing.assert_array_equal(
          model.head.apply(model.head.params(variables), out.features),
          out.logits,
        )

  @parameterized.parameters(*sorted(set(models.CLASSIFIERS).difference(DEEP)))
  def test_every_classifier_has_a_head(self, name):
    self.check_has_head(name)

  @parameterized.parameters(*DEEP)
  @pytest.mark.slow  # below `parameters`: applies to all cases
  def test_every_deep_net_has_a_head(self, name):
    self.check_has_head(name)

  def check_has_head(self, name):
    module = models.CLASSIFIERS[name](3)
    self.assertIsNotNone(models.from_flax(module, (16, 16, 1)).head)

  def test_missing(self):
    model = problems.make_model()
    for piece, message in (
      ('head', "fed_gen needs a model that has a head: .* named 'head'"),
      ('last_stage', 'fed_gen needs a model that has stages'),
    ):
      with self.assertRaisesRegex(ValueError, message):
        models.need(model, piece, 'fed_gen')
    self.assertIs(
      models.need(SMALL_RESNET, 'last_stage', ''), SMALL_RESNET.last_stage
    )

  def test_normalise(self):
    normalise = models.need(problems.LINEAR, 'normalise', '')
    pixels = jnp.array([[0, 102, 255]], jnp.uint8)
    np.testing.assert_allclose(normalise(pixels), [[-4 / 3, 0, 2]], atol=1e-6)
    floats = jnp.array([0.0, 3.0])
    self.assertIs(normalise(floats), floats)

  @parameterized.parameters(True, False)
  def test_moments(self, train):
    """They equal NumPy's over the valid examples; normalisation does not
    change."""
    model = models.build('lenet', (8, 8, 1), 3, norm='batch', conv='slices')
    variables = _random_variables(model)
    x = jax.random.normal(KEY, (5, 8, 8, 1))
    valid = np.array([True, True, False, True, True])
    out = jax.jit(lambda *a: model.apply(*a, train=train))(
      variables, x, jnp.asarray(valid)
    )
    chex.assert_trees_all_equal_shapes(out.moments, variables.stats)
    kernel = variables.params['conv0']['kernel']
    values = convolution.convolve(x, kernel, 'lax')[valid].reshape(-1, 32)
    moments = out.moments['norm0']['batch']
    np.testing.assert_allclose(moments['mean'], values.mean(0), atol=1e-5)
    np.testing.assert_allclose(moments['var'], values.var(0), atol=1e-5)
    if not train:
      chex.assert_trees_all_equal(out.stats, variables.stats)
    else:
      for new, old, batch in zip(
        *map(jax.tree.leaves, (out.stats, variables.stats, out.moments))
      ):
        scale = (new - 0.9 * old) / (0.1 * batch)  # n / (n - 1), of variances
        self.assertBetween(scale.min(), 0.99, scale.max())
        self.assertLess(scale.max(), 1.02)

  def test_without_moments_and_stages(self):
    x = jnp.zeros((2, 2, 2, 1))
    for module in (problems.Linear(), NormOfFlax()):
      model = models.from_flax(module, x.shape[1:])
      for train in (True, False):
        out = model.apply(_random_variables(model), x, train=train)
        self.assertEqual((out.moments, out.stages), ((), ()))

  @parameterized.parameters(True, False)
  def test_what_is_not_used_is_free(self, train):
    """The compiled program has the same instructions, with and without
    gradient."""
    module = resnet.ResNet(3, (4, 6), 1, True, True, layers.Variant('batch'))

    def plain(variables, x):
      tree = {'params': variables.params, 'batch_stats': variables.stats}
      mutable = ['batch_stats'] if train else False
      out = module.apply(tree, x, None, train, mutable=mutable)
      return out[0][0] if train else out[0]

    def ours(variables, x):
      return SMALL_RESNET.apply(variables, x, train=train).logits

    def instructions(apply):
      compute = lambda v, x: jnp.sum(apply(v, x)[:, 0])
      compute = jax.grad(compute) if train else compute
      text = jax.jit(compute).lower(variables, x).compile().as_text()
      return sorted(re.findall(r'= (\S+ [a-z-]+)\(', text))

    variables = _random_variables(SMALL_RESNET)
    x = jnp.zeros((2, 4, 4, 3))
    found = instructions(ours)
    self.assertGreater(len(found), 100)
    self.assertEqual(found, instructions(plain))

  def test_stages(self):
    variables = _random_variables(SMALL_RESNET)
    x = jax.random.normal(KEY, (3, 8, 8, 3))
    mask = jnp.array([True, False, True])

    @jax.jit
    def run(variables):
      out = SMALL_RESNET.apply(variables, x, mask, True)
      last = SMALL_RESNET.last_stage(variables, out.stages[0], mask, 1.0)
      return out, last

    out, last = run(variables)
    self.assertEqual([s.shape[1:] for s in out.stages], [(2, 2, 4), (1, 1, 6)])
    np.testing.assert_array_equal(out.stages[1].mean((1, 2)), out.features)
    np.testing.assert_allclose(last, out.stages[1], atol=1e-6)

  def test_slim_stage(self):
    """It equals the plain formula with the leading slices of the parameters."""
    with enable_x64(True):
      module = resnet.ResNet(
        3, (8, 32), 1, False, False, layers.Variant('batch')
      )
      model = models.from_flax(module, (4, 4, 1))
      variables = _random_variables(model)
      x = jax.random.normal(KEY, (6, 8, 8, 8))
      params = variables.params['block1_0']

      def unit(x, name, stride):
        x = jax.lax.conv_general_dilated(
          x,
          params[name]['conv']['kernel'][:, :, : x.shape[-1], :16],
          (stride, stride),
          ((1, 1), (1, 1)),
          dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )
        x = (x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-5)
        norm = params[name]['norm']['batch']
        return x * norm['scale'][:16] + norm['bias'][:16]

      branch = unit(jnp.maximum(unit(x, 'conv0', 2), 0), 'conv1', 1)
      shortcut = jnp.pad(x[:, ::2, ::2], ((0, 0),) * 3 + ((0, 8),))
      run = jax.jit(lambda v: model.last_stage(v, x, None, 0.5))
      np.testing.assert_allclose(
        run(variables), jnp.maximum(branch + shortcut, 0), rtol=1e-9
      )
      grads = jax.jit(jax.grad(lambda v: jnp.sum(run(v) ** 3)))(variables)
      num_used = {
        name: jnp.count_nonzero(
          jnp.concatenate([a.ravel() for a in jax.tree.leaves(layer)])
        )
        for name, layer in grads.params.items()
      }
      of_block = 9 * (8 + 16) * 16 + 4 * 16  # kernels, and both norms
      self.assertEqual(
        num_used, {'stem': 0, 'block0_0': 0, 'block1_0': of_block, 'head': 0}
      )

  def test_width(self):
    x = jnp.zeros((2, 2, 2, 4))
    for width in (0, 1.5):
      with self.assertRaisesRegex(ValueError, f'at most 1, got {width}'):
        SMALL_RESNET.last_stage(None, x, None, width)
    self.assertEqual([resnet.slim(n, 0.25) for n in (16, 8, 4)], [8, 8, 1])
    self.assertEqual(resnet.slim(17, 1), 17)
    # FedAlign's official code says so.
    values = 1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 48, 64, 128, 256
    want = 1, 9, 9, 8, 8, 8, 16, 16, 24, 24, 32, 48, 64, 128, 256
    self.assertEqual(tuple(map(resnet.make_divisible, values)), want)


class LinenNet(nn.Module):
  @nn.compact
  def __call__(self, x, mask=None, train=False):
    x = nn.Dense(6, name='dense')(x.reshape(len(x), -1))
    norm = nn.BatchNorm(momentum=0.9, name='norm')
    x = nn.relu(
      norm(x, not train, mask=None if mask is None else mask[:, None])
    )
    return nn.Dense(problems.NUM_CLASSES, name='out')(x), x


class NnxNet(nnx.Module):
  """The same network as `LinenNet`."""

  def __init__(self, rngs):
    self.dense = nnx.Linear(int(np.prod(problems.IMAGE_SHAPE)), 6, rngs=rngs)
    self.norm = nnx.BatchNorm(6, momentum=0.9, rngs=rngs)
    self.out = nnx.Linear(6, problems.NUM_CLASSES, rngs=rngs)

  def __call__(self, x, mask=None, train=False):
    x = self.dense(x.reshape(len(x), -1))
    mask = None if mask is None else mask[:, None]
    x = nnx.relu(self.norm(x, not train, mask=mask))
    return self.out(x), x


class NnxTest(parameterized.TestCase):
  def test_trains_as_linen(self):
    ends = []
    for model in (
      models.from_flax(LinenNet(), problems.IMAGE_SHAPE, (0.4,), (0.3,)),
      modules.from_nnx(NnxNet, problems.IMAGE_SHAPE, (0.4,), (0.3,)),
    ):
      model = problems.quick(model)
      fed = problems.make(model)
      state, _ = federation.run(
        fed,
        fed.init(KEY),
        problems.DATA,
        problems.schedule([[0, 1], [2, 4]]),
        KEY,
      )
      ends.append(state.variables)
    chex.assert_trees_all_close(*ends, rtol=1e-6)
    begin = model.init(KEY)
    for end, start in zip(*map(jax.tree.leaves, (ends[1], begin))):
      self.assertGreater(abs(end - start).max(), 0)


class DeepClassifiersTest(parameterized.TestCase):
  @parameterized.parameters(
    ('resnet18', 100, None),
    ('resnet18_cifar', 10, 'group'),
    ('resnet20', 10, 'batch'),
    ('vgg11', 10, None),
  )
  def test_size(self, *case):
    self.check_size(*case)

  @parameterized.parameters(
    *itertools.product(DEEP, (10, 100), (None, 'batch', 'group', 'instance'))
  )
  @pytest.mark.slow  # below `parameters`: applies to all cases
  def test_sizes(self, *case):
    self.check_size(*case)

  def check_size(self, name, num_classes, norm):
    model = models.build(name, (32, 32, 3), num_classes, norm=norm)
    variables = jax.eval_shape(model.init, KEY)
    of_ten = {
      'resnet18': 11_181_642,
      'resnet18_cifar': 11_173_962,
      'resnet20': 269_722,
      'resnet56': 591_322,  # 614,452 for 100 classes, as FedAlign's code has it
      'vgg11': 9_231_114,
    }[name]
    head = (num_classes - 10) * (NUM_FEATURES.get(name, 512) + 1)
    self.assertEqual(_size(variables.params), of_ten + head)
    self.assertEqual(bool(variables.stats), norm in (None, 'batch'))

  def test_resnet56(self):
    """The size is that in FedAlign's code, which also counts each norm's
    steps."""
    model = models.build('resnet56', (32, 32, 3), 100)
    x = jnp.zeros((2, 32, 32, 3))
    variables = jax.eval_shape(model.init, KEY)
    out = jax.eval_shape(lambda v: model.apply(v, x), variables)
    self.assertEqual(_size(variables.params), 614_452)
    num_norms = len(jax.tree.leaves(variables.stats)) // 2
    self.assertEqual(_size(variables.stats) + num_norms, 9_050)
    self.assertEqual(
      [s.shape[1:] for s in out.stages], [(16, 16, 128), (8, 8, 256)]
    )
    slim = jax.eval_shape(
      lambda v, x: model.last_stage(v, x, None, 0.25), variables, out.stages[0]
    )
    self.assertEqual(slim.shape[1:], (8, 8, 64))

  def test_shapes(self):
    self.check_shapes('vgg11', (28, 28, 1))

  @parameterized.parameters(
    *itertools.product(DEEP, ((32, 32, 3), (28, 28, 1), (8, 8, 1), (1, 3, 2)))
  )
  @pytest.mark.slow  # below `parameters`: applies to all cases
  def test_shapes_of_all(self, *case):
    self.check_shapes(*case)

  def check_shapes(self, name, image_shape):
    model = models.build(name, image_shape, 10)
    variables = jax.eval_shape(model.init, KEY)
    out = jax.eval_shape(
      lambda v, x: model.apply(v, x, train=True),
      variables,
      jnp.zeros((2, *image_shape)),
    )
    self.assertEqual(out.logits.shape, (2, 10))
    self.assertEqual(out.features.shape, (2, NUM_FEATURES.get(name, 512)))
    chex.assert_trees_all_equal_shapes(out.stats, variables.stats)

  @pytest.mark.slow
  def test_default_norms(self):
    self.assertEqual(set(models.DEFAULT_NORMS), set(models.CLASSIFIERS))
    for name, norm in models.DEFAULT_NORMS.items():
      stats = jax.eval_shape(models.build(name, (16, 16, 3), 3).init, KEY).stats
      self.assertEqual(bool(stats), norm == 'batch')

  def test_biases(self):
    self.check_biases(('resnet20', 'vgg11'), ('batch',))

  @pytest.mark.slow
  def test_biases_of_all(self):
    self.check_biases(DEEP, layers.NORMS)

  def check_biases(self, names, norms):
    for name in names:
      for norm in norms:
        model = models.build(name, (8, 8, 3), 3, norm=norm)
        params = jax.eval_shape(model.init, KEY).params
        convs = [
          path
          for path, leaf in jax.tree.leaves_with_path(params)
          if path[-2].key == 'conv' and path[-1].key == 'bias'
        ]
        self.assertEqual(bool(convs), name == 'vgg11' or norm == 'none')

  def test_padding_changes_nothing(self):
    self.check_padding(SMALL_RESNET)

  @parameterized.parameters('resnet20', 'vgg11')
  @pytest.mark.slow  # below `parameters`: applies to all cases
  def test_padding_changes_nothing_in(self, name):
    self.check_padding(models.build(name, (4, 4, 3), 3))

  def check_padding(self, model):
    with enable_x64(True):
      variables = _random_variables(model)
      x = jax.random.normal(KEY, (5, 4, 4, 3))
      mask = jnp.array([True, False, True, True, False])
      apply = jax.jit(lambda *a: model.apply(*a, train=True))
      padded = apply(variables, x.at[1].mul(100.0), mask)
      alone = apply(variables, x[mask], jnp.ones(3, bool))
      np.testing.assert_allclose(padded.logits[mask], alone.logits, atol=1e-9)
      chex.assert_trees_all_close(padded.stats, alone.stats, rtol=1e-9)

  def test_vmap_equals_one_by_one(self):
    self.check_vmap(SMALL_RESNET)

  @pytest.mark.slow
  def test_vmap_equals_one_by_one_in_a_deep_net(self):
    self.check_vmap(models.build('resnet20', (4, 4, 3), 3))

  def check_vmap(self, model):
    with enable_x64(True):
      variables = [_random_variables(model, seed) for seed in (1, 2)]
      x = jax.random.normal(KEY, (2, 3, 4, 4, 3))
      apply = lambda v, x: model.apply(v, x, train=True)
      both = jax.jit(jax.vmap(apply))(
        jax.tree.map(lambda *a: jnp.stack(a), *variables), x
      )
      apply = jax.jit(apply)
      alone = [apply(v, a) for v, a in zip(variables, x)]
      chex.assert_trees_all_close(
        both, jax.tree.map(lambda *a: jnp.stack(a), *alone), atol=1e-9
      )

  def test_gradients_are_finite(self):
    self.check_gradients('batch')

  @parameterized.parameters('none', 'group')
  @pytest.mark.slow  # below `parameters`: applies to all cases
  def test_gradients_of_others_are_finite(self, norm):
    self.check_gradients(norm)

  def check_gradients(self, norm):
    """Covers every kind of layer, with no, one and several valid examples."""
    module = resnet.ResNet(3, (4, 6), 2, True, True, layers.Variant(norm))
    model = models.from_flax(module, (6, 6, 1))
    variables = _random_variables(model)

    @jax.jit
    @jax.grad
    def gradient(params, mask):
      x = jax.random.normal(KEY, (2, 6, 6, 1))
      out = model.apply(variables._replace(params=params), x, mask, True)
      return jnp.sum(jnp.where(mask[:, None], out.logits**2, 0))

    for num_valid in (0, 1, 2):
      grads = gradient(variables.params, jnp.arange(2) < num_valid)
      chex.assert_tree_all_finite(grads)
      self.assertEqual(
        any(jnp.any(g) for g in jax.tree.leaves(grads)), num_valid > 0
      )

  def test_running_variance(self):
    self.check_running_variance('lenet')

  @parameterized.parameters('resnet20', 'vgg11')
  @pytest.mark.slow  # below `parameters`: applies to all cases
  def test_running_variance_in_deep_nets(self, name):
    self.check_running_variance(name)

  def check_running_variance(self, name):
    """From 0, PyTorch's is n / (n - 1) times Flax's after a step, in all
    norms."""
    stats = []
    for torch_bn in (True, False):
      model = models.build(name, (4, 4, 2), 3, norm='batch', torch_bn=torch_bn)
      variables = _random_variables(model)
      variables = variables._replace(
        stats=jax.tree.map(jnp.zeros_like, variables.stats)
      )
      x = jax.random.normal(KEY, (3, 4, 4, 2))
      new = jax.jit(lambda v, x: model.apply(v, x, train=True))(
        variables, x
      ).stats
      stats.append(
        {
          path[:-1]: np.asarray(leaf)
          for path, leaf in jax.tree.leaves_with_path(new)
          if path[-1].key == 'var'
        }
      )
    # Pixels after the convolutions of a stage: vgg11, resnet20, lenet.
    pixels = {
      'conv': (16, 4, 1, 1, 1),
      'block': (16, 4, 1),
      'stem': (16,),
      'norm': (16, 4),
    }
    for path, var in stats[0].items():
      kind, layer = re.fullmatch(r'([a-z]+)(\d*).*', path[0].key).groups()
      n = 3 * pixels[kind][int(layer or 0)]
      np.testing.assert_allclose(var, stats[1][path] * n / (n - 1), rtol=1e-4)


class BasicBlockTest(parameterized.TestCase):
  @parameterized.parameters(
    (4, 1, True), (6, 2, True), (6, 1, True), (6, 2, False)
  )
  def test_equals_plain_formula(self, features, stride, project):
    with enable_x64(True):
      block = resnet.BasicBlock(
        features, stride, project, layers.Variant('batch')
      )
      x = jax.random.normal(KEY, (3, 5, 6, 4))
      shapes = jax.eval_shape(block.init, KEY, x)
      tree = jax.tree.map(
        lambda a: jnp.asarray(np.random.RandomState(a.size).rand(*a.shape)),
        shapes,
      )

      def unit(x, name, stride, pad):
        p, s = tree['params'][name], tree['batch_stats'][name]['norm']['batch']
        x = jax.lax.conv_general_dilated(
          x,
          p['conv']['kernel'],
          (stride, stride),
          ((pad, pad),) * 2,
          dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )
        x = (x - s['mean']) / jnp.sqrt(s['var'] + 1e-5)
        p = p['norm']['batch']
        return x * p['scale'] + p['bias']

      branch = jnp.maximum(unit(x, 'conv0', stride, 1), 0)
      branch = unit(branch, 'conv1', 1, 1)
      shortcut = x
      if 'shortcut' in tree['params']:
        shortcut = unit(x, 'shortcut', stride, 0)
      elif stride == 2:
        shortcut = jnp.concatenate(
          [x[:, ::2, ::2], jnp.zeros((3, 3, 3, 2))], axis=-1
        )
      np.testing.assert_allclose(
        jax.jit(block.apply)(tree, x),
        jnp.maximum(branch + shortcut, 0),
        rtol=1e-12,
      )
      self.assertEqual('shortcut' in tree['params'], project and features == 6)

  def test_initialisation(self):
    x = jnp.abs(jax.random.normal(KEY, (2, 4, 4, 64)))
    for norm in layers.NORMS:
      block = resnet.BasicBlock(64, 1, True, layers.Variant(norm))
      params = jax.jit(block.init)(KEY, x)['params']
      np.testing.assert_allclose(
        params['conv0']['conv']['kernel'].std(),
        (2 / (9 * 64)) ** 0.5,
        rtol=0.02,
      )
      if norm == 'none':
        np.testing.assert_array_equal(block.apply({'params': params}, x), x)
      else:
        self.assertGreater(params['conv1']['conv']['kernel'].std(), 0.05)
        np.testing.assert_array_equal(params['conv1']['norm'][norm]['scale'], 1)
        np.testing.assert_array_equal(params['conv1']['norm'][norm]['bias'], 0)

  def test_bottleneck(self):
    """It equals the plain formula; at half its width it has half the
    channels."""
    with enable_x64(True):
      options = layers.Variant('instance')
      whole = resnet.Bottleneck(32, 2, True, options, 0.5)
      block = resnet.Bottleneck(16, 2, True, options)
      x = jax.random.normal(KEY, (3, 5, 6, 4))
      shapes = jax.eval_shape(block.init, KEY, x)
      chex.assert_trees_all_equal(shapes, jax.eval_shape(whole.init, KEY, x))
      params = jax.tree.map(
        lambda a: jnp.asarray(np.random.RandomState(a.size).rand(*a.shape)),
        shapes,
      )['params']

      def unit(x, name, stride=1, pad=0):
        x = jax.lax.conv_general_dilated(
          x,
          params[name]['conv']['kernel'],
          (stride, stride),
          ((pad, pad),) * 2,
          dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )
        mean, var = (f(x, (1, 2), keepdims=True) for f in (jnp.mean, jnp.var))
        norm = params[name]['norm']['instance']
        return (x - mean) / jnp.sqrt(var + 1e-5) * norm['scale'] + norm['bias']

      branch = jnp.maximum(unit(x, 'conv0'), 0)
      branch = jnp.maximum(unit(branch, 'conv1', 2, 1), 0)
      want = jnp.maximum(unit(branch, 'conv2') + unit(x, 'shortcut', 2), 0)
      self.assertEqual(want.shape, (3, 3, 3, 64))
      np.testing.assert_allclose(
        jax.jit(block.apply)({'params': params}, x), want, rtol=1e-9
      )


class ConvolutionTest(parameterized.TestCase):
  # Each pair of values of two arguments.
  @parameterized.parameters(
    (1, 1, 2, False),
    (1, 2, 4, True),
    (3, 1, 4, True),
    (3, 2, 2, False),
    (4, 1, 2, True),
    (4, 2, 4, False),
    (5, 1, 4, False),
    (5, 2, 2, True),
    (6, 1, 2, False),
    (6, 2, 4, True),
  )
  def test_implementations_agree(self, *case):
    self.check_implementations(*case)

  @parameterized.parameters(
    *itertools.product((1, 3, 4, 5, 6), (1, 2), (2, 4), (False, True))
  )
  @pytest.mark.slow  # below `parameters`: applies to all cases
  def test_implementations_agree_everywhere(self, *case):
    self.check_implementations(*case)

  def check_implementations(self, size, stride, num_out, valid):
    """Compares values and gradients, for odd and even images, per-client
    kernels."""
    with enable_x64(True):
      random = np.random.RandomState(0)
      x = jnp.asarray(random.randn(2, 2, 7, 6, 3))
      kernel = jnp.asarray(random.randn(2, size, size, 3, num_out))

      def plain(x, kernel):
        pad = (0, 0) if valid else ((size - 1) // 2, size // 2)
        return jax.lax.conv_general_dilated(
          x,
          kernel,
          (stride, stride),
          (pad, pad),
          dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )

      def run(compute):
        def both(x, kernel):
          out, pull = jax.vjp(jax.vmap(compute), x, kernel)
          return out, pull(jnp.sin(out))

        return jax.jit(both)(x, kernel)

      want = run(plain)
      lost = size - 1 if valid else 0
      height, width = -(-(7 - lost) // stride), -(-(6 - lost) // stride)
      self.assertEqual(want[0].shape, (2, 2, height, width, num_out))
      for implementation in convolution.IMPLEMENTATIONS:
        out = run(
          lambda x, k: convolution.convolve(x, k, implementation, stride, valid)
        )
        chex.assert_trees_all_close(out, want, atol=1e-11)

  @parameterized.parameters((3, (5, 6), False), (4, (9, 8), True))
  def test_winograd(self, *case):
    self.check_winograd(*case)

  @parameterized.parameters(
    *itertools.product((3, 4, 5), ((16, 13), (9, 8), (5, 6)), (False, True))
  )
  @pytest.mark.slow  # below `parameters`: applies to all cases
  def test_winograd_everywhere(self, *case):
    self.check_winograd(*case)

  def check_winograd(self, size, image, valid):
    """Compares with the plain convolution, at once and in blocks.

    Values and gradients are compared.
    """

    def run(compute, x, kernel):
      def both(x, kernel):
        out, pull = jax.vjp(compute, x, kernel)
        return out, pull(jnp.sin(out))

      return jax.jit(both)(x, kernel)

    with enable_x64(True):
      x = jax.random.normal(KEY, (4, *image, 16))
      kernel = jax.random.normal(KEY, (size, size, 16, 17)) / size
      padding = ((0, 0),) * 2 if valid else (((size - 1) // 2, size // 2),) * 2
      outputs = [n + sum(p) - size + 1 for n, p in zip(image, padding)]
      plan = winograd.tiling(4, outputs, (size, size), (16, 17))
      used = outputs != [1, 2]
      self.assertEqual(plan is not None, used)
      if not used:
        return
      want = run(
        lambda x, k: convolution.convolve(x, k, 'lax', valid=valid), x, kernel
      )
      for block in (2, 4):
        got = run(
          lambda x, k: winograd.convolve(
            x, k, padding, plan._replace(block=block)
          ),
          x,
          kernel,
        )
        chex.assert_trees_all_close(got, want, rtol=1e-9, atol=1e-9)
      chosen = run(
        lambda x, k: convolution.convolve(x, k, 'winograd', valid=valid),
        x,
        kernel,
      )
      chex.assert_trees_all_close(chosen, want, rtol=1e-9, atol=1e-9)

  @parameterized.parameters(3, 5)
  @pytest.mark.slow  # below `parameters`: applies to all cases
  def test_winograd_in_single_precision(self, size):
    """Errors are relative to the largest output or gradient."""
    x = jax.random.normal(KEY, (4, 12, 12, 32))
    kernel = jax.random.normal(KEY, (size, size, 32, 32)) / (6 * size)

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation):
      out, pull = jax.vjp(
        lambda x, k: convolution.convolve(x, k, implementation), x, kernel
      )
      return out, *pull(out)

    for got, want in zip(run('winograd'), run('lax')):
      self.assertLess(abs(got - want).max() / abs(want).max(), 2e-5)

  @parameterized.parameters(
    ((16, 16), (3, 3), (15, 64)),
    ((1, 1), (3, 3), (64, 64)),
    ((8, 8), (3, 5), (64, 64)),
    ((16, 16), (7, 7), (64, 64)),
  )
  def test_where_winograd_does_not_pay(self, outputs, size, channels):
    self.assertIsNone(winograd.tiling(10, outputs, size, channels))

  @parameterized.parameters(
    (28, 5, (1, 6), 8),
    (28, 5, (1, 64), 2),
    (10, 5, (6, 16), 4),  # a row has six outputs
    (28, 3, (1, 32), 2),
    (28, 3, (1, 64), 1),
    (28, 3, (16, 32), 1),
    (28, 3, (3, 3), 1),
    (5, 5, (1, 6), 1),
  )
  def test_outputs_of_a_window(self, width, size, channels, want):
    part = windows.Windows((width, width), (size, size), ((0, 0),) * 2)
    self.assertEqual(convolution._tile(part, *channels), want)

  @parameterized.parameters(
    ((3, 3), (16, 17), False),
    ((2, 4), (16, 16), False),
    ((4, 3), (70, 16), True),
  )
  def test_pallas(self, size, channels, valid):
    """Compares values and gradients of two clients with the plain one.

    More than 64 channels are more than one block.
    """

    def run(implementation, x, kernel):
      def both(x, kernel):
        out, pull = jax.vjp(
          jax.vmap(
            lambda x, k: convolution.convolve(x, k, implementation, valid=valid)
          ),
          x,
          kernel,
        )
        return out, pull(jnp.sin(out))

      return jax.jit(both)(x, kernel)

    with enable_x64(True):
      x = jax.random.normal(KEY, (2, 2, 7, 6, channels[0]))
      kernel = jax.random.normal(KEY, (2, *size, *channels))
      chex.assert_trees_all_close(
        run('pallas', x, kernel), run('lax', x, kernel), atol=1e-11
      )

  def test_kernels_that_do_not_fit(self):
    with self.assertRaisesRegex(ValueError, '5 x 5 pixels does not fit .* 3 x'):
      convolution.convolve(
        jnp.zeros((1, 3, 8, 1)), jnp.zeros((5, 5, 1, 1)), 'matmul', valid=True
      )

  def test_pallas_without_images(self):
    out = convolution.convolve(
      jnp.zeros((0, 4, 4, 16)), jnp.zeros((3, 3, 16, 16)), 'pallas'
    )
    self.assertEqual(out.shape, (0, 4, 4, 16))

  def test_pallas_becomes_triton(self):
    """A GPU's kernels are made; none is run."""

    def both(x, kernel):
      out, pull = jax.vjp(
        jax.vmap(lambda x, k: convolution.convolve(x, k, 'pallas')), x, kernel
      )
      return pull(out)

    text = (
      jax.jit(both)
      .trace(jnp.zeros((2, 3, 9, 8, 20)), jnp.zeros((2, 5, 5, 20, 16)))
      .lower(lowering_platforms=('cuda',))
      .as_text()
    )
    self.assertEqual(text.count('custom_call @__gpu$xla.gpu.triton('), 3)
    self.assertFalse('stablehlo.dot_general' in text)

  @parameterized.parameters(convolution.convolve, convolution.convolve_enlarged)
  def test_mixed(self, convolve):
    """A kernel that is shared is convolved by `lax`, others are not."""
    x = jax.random.normal(KEY, (2, 3, 7, 6, 4))
    kernel = jax.random.normal(KEY, (2, 3, 3, 4, 5))

    def run(implementation, axes):
      def both(x, kernel):
        out, pull = jax.vjp(
          jax.vmap(lambda x, k: convolve(x, k, implementation), axes), x, kernel
        )
        return out, pull(jnp.sin(out))

      return jax.jit(both)

    twice = jax.vmap(  # over kernels, and in it over images alone
      lambda x, k: jax.vmap(lambda x: convolve(x, k, 'mixed'))(x)
    )
    text = jax.jit(twice).lower(jnp.stack([x, x]), kernel).as_text()
    self.assertNotIn('convolution', text)
    along = lambda implementation: jax.vmap(  # over directions alone
      lambda d: jax.jvp(
        lambda k: losses.frozen(lambda k: convolve(x[0], k, implementation), k),
        (kernel[0],),
        (d,),
      )[1]
    )(kernel)
    chex.assert_trees_all_close(along('mixed'), along('lax'), atol=1e-4)
    for axes, args in (
      ((0, 0), (x, kernel)),
      ((0, None), (x, kernel[0])),
      ((None, 0), (x[0], kernel)),
    ):
      mixed = run('mixed', axes)
      chex.assert_trees_all_close(
        mixed(*args), run('lax', axes)(*args), rtol=1e-4, atol=1e-4
      )
      self.assertEqual(
        'convolution' in mixed.lower(*args).as_text(), axes[1] is None
      )

  @parameterized.parameters((4, 3, 5, 2), (1, 2, 2, 3))
  def test_enlarged(self, height, width, num_in, num_out):
    """Value and gradient equal those of the convolution of the enlarged
    image."""

    def plain(x, kernel):
      large = jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
      return convolution.convolve(large, kernel, 'lax')

    def run(compute, x, kernel):
      def both(x, kernel):
        out, pull = jax.vjp(compute, x, kernel)
        return out, pull(jnp.sin(out))

      return jax.jit(both)(x, kernel)

    with enable_x64(True):
      x = jax.random.normal(KEY, (2, height, width, num_in))
      kernel = jax.random.normal(KEY, (3, 3, num_in, num_out))
      want = run(plain, x, kernel)
      for implementation in convolution.IMPLEMENTATIONS:
        out = run(
          functools.partial(
            convolution.convolve_enlarged, implementation=implementation
          ),
          x,
          kernel,
        )
        chex.assert_trees_all_close(out, want, atol=1e-11)

  def test_enlarged_has_no_stride(self):
    with self.assertRaisesRegex(ValueError, 'stride 1 .*got stride=2'):
      layers.Conv(2, 3, enlarge=True, stride=2).init(
        KEY, jnp.zeros((1, 4, 4, 2))
      )

  @parameterized.parameters((3, 1, 4), (3, 1, 1), (3, 2, 4), (1, 2, 4))
  def test_no_grouped_convolution_under_vmap(self, size, stride, num_out):
    x, kernel = (
      jnp.zeros((2, 3, 6, 6, 2)),
      jnp.zeros((2, size, size, 2, num_out)),
    )
    for implementation in convolution.IMPLEMENTATIONS:
      if implementation == 'lax':
        continue
      text = (
        jax.jit(
          jax.vmap(
            lambda x, k: convolution.convolve(x, k, implementation, stride)
          )
        )
        .lower(x, kernel)
        .as_text()
      )
      self.assertNotIn('convolution', text)
      if size == 1:
        self.assertEqual(text.count('dot_general'), 1)


class Smooth(nn.Module):
  """A network without a maximum, whose position rounding could change."""

  conv: str
  norm: str

  @nn.compact
  def __call__(self, x, mask=None, train=False):
    x = layers.Conv(16, 3, implementation=self.conv)(x)
    x = nn.tanh(layers.Norm(self.norm)(x, mask, train))
    x = layers.Conv(8, 3, stride=2, implementation=self.conv)(x)
    x = nn.tanh(layers.Dense(8)(x.reshape(len(x), -1)))
    return layers.head(x, 3)


class PrecisionTest(parameterized.TestCase):
  @parameterized.parameters(('winograd', 'batch'), ('slices', 'group'))
  @pytest.mark.slow  # below `parameters`: applies to all cases
  def test_bfloat16(self, conv, norm):
    """Weights, statistics, logits and gradients stay float32.

    The gradient is that of float32 up to rounding, but not the same.
    """
    x = jax.random.normal(KEY, (12, 8, 8, 16))
    y = jnp.arange(12) % 3

    @functools.partial(jax.jit, static_argnums=0)
    def run(dtype):
      model = models.from_flax(Smooth(conv, norm), x.shape[1:], dtype=dtype)
      variables = model.init(KEY)

      def loss(params):
        output = model.apply(
          variables._replace(params=params), x, jnp.arange(12) < 11, True
        )
        return jnp.mean(
          jax.nn.log_softmax(output.logits)[jnp.arange(12), y]
        ), output

      grads, output = jax.grad(loss, has_aux=True)(variables.params)
      return grads, output

    (want, exact), (got, output) = run(None), run(jnp.bfloat16)
    chex.assert_trees_all_equal_dtypes((got, output), (want, exact))
    flat = [
      jnp.concatenate([a.ravel() for a in jax.tree.leaves(g)])
      for g in (want, got)
    ]
    error = jnp.linalg.norm(flat[0] - flat[1]) / jnp.linalg.norm(flat[0])
    self.assertBetween(error, 1e-4, 0.03)
    np.testing.assert_allclose(output.logits, exact.logits, atol=0.03)

  @pytest.mark.slow
  def test_generator(self):
    outputs = []
    for dtype in (None, jnp.bfloat16):
      generator = models.image_generator(
        (8, 8, 1), 3, noise_dim=4, width=2, dtype=dtype
      )
      outputs.append(
        jax.jit(
          lambda key, generator=generator: generator.apply(
            generator.init(key), jnp.ones((2, 4)), jnp.arange(2), train=True
          )
        )(KEY)
      )
    chex.assert_trees_all_equal_dtypes(*outputs)
    difference = abs(outputs[0][0] - outputs[1][0]).max()
    self.assertBetween(difference, 1e-4, 0.1)


class MeanPoolTest(parameterized.TestCase):
  def test_equals_flax(self):
    x = jax.random.normal(KEY, (2, 5, 4, 3))
    np.testing.assert_allclose(
      layers.mean_pool(x), nn.avg_pool(x, (2, 2), (2, 2)), atol=1e-6
    )


class MaxPoolTest(parameterized.TestCase):
  def test_gradient_of_equal_values_and_nan(self):
    """One of several equal values gets the whole gradient; NaN is preserved."""
    pool = lambda x: layers.max_pool(x.reshape(1, 2, 2, 1))[0, 0, 0, 0]
    for values, want in (
      ([1.0, 3.0, 3.0, 3.0], [0, 0, 1, 0]),
      ([1.0, 3.0, 1.0, 3.0], [0, 1, 0, 0]),
      ([3.0, 3.0, 3.0, 3.0], [1, 0, 0, 0]),
    ):
      np.testing.assert_array_equal(jax.grad(pool)(jnp.array(values)), want)
    for i in range(4):
      self.assertTrue(np.isnan(pool(jnp.ones(4).at[i].set(jnp.nan))))

  def test_two_by_two(self):
    x = jax.random.normal(KEY, (2, 5, 4, 3))
    np.testing.assert_array_equal(
      layers.max_pool(x), nn.max_pool(x, (2, 2), (2, 2))
    )

  @parameterized.product(
    window=((3, 2, 1), (2, 2, 0), (3, 1, 1), (2, 1, 0), (3, 3, 0)),
    shape=((2, 8, 7, 3), (1, 3, 4, 1)),
  )
  def test_equals_reduce_window(self, window, shape):
    size, stride, padding = window
    x = jax.random.normal(KEY, shape) - 3.0

    def plain(x):
      pad = padding, padding
      return jax.lax.reduce_window(
        x,
        -jnp.inf,
        jax.lax.max,
        (1, size, size, 1),
        (1, stride, stride, 1),
        ((0, 0), pad, pad, (0, 0)),
      )

    def both(pool):
      out, pull = jax.vjp(pool, x)
      return out, pull(jnp.sin(out))

    out = jax.jit(both, static_argnums=0)(lambda x: layers.max_pool(x, *window))
    chex.assert_trees_all_close(out, both(plain), atol=1e-6)

  def test_before_the_bias(self):
    """Pooling before the bias is added gives the values of pooling after it."""
    x = jax.random.normal(KEY, (2, 7, 6, 3))
    plain, pooled = layers.Conv(4, 3), layers.Conv(4, 3, pool=True)
    params = plain.init(KEY, x)
    after = lambda params, x: layers.max_pool(plain.apply(params, x))
    np.testing.assert_array_equal(pooled.apply(params, x), after(params, x))
    pull = lambda f: jax.vjp(f, params, x)[1](jnp.sin(after(params, x)))
    chex.assert_trees_all_close(pull(pooled.apply), pull(after), atol=1e-5)

  def test_one_pixel(self):
    x = jnp.full((1, 1, 1, 2), -3.0)
    np.testing.assert_array_equal(layers.max_pool(x, 3, 2, 1), x)

  def test_inside_scan_and_vmap(self):
    x = jax.random.normal(KEY, (2, 1, 5, 5, 2))
    one = jax.jit(jax.grad(lambda x: jnp.sum(layers.max_pool(x, 3, 2, 1) ** 2)))
    want = jnp.stack([x[i] - 0.1 * one(x[i]) for i in (0, 1)])
    step = lambda x, _: (x - 0.1 * jax.vmap(one)(x), None)
    np.testing.assert_allclose(
      jax.lax.scan(step, x, length=1)[0], want, atol=1e-6
    )


class InstanceNormTest(parameterized.TestCase):
  def test_is_group_norm_of_one_channel(self):
    x = 3 + jax.random.normal(KEY, (4, 3, 3, 6))
    norm = layers.Norm('instance')
    params = jax.tree.map(
      lambda a: jax.random.normal(KEY, a.shape), norm.init(KEY, x)['params']
    )
    other = nn.GroupNorm(None, 1, 1e-5)
    np.testing.assert_allclose(
      norm.apply({'params': params}, x),
      other.apply({'params': params['instance']}, x),
      atol=1e-4,
    )


class BatchNormTest(parameterized.TestCase):
  @parameterized.parameters(True, False)
  def test_masked_equals_unpadded(self, unbiased):
    with enable_x64(True):
      norm = layers.BatchNorm(unbiased=unbiased)
      x = jax.random.normal(KEY, (6, 3, 3, 2))
      variables = norm.init(KEY, x)
      mask = jnp.array([True, True, False, True, False, False])
      padded, new = norm.apply(
        variables, x, mask, True, mutable=['batch_stats']
      )
      alone, want = norm.apply(
        variables, x[mask], None, True, mutable=['batch_stats']
      )
      np.testing.assert_allclose(padded[mask], alone, atol=1e-12)
      chex.assert_trees_all_close(new, want, atol=1e-12)
      values = np.asarray(x)[np.asarray(mask)].reshape(-1, 2)
      np.testing.assert_allclose(
        new['batch_stats']['mean'], 0.1 * values.mean(0), atol=1e-12
      )
      np.testing.assert_allclose(
        new['batch_stats']['var'],
        0.9 + 0.1 * values.var(0, ddof=int(unbiased)),
        atol=1e-12,
      )

  def test_masked_gradient(self):
    """Padding neither contributes to the gradient nor gets one."""
    with enable_x64(True):
      norm = layers.BatchNorm()
      x = jax.random.normal(KEY, (4, 3))
      variables = norm.init(KEY, x)
      mask = jnp.array([True, False, True, True])

      def loss(x, mask):
        out, _ = norm.apply(variables, x, mask, True, mutable=['batch_stats'])
        valid = jnp.ones(len(x), bool) if mask is None else mask
        return jnp.sum(jnp.sin(out) * valid[:, None])

      gradient = jax.jit(jax.grad(loss))
      grads = np.asarray(gradient(x, mask))
      np.testing.assert_allclose(grads[1], 0)
      rows = np.array([0, 2, 3])
      np.testing.assert_allclose(
        grads[rows], gradient(np.asarray(x)[rows], None), atol=1e-12
      )

  def test_padding_does_not_grow(self):
    """Without care it would, by 300 per norm, if all valid values are equal."""
    norm = layers.BatchNorm()
    x = jnp.array([[2.0, 3.0], [9.0, -9.0]])
    out, _ = norm.apply(
      norm.init(KEY, x),
      x,
      jnp.array([True, False]),
      True,
      mutable=['batch_stats'],
    )
    np.testing.assert_array_equal(out, 0)

  @parameterized.parameters(0, 1)
  def test_tiny_batches_stay_finite(self, num_valid):
    norm = layers.BatchNorm()
    x = jax.random.normal(KEY, (3, 2))
    variables = norm.init(KEY, x)
    out, new = norm.apply(
      variables, x, jnp.arange(3) < num_valid, True, mutable=['batch_stats']
    )
    chex.assert_tree_all_finite((out, new))
    if not num_valid:
      chex.assert_trees_all_equal(new['batch_stats'], variables['batch_stats'])


class GeneratorTest(parameterized.TestCase):
  @parameterized.parameters(
    ((8, 8, 1), 3), ((12, 8, 3), 5), ((28, 28, 1), 10), ((4, 4, 2), 1)
  )
  def test_shapes(self, image_shape, num_classes):
    generator = models.image_generator(
      image_shape, num_classes, noise_dim=7, width=2
    )
    variables = _random_variables(generator)
    labels = np.arange(5) % num_classes
    images, stats = jax.jit(generator.apply, static_argnames='train')(
      variables, jax.random.normal(KEY, (5, 7)), labels, train=True
    )
    self.assertEqual(images.shape, (5, *image_shape))
    chex.assert_trees_all_equal_shapes(stats, variables.stats)
    images = np.asarray(images)
    np.testing.assert_allclose(images.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(images.std((0, 1, 2)), 1, atol=1e-2)

  @parameterized.parameters((100, 10, 682_499), (256, 100, 1_690_115))
  def test_official_sizes(self, noise_dim, num_classes, want):
    generator = models.image_generator(
      (32, 32, 3), num_classes, noise_dim=noise_dim
    )
    params = jax.eval_shape(generator.init, KEY).params
    self.assertEqual(_size(params), want)

  def test_without_bias_before_norm(self):
    with_bias, without = (
      jax.eval_shape(
        models.image_generator((8, 8, 1), 3, width=2, bias_before_norm=b).init,
        KEY,
      ).params
      for b in (True, False)
    )
    self.assertIn('bias', with_bias['conv1'])
    for name in ('conv1', 'conv2'):
      self.assertNotIn('bias', without[name])
    self.assertIn('bias', without['conv3'])

  def test_size_error(self):
    with self.assertRaisesRegex(ValueError, r'divisible by 4.*\(30, 28, 1\)'):
      models.image_generator((30, 28, 1), 10)


if __name__ == '__main__':
  absltest.main()
