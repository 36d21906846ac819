"""Tests of forward mode (`jax.jvp`) through rounds, in float64."""

import functools

from absl.testing import absltest, parameterized
import jax
from jax import enable_x64
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedftg_jax import losses, models, recipes
from fedftg_jax.models import convolution
from tests import methods_test, problems

KEY = jax.random.key(2)


def step(tree, direction, size):
  return jax.tree.map(lambda a, b: a + size * b, tree, direction)


def relative_gap(tree, other):
  """Computes the largest difference over the largest value of `other`."""
  gap, scale = (
    max(float(jnp.abs(a).max()) for a in jax.tree.leaves(t))
    for t in (step(tree, other, -1.0), other)
  )
  return gap / scale


def round_along(fed):
  """Makes one program for a round and its derivative along a direction.

  It maps (state, cohort, direction) to (new state, tangent of the new model).
  """
  data = problems.make_data()._replace(public=methods_test.PUBLIC)

  @jax.jit
  def both(state, cohort, direction):
    def after(variables):
      begin = state._replace(variables=variables)
      new, _ = fed.round(begin, data, cohort, KEY)
      return new.variables, new

    _, tangent, new = jax.jvp(
      after, (state.variables,), (direction,), has_aux=True
    )
    return new, tangent

  return both


def lenet(norm='none'):
  """Builds a lenet with the CPU's convolutions, with hand-written gradients."""
  model = models.build(
    'lenet', problems.IMAGE_SHAPE, problems.NUM_CLASSES, norm=norm
  )
  return problems.quick(model)


def image_generator(conv):
  return problems.quick(
    models.image_generator(
      problems.IMAGE_SHAPE,
      problems.NUM_CLASSES,
      noise_dim=4,
      width=4,
      bias_before_norm=False,
      conv=conv,
    )
  )


ROWS = methods_test.ROWS
TRAIN, GENERATE = (
  [name for name, row in ROWS.items() if recipes.generates(row.method) == is_]
  for is_ in (False, True)
)


class RoundTest(parameterized.TestCase):
  """The derivative of the new model in the previous one, along a direction."""

  def check(self, row, *parts, ids=methods_test.Contract.IDS[0]):
    """Compares with central differences, in the second round.

    `parts` are a model and a generator.
    """
    with enable_x64(True):
      _, _, fed = methods_test.build(row, *parts)
      along = round_along(fed)
      cohort = jax.tree.map(lambda a: a[0], problems.schedule([ids]))
      state = fed.init(KEY)
      direction = jax.tree.map(
        lambda a: jax.random.normal(jax.random.key(3), a.shape), state.variables
      )
      state, _ = along(state, cohort, direction)
      _, tangent = along(state, cohort, direction)
      small = 1e-8  # few kinks (of |x|, of a clip) are within this distance
      above, below = (
        along(
          state._replace(variables=step(state.variables, direction, size)),
          cohort,
          direction,
        )[0].variables
        for size in (small, -small)
      )
      differences = jax.tree.map(
        lambda a, b: (a - b) / (2 * small), above, below
      )
      self.assertLess(relative_gap(tangent, differences), 1e-6)

  def test_round(self):
    self.check(ROWS['fed_prox'])

  def test_convolutions(self):
    """Covers training and frozen networks."""
    self.check(ROWS['moon'], lenet())

  @parameterized.parameters(*(name for name in TRAIN if name != 'moon'))
  @pytest.mark.slow  # below `parameters`: applies to all cases
  def test_convolutions_of_others(self, name):
    row = ROWS[name]
    norm = 'none' if row.policy == 'aggregate' else 'batch'
    self.check(row, row.model or lenet(norm))

  @parameterized.parameters(
    *(
      name
      for name in GENERATE
      if not name.endswith('+fed_ftg') or name == 'scaffold+fed_ftg'
    )
  )
  @pytest.mark.slow  # below `parameters`: applies to all cases
  def test_dense_generator(self, name):
    self.check(ROWS[name])

  @parameterized.parameters(
    ('fed_avg+fed_ftg', None), ('fed_avg+fed_ftg', 'im2col'), ('fed_df', None)
  )
  @pytest.mark.slow  # below `parameters`: applies to all cases
  def test_convolutions_of_a_generator(self, name, conv):
    self.check(ROWS[name], problems.make_model(), image_generator(conv))

  def test_no_gradient(self):
    """The generator has no gradient for classes that the cohort lacks.

    There Adam has a derivative because of its `eps_root`.
    """
    options = {'fed_ftg': {**methods_test.FTG, 'eps_root': 1e-12}}
    row = ROWS['fed_avg+fed_ftg']._replace(options=options)
    self.check(row, ids=[2, -1, -1, -1])  # one example

  @pytest.mark.slow
  def test_no_gradient_in_fed_df(self):
    options = {**methods_test.DF, 'eps_root': 1e-12, 'weight_decay': 0.0}
    row = ROWS['fed_df']._replace(options={'fed_df': options})
    self.check(row, ids=[2, -1, -1, -1])


class ServerAdamTest(parameterized.TestCase):
  @parameterized.parameters(0.0, 1e-12)
  def test_no_change(self, eps_root):
    """Where the mean change is 0, Adam's derivative is 0 or that of `eps_root`.

    Its steps equal those of optax.
    """
    adam = recipes.server_optimizer('adam', 0.1, eps_root)
    plain = optax.adam(0.1, eps=1e-3, eps_root=eps_root)

    def step(optimizer, change):
      return optimizer.update(change, optimizer.init(change))[0]

    changes = jnp.array([0.0, 1.0])
    new, tangent = jax.jvp(
      functools.partial(step, adam), (changes,), (jnp.ones(2),)
    )
    want, derivative = jax.jvp(
      functools.partial(step, plain), (changes,), (jnp.ones(2),)
    )
    np.testing.assert_array_equal(new, want)
    self.assertEqual(bool(jnp.isfinite(derivative[0])), eps_root > 0)
    np.testing.assert_allclose(tangent, jnp.nan_to_num(derivative), rtol=1e-6)


class ConvolutionTest(parameterized.TestCase):
  @parameterized.product(
    implementation=convolution.IMPLEMENTATIONS, enlarged=(False, True)
  )
  def test_hessian_vector_product(self, implementation, enlarged):
    """Differentiates forward over reverse, through the hand-written rules."""
    with enable_x64(True):
      size = 3 if enlarged else 5
      x = jax.random.normal(KEY, (2, 8, 8, 16))
      kernel = jax.random.normal(KEY, (size, size, 16, 24))

      def forward(kernel):
        if enlarged:
          return convolution.convolve_enlarged(x, kernel, implementation)
        return convolution.convolve(x, kernel, implementation)

      slope = jax.jit(
        jax.grad(lambda kernel: jnp.sum(jnp.sin(forward(kernel))))
      )
      direction = jax.random.normal(jax.random.key(1), kernel.shape)
      _, product = jax.jvp(slope, (kernel,), (direction,))
      small = 1e-5
      differences = (
        slope(kernel + small * direction) - slope(kernel - small * direction)
      ) / (2 * small)
      self.assertLess(relative_gap(product, differences), 1e-6)

  @parameterized.parameters('winograd', 'blocked', 'matmul', 'pallas', 'mixed')
  def test_frozen(self, implementation):
    """Convolutions with hand-written gradients pass within `frozen`.

    Their values are the same.
    """
    with enable_x64(True):
      x = jax.random.normal(KEY, (2, 4, 4, 16))
      kernel = jax.random.normal(KEY, (3, 3, 16, 24))
      plain = lambda k: convolution.convolve(x, k, implementation)
      along = lambda forward: jax.jit(lambda k: jax.jvp(forward, (k,), (k,)))
      with self.assertRaisesRegex(TypeError, 'forward-mode'):
        along(plain)(kernel)
      out, tangent = along(lambda k: losses.frozen(plain, k))(kernel)
      np.testing.assert_array_equal(out, jax.jit(plain)(kernel))
      np.testing.assert_allclose(tangent, out, rtol=1e-9, atol=1e-9)

  @parameterized.parameters('im2col', 'slices', 'lax')
  def test_without_a_gradient(self, implementation):
    """Convolutions whose gradients JAX derives pass by themselves, too."""
    with enable_x64(True):
      x = jax.random.normal(KEY, (2, 4, 4, 16))
      for size in (1, 3):
        kernel = jax.random.normal(KEY, (size, size, 16, 4))
        for function in (convolution.convolve, convolution.convolve_enlarged):
          if size == 1 and function is convolution.convolve_enlarged:
            continue
          forward = lambda k: jnp.sum(function(x, k, implementation) ** 2)
          _, tangent = jax.jvp(forward, (kernel,), (kernel,))
          np.testing.assert_allclose(tangent, 2 * forward(kernel), rtol=1e-9)


if __name__ == '__main__':
  absltest.main()
