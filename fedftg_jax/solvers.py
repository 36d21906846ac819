"""Local training: functions `(objective, view, key) -> Local`.

A solver is written for one client. Under `vmap` its loop runs for as many steps
as the client with the most steps needs; a client that has finished its own
steps does not change any more.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fedftg_jax.base import Batch, Data, Local, Method, Rule
from fedftg_jax.data import clients


def local_sgd(
  learning_rate: float | Callable,
  *,
  batch_size: int,
  epochs: int | None = None,
  steps: int | None = None,
  weight_decay: float = 0.0,
  clip_norm: float | None = None,
  optimizer: optax.GradientTransformation = optax.identity(),
  augment: Callable = lambda key, x: x,
) -> Callable:
  """Makes a solver of mini-batch descent, for a number of epochs or of steps.

  Each epoch visits the client's examples in a new order; the last batch of an
  epoch may be partial and is kept. The gradient is clipped by its global norm,
  THEN weight decay is added (`weight_decay` and the objective's own), then
  `optimizer` is applied, then the learning rate. The optimiser starts with a
  fresh state in every round (but see `kept_optimizer`). If the objective has a
  `rule`, the rule replaces the optimiser and the step; batches, clipping and
  weight decay are the same.

  Args:
    learning_rate: step size, or a function of the round (an optax schedule).
    batch_size: examples per step.
    epochs: passes over the client's data; give this or `steps`.
    steps: steps for every client, whatever its size (as SCAFFOLD asks for).
    weight_decay: coefficient of the L2 decay towards zero.
    clip_norm: largest global norm of a gradient; None for no clipping.
    optimizer: maps a gradient to a direction, e.g. `optax.trace(0.9)`; without
      a learning rate of its own. It is also applied to a tree of numbers, to
      find `Local.step_size`.
    augment: (key, images of a batch) -> images, applied anew in each step. It
      is applied only to images that the client trains on, not to those on which
      a method measures something.

  Returns:
    The solver.

  Raises:
    ValueError: unless exactly one of `epochs` and `steps` is given, or if a
      value is out of range.
  """
  if (epochs is None) == (steps is None):
    raise ValueError(
      'exactly one of epochs and steps must be given, got '
      f'epochs={epochs}, steps={steps}.'
    )
  for name, value in (
    ('batch_size', batch_size),
    ('epochs', epochs),
    ('steps', steps),
  ):
    if value is not None and value < 1:
      raise ValueError(f'{name} must be at least 1, got {value}.')
  clip = (
    optax.identity()
    if clip_norm is None
    else optax.clip_by_global_norm(clip_norm)
  )
  schedule = (
    learning_rate if callable(learning_rate) else (lambda _: learning_rate)
  )

  def solve(objective, view, key):
    count = view.data.count
    per_epoch = -(-count // batch_size)
    wanted = epochs * per_epoch if steps is None else jnp.where(count, steps, 0)
    num_steps = jnp.minimum(wanted, view.num_steps).astype(jnp.int32)
    # Splitting into three keeps the first two keys of a split into two, so the
    # draws without augmentation are what they were before it was added.
    key_order, key_loss, key_augment = jax.random.split(key, 3)
    rule = objective.rule or _descent(optimizer, view)
    num = rule.num_batches
    batch = batches(
      view.data,
      key_order,
      key_augment,
      batch_size,
      epochs and num * epochs,
      augment,
    )
    decay = weight_decay + objective.decay
    step_size = jnp.asarray(schedule(view.round))
    grad_fn = jax.value_and_grad(
      lambda params, variables, *args: objective.loss(
        variables._replace(params=params), *args
      ),
      has_aux=True,
    )

    def direction(variables, batch, key):
      params = variables.params
      (_, aux), grads = grad_fn(params, variables, batch, key)
      grads, _ = clip.update(grads, clip.init(params))
      return jax.tree.map(lambda g, p: g + decay * p, grads, params), aux

    def step(i, carry):
      variables, memory, total = carry
      drawn = tuple(batch(num * i + j) for j in range(num))
      variables, memory, cross_entropy = rule.step(
        direction,
        variables,
        memory,
        drawn,
        step_size,
        jax.random.fold_in(key_loss, i),
      )
      seen = jnp.sum(drawn[0].mask)
      total = (total[0] + seen * cross_entropy, total[1] + seen)
      return variables, memory, total

    zero = jnp.zeros((), jnp.result_type(float))
    variables, memory, (loss, seen) = jax.lax.fori_loop(
      0, num_steps, step, (view.variables, rule.memory, (zero, zero))
    )
    local = Local(
      variables,
      num_steps,
      step_size,
      {'train_loss': loss / jnp.maximum(seen, 1)},
      optimizer_state=view.optimizer_state,
    )
    if objective.rule is not None:
      return local._replace(memory=memory)
    state, (_, reach) = memory
    per_step = jnp.where(num_steps > 0, reach / jnp.maximum(num_steps, 1), 1)
    return local._replace(optimizer_state=state, step_size=step_size * per_step)

  return solve


def _descent(optimizer, view) -> Rule:
  """Makes the rule of gradient descent.

  Its memory is the optimiser's state, and what the optimiser has made of a
  gradient of ones so far: its state there, and the sum of its directions.
  """
  params = view.variables.params
  ones = jax.tree.map(lambda _: jnp.ones(()), params)  # a number per array
  begin = view.optimizer_state
  if begin is None:
    begin = optimizer.init(params)

  def step(direction, variables, memory, drawn, step_size, key):
    opt_state, (ones_state, reach) = memory
    (batch,) = drawn
    grads, aux = direction(variables, batch, key)
    updates, opt_state = optimizer.update(grads, opt_state, variables.params)
    params = jax.tree.map(
      lambda p, u: p - (step_size * u).astype(p.dtype),
      variables.params,
      updates,
    )
    variables = variables._replace(params=params, stats=aux.stats)
    moved, ones_state = optimizer.update(ones, ones_state, ones)
    moved = jax.tree.leaves(moved)
    reach += sum(moved) / max(len(moved), 1)
    return variables, (opt_state, (ones_state, reach)), aux.cross_entropy

  return Rule((begin, (optimizer.init(ones), jnp.zeros(()))), step)


def batches(
  data: Data,
  key_order: jax.Array,
  key_augment: jax.Array,
  batch_size: int,
  epochs: int | None = None,
  augment: Callable = lambda key, x: x,
) -> Callable[[jax.Array], Batch]:
  """Returns a function that gives a client's batches of one round by index.

  Each epoch visits the client's examples in a new order; its last batch may be
  partial.

  Args:
    data: one client's data.
    key_order: key that draws the orders.
    key_augment: key for `augment`.
    batch_size: examples in a batch.
    epochs: number of epochs whose orders are drawn beforehand; None draws each
      order where it is used, since a small client may need very many.
    augment: see `local_sgd`.

  Returns:
    A function i -> batch i.
  """
  per_epoch = -(-data.count // batch_size)
  order_of = _orders(key_order, data, epochs, batch_size)

  def batch(i):
    epoch, in_epoch = i // per_epoch, i % per_epoch
    first = in_epoch * batch_size
    positions = jax.lax.dynamic_slice(order_of(epoch), (first,), (batch_size,))
    drawn = clients.batch(
      data, positions, first + jnp.arange(batch_size) < data.count
    )
    x = augment(jax.random.fold_in(key_augment, i), drawn.x)
    return drawn._replace(x=x)

  return batch


def _orders(key, data, num_epochs, batch_size):
  """Makes a function of the epoch that gives the order of a client's positions.

  An order is a random permutation with valid positions first, [cap + pad]. The
  orders of `num_epochs` epochs are drawn beforehand; None draws each order
  where it is used, since a small client may need very many.
  """
  cap = data.index.shape[0]

  def order(epoch):
    draw = jax.random.uniform(
      jax.random.fold_in(key, epoch), (cap,), jnp.float32
    )
    positions = jnp.argsort(jnp.where(jnp.arange(cap) < data.count, draw, 2.0))
    return jnp.pad(positions, (0, -cap % batch_size))

  if num_epochs is None:
    return order
  table = jax.vmap(order)(jnp.arange(num_epochs))
  return lambda epoch: table[epoch]


def kept_optimizer(optimizer: optax.GradientTransformation) -> Method:
  """Makes a part of a method that keeps the clients' optimiser states.

  A client's optimiser continues where it stopped, however long the client was
  absent. This costs the memory of N states; nothing is sent.

  Args:
    optimizer: that of `local_sgd`.

  Returns:
    The method.
  """

  def train(inner, objective, view, key):
    del key
    local = inner(objective, view._replace(optimizer_state=view.own))
    return local, local.optimizer_state

  return Method(
    init=lambda key, variables: ((), optimizer.init(variables.params)),
    train=train,
  )


def frozen(objective, view, key) -> Local:
  """Returns the received model without training it, as a solver."""
  del objective, key
  return Local(
    view.variables,
    jnp.int32(0),
    jnp.zeros(()),
    {'train_loss': jnp.zeros(())},
    optimizer_state=view.optimizer_state,
  )
