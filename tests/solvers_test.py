"""Tests of local training: masks, steps, stragglers, clipping before decay."""

from absl.testing import absltest, parameterized
import chex
import jax
from jax import enable_x64
import jax.numpy as jnp
import numpy as np
import optax

from fedftg_jax import base, federation, solvers
from fedftg_jax.methods import fed_avg
from tests import problems

KEY = jax.random.key(0)


def view(count=12, num_steps=base.NO_LIMIT, round_=0, cap=12):
  """Makes a client that holds rows 0 ... count - 1; its model is one number."""
  data = base.Data(
    jnp.arange(20.0)[:, None],
    jnp.zeros(20, jnp.int32),
    jnp.arange(cap) % 20,
    jnp.int32(count),
  )
  model = base.Variables(jnp.float32(2.0), {})
  return base.View(
    model,
    model,
    (),
    (),
    (),
    data,
    jnp.int32(0),
    jnp.float32(1),
    jnp.int32(round_),
    jnp.int32(num_steps),
  )


def objective(gradient, decay=0.0):
  """Makes a loss with a constant gradient that reports the mean of the
  batch."""

  def loss(variables, batch, key):
    del key
    seen = jnp.sum(batch.x[:, 0] * batch.mask) / jnp.maximum(
      batch.mask.sum(), 1
    )
    return gradient * variables.params, base.LossAux({}, seen)

  return base.Objective(loss, decay)


class LocalSgdTest(parameterized.TestCase):
  @parameterized.parameters(
    (12, dict(epochs=2), 6),
    (11, dict(epochs=1), 3),
    (1, dict(epochs=3), 3),
    (0, dict(epochs=3), 0),
    (12, dict(steps=7), 7),
    (1, dict(steps=7), 7),
    (0, dict(steps=7), 0),
  )
  def test_number_of_steps(self, count, length, want):
    solve = solvers.local_sgd(1.0, batch_size=4, **length)
    local = solve(objective(1.0), view(count), KEY)
    self.assertEqual(int(local.num_steps), want)
    np.testing.assert_allclose(local.variables.params, 2.0 - want)

  @parameterized.parameters(0, 1, 4, 100)
  def test_straggler(self, limit):
    solve = solvers.local_sgd(1.0, batch_size=4, epochs=2)
    local = solve(objective(1.0), view(num_steps=limit), KEY)
    self.assertEqual(int(local.num_steps), min(limit, 6))
    np.testing.assert_allclose(local.variables.params, 2.0 - min(limit, 6))

  @parameterized.parameters(dict(epochs=3), dict(steps=9))
  def test_every_epoch_sees_every_example_once(self, **length):
    """The mean of all batches, weighted by size, is that of the data."""
    count = 11
    solve = solvers.local_sgd(1.0, batch_size=4, **length)
    local = solve(objective(1.0), view(count), KEY)
    np.testing.assert_allclose(
      local.metrics['train_loss'], np.arange(count).mean(), rtol=1e-6
    )

  def test_epochs_are_shuffled_anew(self):
    """Orders are the same whether drawn beforehand or where they are used."""
    table, lazy = (
      jnp.stack(
        [solvers._orders(KEY, view(11).data, n, 4)(e) for e in range(3)]
      )
      for n in (3, None)
    )
    np.testing.assert_array_equal(table, lazy)
    self.assertEqual(table.shape, (3, 12))
    for order in np.asarray(table):
      np.testing.assert_array_equal(np.sort(order[:11]), np.arange(11))
    self.assertFalse(np.array_equal(table[0], table[1]))

  def test_clip_then_decay(self):
    """A gradient of 10 is clipped to 1; decay .5 * 2 is added, unclipped."""
    solve = solvers.local_sgd(
      0.1, batch_size=12, epochs=1, clip_norm=1.0, weight_decay=0.3
    )
    local = solve(objective(10.0, decay=0.2), view(), KEY)
    np.testing.assert_allclose(
      local.variables.params, 2.0 - 0.1 * (1.0 + 0.5 * 2.0), rtol=1e-6
    )

  def test_learning_rate_of_the_round(self):
    solve = solvers.local_sgd(lambda r: 0.5**r, batch_size=12, epochs=1)
    local = solve(objective(1.0), view(round_=3), KEY)
    np.testing.assert_allclose(local.step_size, 0.125)
    np.testing.assert_allclose(local.variables.params, 2.0 - 0.125)

  @parameterized.product(
    optimizer=(
      optax.identity(),
      optax.trace(0.9),
      optax.trace(0.5, nesterov=True),
    ),
    count=(0, 1, 12),
    limit=(base.NO_LIMIT, 2),
  )
  def test_mean_step_size(self, optimizer, count, limit):
    """A constant gradient moves the model by steps * step size * gradient."""
    solve = solvers.local_sgd(0.1, batch_size=3, epochs=2, optimizer=optimizer)
    local = solve(objective(3.0), view(count, limit), KEY)
    moved = 2.0 - local.variables.params
    reach = local.num_steps * local.step_size
    np.testing.assert_allclose(moved, 3 * reach, rtol=1e-5)
    if optimizer == optax.identity() or local.num_steps < 2:
      self.assertEqual(local.step_size, jnp.float32(0.1))

  def test_optimizer_state_is_fresh(self):
    solve = solvers.local_sgd(
      1.0, batch_size=6, epochs=1, optimizer=optax.trace(0.5)
    )
    for _ in range(2):
      local = solve(objective(1.0), view(), KEY)
      np.testing.assert_allclose(local.variables.params, 2.0 - 1.0 - 1.5)

  def test_optimizer_state_is_given_and_returned(self):
    """Two rounds of one step each equal one round of two steps."""
    one, two = (
      solvers.local_sgd(
        1.0, batch_size=12, epochs=n, optimizer=optax.trace(0.5)
      )
      for n in (1, 2)
    )
    first = one(objective(1.0), view(), KEY)
    second = one(
      objective(1.0),
      view()._replace(
        variables=first.variables, optimizer_state=first.optimizer_state
      ),
      KEY,
    )
    want = two(objective(1.0), view(), KEY)
    np.testing.assert_allclose(second.variables.params, 2.0 - 1.0 - 1.5)
    chex.assert_trees_all_equal(second.variables, want.variables)
    chex.assert_trees_all_equal(second.optimizer_state, want.optimizer_state)

  @parameterized.parameters(dict(epochs=2), dict(steps=6))
  def test_rule(self, **length):
    """It gets the batches of a descent, two in each step.

    Each epoch is two steps here. What it keeps is returned; clip, decay and
    learning rate are the solver's.
    """
    count, num = 11, 2

    def step(direction, variables, memory, batches, step_size, key):
      del key
      place, rows, directions = memory
      for batch in batches:
        grads, aux = direction(variables, batch, KEY)
        rows = rows.at[place].set(jnp.where(batch.mask, batch.x[:, 0], -1))
        directions = directions.at[place].set(grads)
        place += 1
      params = variables.params + step_size
      return (
        variables._replace(params=params),
        (place, rows, directions),
        aux[1],
      )

    rule = base.Rule(
      (jnp.int32(0), jnp.zeros((12, 4)), jnp.zeros(12)), step, num
    )
    solve = solvers.local_sgd(
      0.5, batch_size=4, clip_norm=1.0, weight_decay=0.3, **length
    )
    asked = objective(10.0, decay=0.2)._replace(rule=rule)
    local = solve(asked, view(count), KEY)
    self.assertEqual(int(local.num_steps), 6)
    np.testing.assert_allclose(local.variables.params, 2.0 + 6 * 0.5)
    place, rows, directions = local.memory
    self.assertEqual(int(place), 12)
    np.testing.assert_allclose(
      directions, np.repeat(1 + 0.5 * (2 + 0.5 * np.arange(6)), 2), rtol=1e-6
    )
    key_order, _, key_augment = jax.random.split(KEY, 3)
    batch = solvers.batches(view(count).data, key_order, key_augment, 4)
    for i, seen in enumerate(rows):
      x, _, mask = batch(i)
      np.testing.assert_array_equal(seen, np.where(mask, x[:, 0], -1))
    for epoch in np.asarray(rows).reshape(4, 12):
      np.testing.assert_array_equal(np.sort(epoch)[1:], np.arange(count))
    plain = solve(objective(10.0), view(count), KEY)
    self.assertEqual(plain.memory, ())

  @parameterized.parameters(
    (dict(), 'exactly one of epochs and steps'),
    (dict(epochs=1, steps=1), 'exactly one of epochs and steps'),
    (dict(epochs=0), 'epochs must be at least 1, got 0'),
    (dict(steps=-1), 'steps must be at least 1, got -1'),
  )
  def test_errors(self, length, message):
    with self.assertRaisesRegex(ValueError, message):
      solvers.local_sgd(1.0, batch_size=4, **length)

  def test_frozen(self):
    given = view()
    local = solvers.frozen(objective(1.0), given, KEY)
    chex.assert_trees_all_equal(local.variables, given.variables)
    self.assertEqual(int(local.num_steps), 0)

  def test_frozen_in_a_round(self):
    fed = problems.make(solve=solvers.frozen)
    state = fed.init(KEY)
    new, _ = fed.round(state, problems.DATA, problems.row([0, 1]), KEY)
    chex.assert_trees_all_close(new.variables, state.variables, atol=1e-7)


class MomentumTest(parameterized.TestCase):
  """Rounds of the engine against plain loops over clients and steps."""

  RATE, DECAY, EPOCHS = 0.1, 1e-2, 2
  # Client 0 is absent in the middle, 1 at the end, and 3 never arrives.
  ROWS = (
    ([0, 1, 3], [1, 1, 0]),
    ([1, 2, 4], [1, 1, 1]),
    ([0, 2, 3], [1, 1, 0]),
  )

  def engine(self, decay, nesterov, keep, **kwargs):
    """Returns the model and the slots after all rows."""
    optimizer = optax.trace(decay, nesterov)
    parts = (solvers.kept_optimizer(optimizer),) if keep else ()
    fed = problems.make(
      method=base.chain(fed_avg.fed_avg(), *parts),
      solve=solvers.local_sgd(
        self.RATE,
        batch_size=max(problems.SIZES),  # one batch, so the order has no effect
        epochs=self.EPOCHS,
        weight_decay=self.DECAY,
        optimizer=optimizer,
      ),
      **kwargs,
    )
    ids, arrived = (np.array(column) for column in zip(*self.ROWS))
    rows = problems.schedule(ids)._replace(arrived=arrived.astype(bool))
    state, _ = federation.run(fed, fed.init(KEY), problems.DATA, rows, KEY)
    return state

  def plainly(self, decay, nesterov, keep):
    """Returns the model and the clients' velocities, one gradient at a time."""
    model, data = problems.LINEAR, problems.DATA

    @jax.jit
    def gradient(params, x, y):
      def loss(params):
        logits = model.apply(base.Variables(params, {}), x).logits
        of_each = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return of_each.mean() + self.DECAY / 2 * optax.tree.norm(
          params, squared=True
        )

      return jax.grad(loss)(params)

    init = problems.make().init(KEY).variables.params
    zero = jax.tree.map(np.zeros_like, init)
    params, kept = init, {}
    for ids, arrived in self.ROWS:
      trained = []
      for k in (k for k, there in zip(ids, arrived) if there):
        rows = data.index[k][: data.count[k]]
        w, velocity = params, kept.get(k, zero) if keep else zero
        for _ in range(self.EPOCHS):
          g = gradient(w, data.x[rows], data.y[rows])
          velocity = jax.tree.map(lambda v, g: decay * v + g, velocity, g)
          step = velocity
          if nesterov:
            step = jax.tree.map(lambda v, g: decay * v + g, velocity, g)
          w = jax.tree.map(lambda w, s: w - self.RATE * s, w, step)
        kept[k] = velocity
        trained.append((len(rows), w))
      total = sum(n for n, _ in trained)
      params = jax.tree.map(
        lambda *leaves: (
          sum(n * a for (n, _), a in zip(trained, leaves)) / total
        ),
        *(w for _, w in trained),
      )
    return params, jax.tree.map(
      lambda *leaves: np.stack(leaves),
      *(kept.get(k, zero) for k in range(len(problems.SIZES))),
    )

  @parameterized.product(nesterov=(False, True), keep=(False, True))
  def test_equals_a_plain_loop(self, nesterov, keep):
    with enable_x64(True):
      state = self.engine(0.9, nesterov, keep)
      got = state.variables.params
      want, velocities = self.plainly(0.9, nesterov, keep)
      chex.assert_trees_all_close(got, want, rtol=0, atol=1e-12)
      other, _ = self.plainly(0.9, nesterov, not keep)
      apart = optax.tree.norm(optax.tree.sub(got, other))
      self.assertGreater(float(apart), 1e-3)
      if keep:
        (_, (kept,)), _ = state.clients  # the uplink's slots are ()
        chex.assert_trees_all_close(kept, velocities, rtol=0, atol=1e-12)

  def test_kept_on_the_host(self):
    on_device, on_host = (
      self.engine(0.9, False, True, client_state=place)
      for place in ('device', 'host')
    )
    chex.assert_trees_all_equal(on_host.variables, on_device.variables)
    chex.assert_trees_all_equal(on_host.clients, on_device.clients)


if __name__ == '__main__':
  absltest.main()
