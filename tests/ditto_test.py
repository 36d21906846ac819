"""Tests of Ditto: the common model is FedAvg's; own models by hand."""

from absl.testing import absltest
import chex
import jax
from jax import enable_x64

from fedftg_jax import base, losses, solvers
from fedftg_jax.methods import ditto, fed_avg, fed_dyn
from tests import problems

KEY = jax.random.key(4)
MODEL = problems.LINEAR
LAM, RATE = 0.7, 0.2


class DittoTest(absltest.TestCase):
  def test_two_rounds(self):
    """Each round is one step on all data; client 3 is absent from the
    second."""
    with enable_x64(True):
      data = problems.make_data()
      solve = solvers.local_sgd(RATE, batch_size=15, epochs=1)
      part = ditto.ditto(MODEL, LAM)
      fed, plain = (
        problems.make(MODEL, base.chain(fed_avg.fed_avg(), p), solve=solve)
        for p in (part, base.Method())
      )
      state = start = fed.init(KEY)
      common = plain.init(KEY)
      own = {k: start.variables.params for k in (1, 3)}
      for cohort in ([1, 3], [1]):
        received = common.variables.params
        for k in cohort:
          rows = data.index[k][: int(data.count[k])]

          def loss(params, rows=rows):
            logits = MODEL.apply(base.Variables(params, {}), data.x[rows])
            return losses.cross_entropy(logits.logits, data.y[rows])

          own[k] = jax.tree.map(
            lambda v, g, w: v - RATE * (g + LAM * (v - w)),
            own[k],
            jax.grad(loss)(own[k]),
            received,
          )
        state, _ = fed.round(state, data, problems.row(cohort), KEY)
        common, _ = plain.round(common, data, problems.row(cohort), KEY)
        chex.assert_trees_all_equal(state.variables, common.variables)
      slots = state.clients[0][1].params
      for k, want in own.items():
        got = jax.tree.map(lambda a, k=k: a[k], slots)
        chex.assert_trees_all_close(got, want, atol=1e-12)
      before, after = fed.personalise(
        state, data, *[jax.numpy.int32(1)] * 2, KEY
      )
      chex.assert_trees_all_close(
        before['ditto'].variables.params, own[1], atol=1e-12
      )
      self.assertIn('personalised_ditto', after)

  def test_own_models_are_not_corrected(self):
    """What corrects the common model would cancel the personal objective."""
    with enable_x64(True):
      data = problems.make_data()
      solve = solvers.local_sgd(RATE, batch_size=15, epochs=1)
      own = []
      for others in ((), (fed_dyn.fed_dyn(0.1),)):
        parts = fed_avg.fed_avg(), *others, ditto.ditto(MODEL, LAM)
        fed = problems.make(MODEL, base.chain(*parts), solve=solve)
        state, common = fed.init(KEY), []
        for _ in range(2):
          common.append(state.variables)
          # The same model is received, whatever the method made of it.
          state = state._replace(variables=common[0])
          state, _ = fed.round(state, data, problems.row([1, 3]), KEY)
        own.append(state.clients[0][-1].params)
      chex.assert_trees_all_close(*own, atol=1e-12)

  def test_errors(self):
    with self.assertRaisesRegex(ValueError, 'lam must be at least 0, got -1'):
      ditto.ditto(MODEL, -1.0)


if __name__ == '__main__':
  absltest.main()
