"""Tests of the engine: plain loops, masks, resuming, traces, errors."""

from typing import NamedTuple

from absl.testing import absltest, parameterized
import chex
import jax
from jax import enable_x64
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedftg_jax import base, federation, keys, losses, solvers, trees
from fedftg_jax.data import clients
from fedftg_jax.methods import fed_avg, scaffold
from tests import problems

KEY = jax.random.key(7)


def counter():
  """Makes a method whose slots count a client's rounds and the server's."""
  return base.Method(
    init=lambda key, variables: (jnp.zeros(()), jnp.zeros(2)),
    upload=lambda view, local, objective, key: (view.own + 1, ()),
    update=lambda variables, shared, received, key: (
      variables,
      shared + 1,
      base.Info(),
    ),
  )


def sequential_round(model, variables, data, limits, key, round_, settings):
  """Runs FedAvg as a plain Python loop over clients and steps, without padding.

  `limits` are the largest numbers of steps of the cohort's clients.
  """
  total = sum(int(data.count[k]) for k in limits)
  mean = jax.tree.map(jnp.zeros_like, variables)
  rate = settings['lr'] * settings['lr_decay'] ** round_

  @jax.jit
  def gradient(variables, x, y):
    def loss(params):
      output = model.apply(variables._replace(params=params), x, train=True)
      return losses.cross_entropy(output.logits, y), output.stats

    return jax.grad(loss, has_aux=True)(variables.params)

  for k, limit in limits.items():
    count = int(data.count[k])
    rows = np.asarray(data.index[k])[:count]
    solve_key = keys.client_keys(key, round_, k).solve
    key_order, _ = jax.random.split(solve_key)
    local, taken = variables, 0
    for epoch in range(settings['epochs']):
      draws = jax.random.uniform(
        jax.random.fold_in(key_order, epoch),
        (data.index.shape[1],),
        jnp.float32,
      )
      order = np.argsort(np.asarray(draws)[:count])
      for first in range(0, count, problems.BATCH):
        if taken == limit:
          break
        taken += 1
        batch = rows[order[first : first + problems.BATCH]]
        grads, stats = gradient(local, data.x[batch], data.y[batch])
        scale = min(1.0, settings['clip'] / float(optax.global_norm(grads)))
        params = jax.tree.map(
          lambda p, g: p - rate * (scale * g + settings['decay'] * p),
          local.params,
          grads,
        )
        local = base.Variables(params, stats)
    mean = jax.tree.map(lambda m, p: m + count / total * p, mean, local)
  return mean


class RoundTest(parameterized.TestCase):
  def test_stacked_equals_sequential(self):
    self.check_sequential(problems.NORMED)

  @pytest.mark.slow
  def test_stacked_equals_sequential_without_statistics(self):
    self.check_sequential(problems.LINEAR)

  def check_sequential(self, model):
    """Compares two rounds: unequal clients, partial batches, straggler,
    padding."""
    settings = dict(epochs=2, clip=0.5, decay=1e-2, lr=0.1, lr_decay=0.9)
    with enable_x64(True):
      data = problems.make_data()
      fed = problems.make(
        model, solve=problems.solver(epochs=2, clip_norm=0.5, weight_decay=1e-2)
      )
      state = fed.init(KEY)
      want = state.variables
      for leaf in jax.tree.leaves(want):
        self.assertEqual(leaf.dtype, np.float64)
      for round_, limits in enumerate(
        ({0: 99, 2: 99, 3: 99, 4: 2}, {1: 99, 4: 99})
      ):
        pad = [-1] * (6 - len(limits))
        cohort = problems.row([*limits, *pad])
        cohort = cohort._replace(
          num_steps=jnp.array([*limits.values(), *[0] * len(pad)], jnp.int32)
        )
        state, info = fed.round(state, data, cohort, KEY)
        want = sequential_round(
          model, want, data, limits, KEY, round_, settings
        )
        chex.assert_trees_all_close(state.variables, want, atol=1e-10)
        chex.assert_trees_all_close(info.models['average'], want, atol=1e-10)
        self.assertEqual(int(info.metrics['num_selected']), len(limits))

  def test_client_chunk(self):
    self.check_chunk(2)

  @parameterized.parameters(1, 4, 5, 7)
  @pytest.mark.slow  # below `parameters`: applies to all cases
  def test_other_client_chunks(self, chunk):
    self.check_chunk(chunk)

  def check_chunk(self, chunk):
    data, cohort = problems.DATA, problems.row([0, 1, 2, 3, 4])
    rounds = [problems.make(client_chunk=c).round for c in (0, chunk)]
    state = problems.make().init(KEY)
    (a, _), (b, _) = [r(state, data, cohort, KEY) for r in rounds]
    chex.assert_trees_all_close(a, b, atol=1e-6)

  def test_absent_clients_keep_their_slots(self):
    """They are the same bits, after a round in which all took part."""
    fed = problems.make(
      method=base.chain(fed_avg.fed_avg(), counter()), uplink=optax.trace(0.5)
    )
    before, _ = fed.round(
      fed.init(KEY), problems.DATA, problems.row(range(5)), KEY
    )
    cohort = problems.row([0, 1, 3, -1], arrived=[True, False, True, False])
    after, _ = fed.round(before, problems.DATA, cohort, KEY)
    (_, counts), trace = after.clients
    np.testing.assert_array_equal(counts[:, 0], [2, 1, 1, 2, 1])
    for new, old in zip(
      jax.tree.leaves(trace), jax.tree.leaves(before.clients[1])
    ):
      for k in range(5):
        self.assertEqual(np.array_equal(new[k], old[k]), k not in (0, 3))

  def test_what_the_absent_would_send_is_zero(self):
    """This holds even for a message of 1 / steps, which would not be finite."""
    method = base.Method(
      upload=lambda view, local, objective, key: (
        view.own,
        1.0 / local.num_steps,
      ),
      summed=lambda sent: (sent.message, sent.share),
      stacked=lambda sent: sent.delta,
      update=lambda variables, shared, received, key: (
        variables,
        shared,
        base.Info(
          {
            'message': received.summed[0],
            'share': received.summed[1],
            'delta': optax.tree.norm(
              jax.tree.map(lambda a: a[1:], received.stacked)
            ),
          }
        ),
      ),
    )
    fed = problems.make(method=base.chain(fed_avg.fed_avg(), method))
    cohort = problems.row([0, 3, -1, -1], arrived=[True, False] + [False] * 2)
    _, info = fed.round(fed.init(KEY), problems.DATA, cohort, KEY)
    steps = 2 * 2  # epochs times batches of client 0
    self.assertAlmostEqual(float(info.metrics['message']), 1 / steps)
    self.assertAlmostEqual(float(info.metrics['share']), 5 * 7 / 40, places=5)
    self.assertEqual(float(info.metrics['delta']), 0.0)

  def test_dropout_is_like_not_being_selected(self):
    fed = problems.make()
    state = fed.init(KEY)
    step = fed.round
    dropped, _ = step(
      state,
      problems.DATA,
      problems.row([0, 1, 3], arrived=[True, False, True]),
      KEY,
    )
    padded, _ = step(state, problems.DATA, problems.row([0, 3, -1]), KEY)
    chex.assert_trees_all_close(dropped.variables, padded.variables, atol=1e-6)

  def test_round_in_which_nobody_arrives(self):
    fed = problems.make(
      method=base.chain(
        fed_avg.fed_avg(optax.sgd(1.0, momentum=0.9)), counter()
      )
    )
    step = fed.round
    state, _ = step(fed.init(KEY), problems.DATA, problems.row([0, 1]), KEY)
    after, info = step(
      state, problems.DATA, problems.row([0, 1], arrived=[False, False]), KEY
    )
    chex.assert_trees_all_equal(after._replace(round=state.round), state)
    chex.assert_trees_all_equal(info.models['average'], state.variables)
    self.assertEqual(int(after.round), 2)
    self.assertTrue(np.isnan(info.metrics['train_loss']))

  def test_straggler_without_a_step_and_empty_client(self):
    sizes = (6, 0, 4)
    fed = problems.make(sizes=sizes)
    state = fed.init(KEY)
    cohort = problems.row([0, 1, 2], num_steps=[0, 9, 0], num_clients=3)
    new, _ = fed.round(state, problems.make_data(sizes), cohort, KEY)
    chex.assert_tree_all_finite(new.variables)
    chex.assert_trees_all_close(new.variables, state.variables, atol=1e-7)

  def test_client_without_examples_never_arrives(self):
    sizes = (6, 0, 4)
    data = problems.make_data(sizes)
    fed = problems.make(sizes=sizes)
    state = fed.init(KEY)
    alone, info = fed.round(state, data, problems.row([1], num_clients=3), KEY)
    chex.assert_trees_all_equal(alone.variables, state.variables)
    self.assertEqual(int(info.metrics['num_arrived']), 0)
    for weighting in federation.WEIGHTINGS:
      fed = problems.make(sizes=sizes, weighting=weighting)
      with_it, _ = fed.round(
        state, data, problems.row([0, 1, 2], num_clients=3), KEY
      )
      without, _ = fed.round(
        state, data, problems.row([0, -1, 2], num_clients=3), KEY
      )
      chex.assert_trees_all_close(
        with_it.variables, without.variables, atol=1e-6
      )

  def test_one_client(self):
    fed = problems.make(sizes=(6,))
    state, metrics = federation.run(
      fed,
      fed.init(KEY),
      problems.make_data((6,)),
      problems.schedule([[0], [0]], 1),
      KEY,
    )
    chex.assert_tree_all_finite(state)
    self.assertLess(metrics['train_loss'][1], metrics['train_loss'][0])

  def test_uniform_weighting(self):
    """The result is the unweighted mean of what each client alone would
    give."""
    fed = problems.make(weighting='uniform')
    state = fed.init(KEY)
    step = fed.round
    both, _ = step(state, problems.DATA, problems.row([1, 2]), KEY)
    one, two = [
      step(state, problems.DATA, problems.row([k, -1]), KEY)[0] for k in (1, 2)
    ]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, one.variables, two.variables)
    chex.assert_trees_all_close(both.variables, mean, atol=1e-6)

  def test_removing_a_client_leaves_the_others_draws(self):
    """Client 4 is the largest: without it the rows are padded to fewer."""
    whole = problems.DATA
    parts = [np.asarray(whole.index[k][: whole.count[k]]) for k in range(4)]
    fewer = clients.from_partition(whole.x, whole.y, parts)
    state = problems.make().init(KEY)
    a, _ = problems.make().round(state, whole, problems.row([0, 1, 3]), KEY)
    b, _ = problems.make(sizes=problems.SIZES[:4]).round(
      state, fewer, problems.row([0, 1, 3], num_clients=4), KEY
    )
    chex.assert_trees_all_close(a.variables, b.variables, atol=1e-6)

  def test_models_that_are_one(self):
    """The average is the broadcast model for FedAvg, but not with momentum."""
    for optimizer, want in (
      (None, {'average': 'broadcast'}),
      (optax.sgd(1.0), {}),
    ):
      fed = problems.make(method=fed_avg.fed_avg(optimizer))
      state = fed.init(KEY)
      _, info = fed.round(state, problems.DATA, problems.row([0, 1]), KEY)
      self.assertEqual(dict(info.same), want)
      with self.assertRaisesRegex(ValueError, "needs client_state='host'"):
        fed.init(KEY, 'folder')

  def test_bits(self):
    fed = problems.make(
      method=base.chain(
        fed_avg.fed_avg(),
        base.Method(
          init=lambda key, variables: (jnp.zeros(5), ()),
          broadcast=lambda shared: shared[:3],
          upload=lambda view, local, objective, key: (
            view.own,
            jnp.zeros(2, jnp.int32),
          ),
        ),
      )
    )
    state = fed.init(KEY)
    model_bits = 32 * (64 * problems.NUM_CLASSES + problems.NUM_CLASSES)
    rows = problems.schedule([[0, 1, 4], [2, -1, -1], [1, 2, 3]])
    rows = rows._replace(arrived=rows.arrived & (rows.client_id != 1))
    _, metrics = federation.run(fed, state, problems.DATA, rows, KEY, every=2)
    down, up = model_bits + 3 * 32, model_bits + 2 * 32
    self.assertEqual(metrics['bits_down'].tolist(), [3 * down, down, 3 * down])
    self.assertEqual(metrics['bits_up'].tolist(), [2 * up, up, 2 * up])
    self.assertEqual(metrics['bits_up'].dtype, np.int64)

  def test_bits_of_a_codec(self):
    """They are what its state says, and the distortion is reported."""

    def update(updates, state, params=None, **_):
      del params
      coded = jax.tree.map(lambda a: 0.5 * a, updates)
      return coded, state._replace(bits=state.bits + 3)

    class Coded(NamedTuple):
      bits: jax.Array

    codec = optax.GradientTransformationExtraArgs(
      lambda params: Coded(jnp.uint32(7)), update
    )
    fed = problems.make(uplink=codec)
    state = fed.init(KEY)
    cohort = problems.row([0, 1, 2], arrived=[True, True, False])
    for bits in (10, 13):
      state, info = fed.round(state, problems.DATA, cohort, KEY)
      self.assertEqual(info.metrics['bits_up'].tolist(), [bits, bits, 0, 0, 0])
      np.testing.assert_allclose(
        info.metrics['uplink/distortion'], 0.25, rtol=1e-6
      )

  def test_who_worked_and_did_not_arrive(self):
    """The client keeps its new slot, and the server receives nothing."""
    fed = problems.make(method=base.chain(fed_avg.fed_avg(), counter()))
    state = fed.init(KEY)
    cohort = problems.row([0, 1, 2], arrived=[True, False, False])
    without, _ = fed.round(state, problems.DATA, cohort, KEY)
    worked = cohort._replace(worked=jnp.arange(5) < 2)
    after, info = fed.round(state, problems.DATA, worked, KEY)
    chex.assert_trees_all_equal(after.variables, without.variables)
    (_, counts), _ = after.clients
    np.testing.assert_array_equal(counts[:3, 0], [1, 1, 0])
    self.assertEqual(info.metrics['num_arrived'], 1)
    self.assertEqual(info.metrics['bits_up'].tolist()[1:], [0] * 4)

  def test_who_worked_in_a_schedule(self):
    """`run`, with a padded chunk, equals single rounds."""
    fed = problems.make(method=base.chain(fed_avg.fed_avg(), counter()))
    rows = problems.schedule([[4, 0, 1], [1, 2, -1], [0, 1, 2]])
    arrived = rows.arrived & (rows.client_id != 1)
    for worked, want in (
      (None, [2, 0, 2, 0, 1]),
      (rows.arrived, [2, 3, 2, 0, 1]),
    ):
      state, _ = federation.run(
        fed,
        fed.init(KEY),
        problems.DATA,
        rows._replace(arrived=arrived, worked=worked),
        KEY,
        every=2,
      )
      (_, counts), _ = state.clients
      np.testing.assert_array_equal(counts[:, 0], want)

  def test_the_server_may_act_though_nobody_arrived(self):
    for always in (False, True):
      part = counter()._replace(always=always)
      fed = problems.make(method=base.chain(fed_avg.fed_avg(), part))
      cohort = problems.row([0, 1, 2], arrived=[False] * 3)
      state, _ = fed.round(fed.init(KEY), problems.DATA, cohort, KEY)
      self.assertEqual(state.shared[1], float(always))

  def test_rounds_that_select_nobody(self):
    """They count as rounds; the padding of a chunk does not."""
    ids = np.array([[0, 1], [5, 5], [2, 3]])
    rows = base.Cohort(ids, True, base.NO_LIMIT)
    want = None
    for always in (False, True):
      part = counter()._replace(always=always)
      fed = problems.make(method=base.chain(fed_avg.fed_avg(), part))
      state, metrics = federation.run(
        fed, fed.init(KEY), problems.DATA, rows, KEY, every=2
      )
      self.assertEqual(state.round, 3)
      self.assertEqual(state.shared[1], 3 if always else 2)
      np.testing.assert_array_equal(metrics['num_selected'], [2, 0, 2])
      np.testing.assert_array_equal(metrics['bits_down'] > 0, [1, 0, 1])
      np.testing.assert_array_equal(
        np.isnan(metrics['train_loss']), [False, True, False]
      )
      want = want or state.variables
      chex.assert_trees_all_equal(state.variables, want)

  def test_what_is_sent_is_what_is_seen(self):
    """Each client is sent its own model; the average is that of the results."""
    seen = {}
    method = base.chain(
      fed_avg.fed_avg(),
      base.Method(
        send=lambda variables, shared, slot, key: jax.tree.map(
          lambda a: a + slot, variables
        ),
        common=lambda variables, shared, round_, key: round_ + 1,
        upload=lambda view, local, objective, key: (
          view.own,
          (view.received, view.common),
        ),
        stacked=lambda sent: sent.message,
        update=lambda variables, shared, received, key: (
          seen.update(stacked=received.stacked),
          (variables, shared, base.Info()),
        )[1],
      ),
    )
    with jax.disable_jit():
      fed = problems.make(method=method, solve=solvers.frozen)
      state = fed.init(KEY)
      after, _ = fed.round(
        state, problems.DATA, problems.row([0, 1], [True] * 2), KEY
      )
    received, common = seen['stacked']
    np.testing.assert_array_equal(common[:2], [1, 1])
    for old, sent, new in zip(
      *map(jax.tree.leaves, (state.variables, received, after.variables))
    ):
      np.testing.assert_allclose(sent[1], old + 1, atol=1e-6)
      np.testing.assert_allclose(new, old + 12 / 19, atol=1e-6)


class RunTest(parameterized.TestCase):
  ROWS = [[0, 1, 4], [2, 3, 4], [0, 3, -1], [1, 2, 3], [0, 1, 2]]

  def test_scan_equals_loop_equals_resume_bitwise(self):
    fed = problems.make(
      method=base.chain(fed_avg.fed_avg(optax.adam(0.01)), counter())
    )
    rows = problems.schedule(self.ROWS)
    cut = lambda a, b: jax.tree.map(lambda v: v[a:b], rows)
    run = lambda state, rows, every=None: federation.run(
      fed, state, problems.DATA, rows, KEY, every=every
    )
    whole, metrics = run(fed.init(KEY), rows, 5)
    for every in (1, 2):
      chunked, again = run(fed.init(KEY), rows, every)
      chex.assert_trees_all_equal(chunked, whole)
      chex.assert_trees_all_equal(again, metrics)
    half, _ = run(fed.init(KEY), cut(0, 2), 5)
    resumed, _ = run(half, cut(2, 5), 5)
    chex.assert_trees_all_equal(resumed, whole)
    self.assertEqual(int(whole.round), 5)
    self.assertEqual(metrics['train_loss'].shape, (5,))

  def test_one_trace(self):
    """Chunks, a partial last chunk and a second run share one trace."""
    model = problems.LINEAR
    chex.clear_trace_counter()
    traced = chex.assert_max_traces(n=1)(model.apply)
    fed = problems.make(model._replace(apply=traced), client_chunk=2)
    state = problems.make().init(KEY)
    for _ in range(2):
      state, _ = federation.run(
        fed, state, problems.DATA, problems.schedule(self.ROWS), KEY, every=2
      )
    self.assertEqual(int(state.round), 10)

  def test_nothing_moves_between_host_and_device_unasked(self):
    fed = problems.make(method=base.chain(fed_avg.fed_avg(), counter()))
    state = fed.init(KEY)
    with jax.transfer_guard('disallow'):
      federation.run(
        fed, state, problems.DATA, problems.schedule(self.ROWS), KEY, every=2
      )

  @pytest.mark.slow
  def test_memory_grows_with_the_clients_that_are_stacked(self):
    """It does not grow with the cohort if a chunk limits the stacked
    clients."""

    def work_space(cohort, client_chunk, **settings):
      data = problems.make_data([20] * cohort)
      fed = problems.make(
        problems.NORMED,
        sizes=[20] * cohort,
        client_chunk=client_chunk,
        **settings,
      )
      rows = problems.row(range(cohort), num_clients=cohort)
      compiled = fed.round.lower(fed.init(KEY), data, rows, KEY).compile()
      return compiled.memory_analysis().temp_size_in_bytes

    of_8, of_16, of_32 = (work_space(s, 0) for s in (8, 16, 32))
    self.assertBetween((of_32 - of_16) / (of_16 - of_8), 1.8, 2.2)
    capped = [work_space(s, 4) for s in (8, 32)]
    self.assertLess(capped[1], 1.1 * capped[0])
    self.assertLess(capped[1], of_8)
    slots = dict(
      method=base.chain(fed_avg.fed_avg(), scaffold.scaffold()),
      uplink=optax.trace(0.5),
    )
    for settings in ({}, slots):
      slope = (
        work_space(32, 0, **settings) - work_space(16, 0, **settings)
      ) / 16
      fed = problems.make(problems.NORMED, sizes=[20], **settings)
      each = federation.bytes_per_client(fed, problems.make_data([20]))
      self.assertBetween(each / slope, 0.9, 2.5)

  def test_slots_that_hold_the_model(self):
    """A slot may hold the model's own arrays, although the state is donated."""
    method = base.Method(init=lambda key, v: (v.params, v.params))
    fed = problems.make(method=base.chain(fed_avg.fed_avg(), method))
    federation.run(
      fed, fed.init(KEY), problems.DATA, problems.schedule(self.ROWS), KEY
    )

  def test_every_is_checked(self):
    fed = problems.make()
    with self.assertRaisesRegex(ValueError, 'every must be at least 1, got 0'):
      federation.run(
        fed,
        fed.init(KEY),
        problems.DATA,
        problems.schedule(self.ROWS),
        KEY,
        every=0,
      )

  def test_callback_sees_every_chunk(self):
    fed = problems.make()
    seen = []
    federation.run(
      fed,
      fed.init(KEY),
      problems.DATA,
      problems.schedule(self.ROWS),
      KEY,
      every=2,
      callback=lambda done, state, info: seen.append(
        (done, int(state.round), len(info.metrics['train_loss']))
      ),
    )
    self.assertEqual(seen, [(2, 2, 2), (4, 4, 2), (5, 5, 1)])

  def test_over_seeds(self):
    fed = problems.make()
    seeds = jnp.stack([jax.random.key(s) for s in (3, 4)])
    both = federation.over_seeds(fed)
    rows = problems.schedule(self.ROWS)
    state, metrics = federation.run(
      both, both.init(seeds), problems.DATA, rows, seeds, every=2
    )
    self.assertEqual(metrics['train_loss'].shape, (2, 5))
    for r, key in enumerate(seeds):
      alone, alone_metrics = federation.run(
        fed, fed.init(key), problems.DATA, rows, key, every=2
      )
      chex.assert_trees_all_close(
        jax.tree.map(lambda a: a[r], state), alone, atol=1e-5
      )
      np.testing.assert_allclose(
        metrics['train_loss'][r], alone_metrics['train_loss'], atol=1e-5
      )

  def test_float32_against_float64(self):
    rows = problems.schedule(self.ROWS)
    fed = problems.make()
    start = jax.tree.map(np.asarray, fed.init(KEY))
    single, _ = federation.run(
      fed, jax.tree.map(jnp.asarray, start), problems.DATA, rows, KEY
    )
    with enable_x64(True):
      wide = jax.tree.map(
        lambda a: jnp.asarray(
          a, jnp.float64 if a.dtype == np.float32 else None
        ),
        start,
      )
      double, _ = federation.run(
        problems.make(), wide, problems.make_data(), rows, KEY
      )
    self.assertEqual(jax.tree.leaves(double.variables)[0].dtype, np.float64)
    chex.assert_trees_all_close(
      jax.tree.map(np.asarray, single.variables.params),
      jax.tree.map(
        lambda a: np.asarray(a, np.float32), double.variables.params
      ),
      atol=1e-5,
    )

  @parameterized.parameters(
    ([[0, 5]], None),  # 5 is padding for 5 clients
    ([[0, 6]], 'client 6 in round 0 .* 0 to 4'),
    ([[0, 1], [3, 3]], 'client 3 is twice in round 1'),
    ([0, 1], r'\[rounds, cohort\]'),
  )
  def test_schedule_errors(self, ids, message):
    ids = np.array(ids)
    rows = base.Cohort(ids, True, base.NO_LIMIT)
    if message is None:
      checked = federation.check_schedule(rows, 5)
      np.testing.assert_array_equal(checked.arrived, [[True, False]])
    else:
      with self.assertRaisesRegex(ValueError, message):
        federation.check_schedule(rows, 5)

  def test_schedule_rows_are_sorted(self):
    rows = base.Cohort(
      np.array([[3, 1]]), np.array([[False, True]]), np.array([[7, 8]])
    )
    checked = federation.check_schedule(rows, 5)
    np.testing.assert_array_equal(checked.client_id, [[1, 3]])
    np.testing.assert_array_equal(checked.arrived, [[True, False]])
    np.testing.assert_array_equal(checked.num_steps, [[8, 7]])

  @parameterized.parameters(
    (dict(weighting='size'), 'weighting'),
    (dict(client_chunk=-1), 'client_chunk'),
    (dict(sizes=()), 'num_clients'),
  )
  def test_factory_errors(self, kwargs, name):
    with self.assertRaisesRegex(ValueError, name):
      problems.make(**kwargs)


class ServerOptimizerTest(absltest.TestCase):
  def test_sgd_of_rate_one_is_the_mean(self):
    plain = problems.make()
    sgd = problems.make(method=base.chain(fed_avg.fed_avg(optax.sgd(1.0))))
    cohort = problems.row([0, 1, 4])
    a, _ = plain.round(plain.init(KEY), problems.DATA, cohort, KEY)
    b, _ = sgd.round(sgd.init(KEY), problems.DATA, cohort, KEY)
    chex.assert_trees_all_close(a.variables, b.variables, atol=1e-6)

  def test_momentum_by_hand(self):
    """FedAvgM: v <- 0.9 v + d, w <- w - v, with d = w - mean."""
    fed = problems.make(
      method=base.chain(fed_avg.fed_avg(optax.sgd(1.0, momentum=0.9)))
    )
    step = fed.round
    state, velocity = fed.init(KEY), None
    for ids in ([0, 1], [2, 4]):
      new, info = step(state, problems.DATA, problems.row(ids), KEY)
      change = jax.tree.map(
        jnp.subtract, state.variables.params, info.models['average'].params
      )
      velocity = (
        change
        if velocity is None
        else jax.tree.map(lambda v, d: 0.9 * v + d, velocity, change)
      )
      want = jax.tree.map(jnp.subtract, state.variables.params, velocity)
      chex.assert_trees_all_close(new.variables.params, want, atol=1e-6)
      state = new

  def test_statistics_take_the_plain_mean(self):
    model = problems.NORMED
    step = lambda method: (
      problems.make(model, method)
      .round(
        problems.make(model, method).init(KEY),
        problems.DATA,
        problems.row([1, 4]),
        KEY,
      )[0]
      .variables
    )
    adam = step(base.chain(fed_avg.fed_avg(optax.adam(0.1))))
    plain = step(base.chain(fed_avg.fed_avg()))
    chex.assert_trees_all_close(adam.stats, plain.stats, atol=1e-6)


class TreesTest(absltest.TestCase):
  def test_scatter_drops_and_gather_clips(self):
    table = {'a': jnp.arange(6.0).reshape(3, 2)}
    rows = trees.gather(table, jnp.array([2, 3]))
    np.testing.assert_array_equal(rows['a'], [[4, 5], [4, 5]])
    new = trees.scatter(table, jnp.array([0, 3]), {'a': jnp.full((2, 2), 9.0)})
    np.testing.assert_array_equal(new['a'], [[9, 9], [2, 3], [4, 5]])


if __name__ == '__main__':
  absltest.main()
