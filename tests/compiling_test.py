"""Tests where compiler options for a CPU apply."""

from unittest import mock

from absl.testing import absltest
import jax
import jax.numpy as jnp

from fedftg_jax import compiling

UNKNOWN = {'xla_no_such_option': True}  # compiling with it raises an error


class JitTest(absltest.TestCase):
  def test_options_reach_the_compiler_of_a_cpu(self):
    double = compiling.jit(lambda x: 2 * x, UNKNOWN)
    with self.assertRaisesRegex(Exception, 'xla_no_such_option'):
      double(jnp.ones(3))

  def test_xla_flags_come_first(self):
    double = compiling.jit(lambda x: 2 * x, UNKNOWN)
    with mock.patch.dict('os.environ', XLA_FLAGS='--xla_no_such_option=false'):
      self.assertEqual(double(jnp.float32(3)), 6)

  def test_other_backends_have_none(self):
    double = compiling.jit(lambda x: 2 * x, UNKNOWN)
    self.assertEqual(double.on('gpu')(jnp.float32(3)), 6)

  def test_within_another_program(self):
    double = compiling.jit(lambda x: 2 * x, UNKNOWN)
    self.assertEqual(jax.jit(lambda x: double(x) + 1)(jnp.float32(3)), 7)

  def test_both_kinds_compile(self):
    """Uses the options that users have."""
    for options in (compiling.OFTEN, compiling.ONCE):
      with mock.patch.dict('os.environ', XLA_FLAGS=''):
        power = compiling.jit(lambda x, n: x**n, options, static_argnames='n')
        self.assertEqual(power(jnp.float32(3), n=2), 9)


if __name__ == '__main__':
  absltest.main()
