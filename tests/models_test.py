"""Shapes, counts, convolutions that agree, normalisation under masks."""

from absl.testing import absltest
from absl.testing import parameterized
import chex
from flax import linen as nn
import jax
from jax import enable_x64
import jax.numpy as jnp
import numpy as np

from fedftg_jax import models
from fedftg_jax.models import layers

KEY = jax.random.key(0)


class ClassifiersTest(parameterized.TestCase):

  @parameterized.parameters(
      # 28x28x1: conv weights + biases, then dense, by hand
      ('mlp', (28, 28, 1), 784 * 200 + 200 + 200 * 200 + 200 + 2010, 200),
      ('lenet', (28, 28, 1),
       25 * 32 + 32 + 25 * 32 * 64 + 64 + 3136 * 128 + 128 + 1290, 128),
      ('fedavg_cnn', (32, 32, 3),
       75 * 64 + 64 + 1600 * 64 + 64 + 4096 * 384 + 384 + 384 * 192 + 192
       + 1930, 192))
  def test_sizes(self, name, image_shape, num_params, num_features):
    model = models.build(name, image_shape, 10)
    variables = model.init(KEY)
    self.assertEqual(
        sum(a.size for a in jax.tree.leaves(variables.params)), num_params)
    out = model.apply(variables, jnp.zeros((2, *image_shape)))
    self.assertEqual(out.logits.shape, (2, 10))
    self.assertEqual(out.features.shape, (2, num_features))
    self.assertEqual(variables.stats, {})

  @parameterized.parameters('none', 'batch', 'group')
  def test_norms(self, norm):
    model = models.build('lenet', (8, 8, 1), 3, norm=norm)
    variables = model.init(KEY)
    x = jax.random.normal(KEY, (4, 8, 8, 1))
    out = model.apply(variables, x, mask=jnp.ones(4, bool), train=True)
    chex.assert_tree_all_finite(out)
    chex.assert_trees_all_equal_structs(out.stats, variables.stats)
    self.assertEqual(bool(variables.stats), norm == 'batch')
    self.assertEqual('bias' in variables.params['conv0'], norm != 'batch')

  def test_raw_pixels_are_normalised(self):
    model = models.build('mlp', (2, 2, 3), 3, mean=(.1, .2, .3), std=(.5, .6, .7))
    variables = model.init(KEY)
    raw = np.random.RandomState(0).randint(0, 256, (4, 2, 2, 3)).astype(np.uint8)
    scaled = (raw / 255 - [.1, .2, .3]) / [.5, .6, .7]
    np.testing.assert_allclose(
        model.apply(variables, jnp.asarray(raw)).logits,
        model.apply(variables, jnp.asarray(scaled, jnp.float32)).logits,
        atol=1e-5)

  def test_unknown_model(self):
    with self.assertRaisesRegex(ValueError, "lenet.*got 'vgg'"):
      models.build('vgg', (8, 8, 1), 3)


class ConvolutionTest(parameterized.TestCase):

  @parameterized.parameters(3, 5, 4)
  def test_implementations_agree(self, size):
    with enable_x64(True):
      x = jax.random.normal(KEY, (2, 6, 7, 3))
      kernel = jax.random.normal(KEY, (size, size, 3, 4))

      def loss(implementation, x, kernel):
        out = layers.convolve(x, kernel, implementation)
        return jnp.sum(jnp.sin(out)), out

      (_, want), want_grads = jax.value_and_grad(
          lambda *a: loss('lax', *a), (0, 1), has_aux=True)(x, kernel)
      for implementation in layers.CONV_IMPLEMENTATIONS[:-1]:
        (_, out), grads = jax.value_and_grad(
            lambda *a: loss(implementation, *a), (0, 1), has_aux=True)(x, kernel)
        np.testing.assert_allclose(out, want, atol=1e-12)
        chex.assert_trees_all_close(grads, want_grads, atol=1e-11)

  def test_enlarged(self):
    with enable_x64(True):
      x = jax.random.normal(KEY, (2, 4, 3, 5))
      kernel = jax.random.normal(KEY, (3, 3, 5, 2))
      large = jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
      want = layers.convolve(large, kernel, 'lax')
      for implementation in layers.CONV_IMPLEMENTATIONS:
        np.testing.assert_allclose(
            layers.convolve_enlarged(x, kernel, implementation), want,
            atol=1e-12)

  def test_no_grouped_convolution_under_vmap(self):
    x, kernel = jnp.zeros((2, 3, 6, 6, 2)), jnp.zeros((2, 3, 3, 2, 4))
    for implementation in layers.CONV_IMPLEMENTATIONS[:-1]:
      text = jax.jit(jax.vmap(lambda x, k: layers.convolve(
          x, k, implementation))).lower(x, kernel).as_text()
      self.assertNotIn('convolution', text)

  def test_max_pool(self):
    x = jax.random.normal(KEY, (2, 5, 4, 3))
    np.testing.assert_array_equal(
        layers.max_pool(x), nn.max_pool(x, (2, 2), (2, 2)))


class BatchNormTest(parameterized.TestCase):

  @parameterized.parameters(True, False)
  def test_masked_equals_unpadded(self, unbiased):
    with enable_x64(True):
      norm = layers.BatchNorm(unbiased=unbiased)
      x = jax.random.normal(KEY, (6, 3, 3, 2))
      variables = norm.init(KEY, x)
      mask = jnp.array([True, True, False, True, False, False])
      padded, new = norm.apply(
          variables, x, mask, True, mutable=['batch_stats'])
      alone, want = norm.apply(
          variables, x[mask], None, True, mutable=['batch_stats'])
      np.testing.assert_allclose(padded[mask], alone, atol=1e-12)
      chex.assert_trees_all_close(new, want, atol=1e-12)
      values = np.asarray(x)[np.asarray(mask)].reshape(-1, 2)
      np.testing.assert_allclose(
          new['batch_stats']['mean'], .1 * values.mean(0), atol=1e-12)
      np.testing.assert_allclose(
          new['batch_stats']['var'],
          .9 + .1 * values.var(0, ddof=int(unbiased)), atol=1e-12)

  def test_masked_gradient(self):
    """Padding takes no part in the gradient, and gets none."""
    with enable_x64(True):
      norm = layers.BatchNorm()
      x = jax.random.normal(KEY, (4, 3))
      variables = norm.init(KEY, x)
      mask = jnp.array([True, False, True, True])

      def loss(x, mask):
        out, _ = norm.apply(variables, x, mask, True, mutable=['batch_stats'])
        valid = jnp.ones(len(x), bool) if mask is None else mask
        return jnp.sum(jnp.sin(out) * valid[:, None])

      grads = jax.grad(loss)(x, mask)
      np.testing.assert_allclose(grads[1], 0)
      np.testing.assert_allclose(
          grads[mask], jax.grad(loss)(x[mask], None), atol=1e-12)

  @parameterized.parameters(0, 1)
  def test_tiny_batches_stay_finite(self, num_valid):
    norm = layers.BatchNorm()
    x = jax.random.normal(KEY, (3, 2))
    variables = norm.init(KEY, x)
    out, new = norm.apply(variables, x, jnp.arange(3) < num_valid, True,
                          mutable=['batch_stats'])
    chex.assert_tree_all_finite((out, new))
    if not num_valid:
      chex.assert_trees_all_equal(new['batch_stats'], variables['batch_stats'])


class GeneratorTest(parameterized.TestCase):

  @parameterized.parameters(
      ((8, 8, 1), 3), ((12, 8, 3), 5), ((28, 28, 1), 10), ((4, 4, 2), 1))
  def test_shapes(self, image_shape, num_classes):
    generator = models.image_generator(
        image_shape, num_classes, noise_dim=7, width=2)
    variables = generator.init(KEY)
    labels = jnp.arange(5) % num_classes
    images, stats = generator.apply(
        variables, jax.random.normal(KEY, (5, 7)), labels, train=True)
    self.assertEqual(images.shape, (5, *image_shape))
    chex.assert_trees_all_equal_shapes(stats, variables.stats)
    np.testing.assert_allclose(images.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(images.std((0, 1, 2)), 1, atol=1e-2)

  @parameterized.parameters((100, 10, 682_499), (256, 100, 1_690_115))
  def test_official_sizes(self, noise_dim, num_classes, want):
    generator = models.image_generator(
        (32, 32, 3), num_classes, noise_dim=noise_dim)
    params = jax.eval_shape(generator.init, KEY).params
    self.assertEqual(sum(a.size for a in jax.tree.leaves(params)), want)

  def test_without_bias_before_norm(self):
    with_bias, without = (
        jax.eval_shape(models.image_generator(
            (8, 8, 1), 3, width=2, bias_before_norm=b).init, KEY).params
        for b in (True, False))
    self.assertIn('bias', with_bias['conv1'])
    for name in ('conv1', 'conv2'):
      self.assertNotIn('bias', without[name])
    self.assertIn('bias', without['conv3'])

  def test_size_error(self):
    with self.assertRaisesRegex(ValueError, r'divisible by 4.*\(30, 28, 1\)'):
      models.image_generator((30, 28, 1), 10)


if __name__ == '__main__':
  absltest.main()
