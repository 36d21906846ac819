"""Tests that the Python examples of the documents run, and that files exist."""

import pathlib
import re

from absl.testing import absltest, parameterized
import jax
import numpy as np
import optax
import pytest

from fedftg_jax import base
from fedftg_jax.methods import fed_avg
from tests import mutations, problems

ROOT = pathlib.Path(__file__).parents[1]


def examples(name):
  return re.findall(r'```python\n(.*?)```', (ROOT / name).read_text(), re.S)


class DocsTest(parameterized.TestCase):
  @pytest.mark.slow
  def test_readme(self):
    (code,) = examples('README.md')
    scope = {}
    exec(code, scope)
    self.assertLen(scope['metrics']['train_loss'], 3)

  def test_the_methods_of_build_md(self):
    scope = {}
    for code in examples('BUILD.md'):
      exec(code, scope)
    key, cohort = jax.random.key(0), problems.row([0, 4])

    def after(*parts):
      fed = problems.make(method=base.chain(fed_avg.fed_avg(), *parts))
      state, _ = fed.round(fed.init(key), problems.DATA, cohort, key)
      return jax.tree.leaves(state.variables)

    plain, zero, strong = (
      after(),
      after(scope['fed_prox'](0.0)),
      after(scope['fed_prox'](5.0)),
    )
    for a, b in zip(plain, zero):
      self.assertLess(abs(a - b).max(), 1e-6)
    self.assertGreater(abs(plain[0] - strong[0]).max(), 1e-3)
    method = base.chain(fed_avg.fed_avg(), scope['drift']())
    fed = problems.make(method=method)
    state = fed.init(key)
    new, info = fed.round(state, problems.DATA, problems.row([0]), key)
    moved = optax.tree.sub(new.variables.params, state.variables.params)
    np.testing.assert_allclose(
      info.metrics['drift'], optax.tree.norm(moved, squared=True), rtol=1e-5
    )

  @parameterized.parameters(
    'README.md',
    'BUILD.md',
    'docs/influence.md',
    'docs/methods.md',
    'docs/privacy.md',
    'docs/speed.md',
    'docs/tpu.md',
    'docs/uplink.md',
    'docs/when_it_pays.md',
  )
  def test_links_and_pictures_exist(self, name):
    page = ROOT / name
    for target in re.findall(r'\]\(([^)#]+)', page.read_text()):
      self.assertTrue((page.parent / target).exists(), target)

  def test_faults_fit_their_files(self):
    for fault in mutations.FAULTS:
      text = (ROOT / fault.path).read_text()
      self.assertEqual(text.count(fault.old), 1, fault.name)


if __name__ == '__main__':
  absltest.main()
