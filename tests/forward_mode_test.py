"""Forward mode (`jax.jvp`) through rounds and convolutions, in float64."""

from absl.testing import absltest, parameterized
import jax
from jax import enable_x64
import jax.numpy as jnp
import numpy as np
import pytest

from fedftg_jax.models import convolution
from tests import methods_test, problems

KEY = jax.random.key(2)


def step(tree, direction, size):
  return jax.tree.map(lambda a, b: a + size * b, tree, direction)


def relative_gap(tree, other):
  """Largest difference over the largest value of `other`."""
  gap, scale = (
    max(float(jnp.abs(a).max()) for a in jax.tree.leaves(t))
    for t in (step(tree, other, -1.0), other)
  )
  return gap / scale


class RoundTest(parameterized.TestCase):
  """The new model's derivative in the one before, along a direction."""

  def check(self, row):
    with enable_x64(True):
      _, _, fed = methods_test.build(row)
      data = problems.make_data()._replace(public=methods_test.PUBLIC)
      cohort = jax.tree.map(
        lambda a: a[0], problems.schedule([methods_test.Contract.IDS[0]])
      )
      state, _ = fed.round(fed.init(KEY), data, cohort, KEY)

      @jax.jit
      def after(variables):
        begin = state._replace(variables=variables)
        return fed.round(begin, data, cohort, KEY)[0].variables

      model = state.variables
      direction = jax.tree.map(
        lambda a: jax.random.normal(jax.random.key(3), a.shape), model
      )
      _, tangent = jax.jvp(after, (model,), (direction,))
      small = 1e-8  # few kinks (of |x|, of a clip) lie within
      above, below = (after(step(model, direction, s)) for s in (small, -small))
      differences = jax.tree.map(
        lambda a, b: (a - b) / (2 * small), above, below
      )
      self.assertLess(relative_gap(tangent, differences), 1e-6)

  @parameterized.parameters('fed_prox', 'moon')
  def test_round(self, name):
    self.check(methods_test.ROWS[name])

  @parameterized.parameters(
    *(
      name
      for name in methods_test.ROWS
      if name not in ('fed_prox', 'moon')
      and (not name.endswith('+fed_ftg') or name == 'scaffold+fed_ftg')
    )
  )
  @pytest.mark.slow  # below: the cases of `parameters` take it over
  def test_round_of_others(self, name):
    self.check(methods_test.ROWS[name])


class ConvolutionTest(parameterized.TestCase):
  @parameterized.product(
    implementation=convolution.IMPLEMENTATIONS, enlarged=(False, True)
  )
  def test_hessian_vector_product(self, implementation, enlarged):
    """Forward over reverse, through the rules that are written by hand."""
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

  @parameterized.parameters('im2col', 'slices', 'lax')
  def test_without_a_gradient(self, implementation):
    """Those whose gradients are left to JAX pass by themselves, too."""
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
