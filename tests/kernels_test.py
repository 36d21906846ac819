"""Tests of the counts of a GPU's kernels, on programs written by hand."""

import subprocess
import sys

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp

from fedftg_jax.contestants import kernels
from tests.programs import ROOT

# A fusion that reads one of three rows and one that writes one, a condition, a
# loop of five, and instructions that cost nothing.
PROGRAM = """
HloModule jit_f

%read (p: f32[3,8], i: s32[]) -> f32[1,8] {
  %p = f32[3,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %slice.0 = f32[1,8]{1,0} dynamic-slice(%p, %i, %i)
}

%write (p: f32[3,8], q: f32[1,8], i: s32[]) -> f32[3,8] {
  %p = f32[3,8]{1,0} parameter(0)
  %q = f32[1,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %update = f32[3,8]{1,0} dynamic-update-slice(%p, %q, %i, %i)
}

%few (t: (f32[4], pred[4])) -> f32[4] {
  %t = (f32[4]{0}, pred[4]{0}) parameter(0)
  ROOT %a = f32[4]{0} get-tuple-element(%t), index=0
}

%many (t: (f32[4], pred[4])) -> f32[4] {
  %t = (f32[4]{0}, pred[4]{0}) parameter(0)
  %a = f32[4]{0} get-tuple-element(%t), index=0
  %b = pred[4]{0} get-tuple-element(%t), index=1
  %copy = f32[4]{0} copy(%a)
  ROOT %chosen = f32[4]{0} select(%b, %copy, %a)
}

%b (t: (s32[], bf16[2,5])) -> (s32[], bf16[2,5]) {
  %t = (s32[], bf16[2,5]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%t), index=0
  %x = bf16[2,5]{1,0} get-tuple-element(%t), index=1
  %y = bf16[2,5]{1,0} negate(%x)
  ROOT %out = (s32[], bf16[2,5]{1,0}) tuple(%n, %y)
}

ENTRY %main (x: f32[3,8], i: s32[]) -> f32[3,8] {
  %x = f32[3,8]{1,0} parameter(0), metadata={op_name="x"}
  %i = s32[] parameter(1)
  %z = (s32[], /*index=1*/bf16[2,5]{1,0}) parameter(2)
  %t = (f32[4]{0}, pred[4]{0}) parameter(3)
  %c = pred[] parameter(4)
  %row = f32[1,8]{1,0} fusion(%x, %i), calls=%read
  %if = f32[4]{0} conditional(%c, %t, %t), branch_computations={%few, %many}
  %loop = (s32[], bf16[2,5]) while(%z), body=%b, "known_trip_count":{"n":"5"}
  ROOT %new = f32[3,8]{1,0} fusion(%x, %row, /*index=2*/%i), calls=%write
}
"""
ROW = 4 * 8  # bytes


class KernelsTest(parameterized.TestCase):
  def test_count(self):
    found = kernels.count(PROGRAM)
    read = ROW + ROW + 4  # the row, twice, and its number
    write = ROW + ROW + 4
    copied, chosen = 16 + 16, 4 + 16 + 16 + 16
    loop = 5 * (20 + 20)
    self.assertEqual(found.kernels, 1 + 1 + 2 + 5)
    self.assertEqual(found.bytes, read + write + copied + chosen + loop)

  def test_a_program_of_xla(self):
    """A scan of seven, whose body is one kernel or more."""

    def run(length):
      step = lambda x, _: (jnp.sin(x), ())
      program = jax.jit(lambda x: jax.lax.scan(step, x, length=length)[0])
      return kernels.count(program.lower(jnp.ones(1000)).compile().as_text())

    seven, nine = run(7), run(9)
    self.assertGreaterEqual(nine.kernels - seven.kernels, 2)
    self.assertGreaterEqual(nine.bytes - seven.bytes, 2 * 2 * 4000)

  def test_condition_on_a_flag(self):
    """XLA names two branches otherwise than several."""
    text = PROGRAM.replace(
      'branch_computations={%few, %many}',
      'true_computation=%few, false_computation=%many',
    )
    self.assertEqual(kernels.count(text), kernels.count(PROGRAM))

  def test_unknown_number_of_times(self):
    text = PROGRAM.replace('"known_trip_count"', '"other"')
    with self.assertRaisesRegex(ValueError, 'loop: runs an unknown number'):
      kernels.count(text)

  def test_another_text(self):
    with self.assertRaisesRegex(ValueError, 'no entry: not the text'):
      kernels.count('module @jit_f {\n}\n')

  @parameterized.parameters(
    ('--programs=W9', 'error: --programs=W9: must be one of W1'),
    ('--programs=', 'error: --programs=: must name programs'),
    (
      '--programs=W4:client_chunk=2',
      'error: --programs=W4:client_chunk=2: no clients',
    ),
  )
  def test_errors_of_the_program(self, argument, message):
    ran = subprocess.run(
      [sys.executable, '-m', 'experiments.gpu_programs', argument],
      cwd=ROOT,
      capture_output=True,
      text=True,
    )
    self.assertEqual(ran.returncode, 2)
    self.assertEqual(ran.stdout, '')
    self.assertIn(message, ran.stderr)


if __name__ == '__main__':
  absltest.main()
