"""Estimates, during training, the model without each of some clients.

Xue, Niu, Zheng, Tang, Lyu, Wu and Chen, Toward Understanding the Influence of
Individual Clients in Federated Learning, AAAI 2021, arXiv:2012.10936
(Fed-Influence). Let C_t be the cohort of round t, s_t the state after it, and
C_t \\ c the cohort in which client c does not arrive. Then

  eps_0^c = 0
  eps_t^c = round(s_{t-1}, C_t \\ c) - round(s_{t-1}, C_t)
            + d round(s_{t-1}, C_t \\ c)[eps_{t-1}^c]

estimates s_t without c minus s_t. The first difference is the effect of c's
absence in this round; the derivative propagates the effect of its absence in
earlier rounds. For FedAvg with full gradients these are equations 10 and 11.
Deviations:

- s_t is everything that the next round needs: the model, BatchNorm statistics,
  and the method's slots on the server and on clients. The estimate therefore
  works for every method and includes its server step.
- The derivative is forward mode (`jax.jvp`) through the actual round, with its
  mini-batches, clipping, decay and momentum. The paper's approximations are in
  `curvature`.
- If c is the only client of a cohort, the round without c leaves the model
  unchanged.
- The rounding of a codec is differentiated as the identity
  (`straight_through`).
- Discrete values, such as random labels, permutations, counters and flags, have
  no derivative and stay those of the run.

Batches and schedule stay those of the run: random keys depend on client and
round, and a cohort without c is the cohort in which c does not arrive. Shares
of the data (s_k, N) stay those of all clients.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedftg_jax import compiling, evaluation, trees
from fedftg_jax.base import (
  Federation,
  Info,
  Method,
  Model,
  PyTree,
  State,
  Variables,
)

CARRIES = ('derivative', 'identity')


class NoForwardMode(ValueError):
  """An error: the round cannot be differentiated in forward mode."""


class Estimate(NamedTuple):
  """The estimates for C tracked clients."""

  # eps: the state without the client minus the state, every leaf [C, ...]. A
  # leaf that is not floating point is replaced by zeros [C].
  change: State
  truncated: jax.Array  # [C, L] bool, for each array of the parameters


class Retrained(NamedTuple):
  """The simulations without each of C tracked clients."""

  states: State  # every leaf [C, ...]


class Slot(NamedTuple):
  """The server's slot in a federation that tracks clients."""

  shared: PyTree  # the method's slot
  tracked: Estimate | Retrained


def tracking(
  fed: Federation,
  clients: Sequence[int],
  *,
  through: Federation | None = None,
  carry: str = 'derivative',
  truncation: float | None = None,
  at_once: int = 1,
) -> Federation:
  """Adds estimates of the tracked clients' influence to a simulation.

  The training itself is that of `fed`, and `run`, chunks, checkpoints and
  `over_seeds` accept the result in place of `fed`. For each tracked client a
  round costs about two rounds more, but nothing for a client that has not been
  selected yet. The memory is that of one state for each tracked client.

  Example:
    fed = influence.tracking(fed, range(10))
    state, _ = federation.run(fed, fed.init(key), data, schedule, key)
    scores = influence.on_test(model, state, test_x, test_y)

  Args:
    fed: from `federation`.
    clients: ids of the C clients to track.
    through: a federation with states like those of `fed`, whose rounds replace
      those of `fed` in the equation above: with a part of `curvature`, with
      `client_stage` of the part that refines the model on the server, or with
      the uplink `straight_through`. None for `fed`.
    carry: how earlier changes are propagated: by the round's 'derivative', or
      by the 'identity', which ignores curvature and needs no forward mode.
    truncation: if the derivative makes the change of an array of the parameters
      longer by more than this factor, only the changes of single rounds count
      for that array from then on. The paper's layer-wise examination and
      truncation (LWET) is 1 with `curvature('blocks')`. None for never.
    at_once: number of tracked clients that are stacked; 1 takes them one after
      another and skips those without any influence yet.

  Returns:
    The federation. Its metrics are those of `fed` and 'influence/size', the
    mean over the tracked clients of |eps| / |w|, both for the parameters, and
    with `truncation` 'influence/truncated', the share of truncated arrays.

  Raises:
    ValueError: for a value out of range, or if clients' slots are on the host;
      when the first round is traced, for a client that does not exist, for a
      round without forward mode, or for an uplink that codes, because its
      rounding has no derivative.
  """
  if carry not in CARRIES:
    raise ValueError(f'carry must be one of {CARRIES}, got {carry!r}.')
  if truncation is not None and not truncation >= 0:
    raise ValueError(f'truncation must be at least 0, got {truncation}.')
  via = fed if through is None else through

  def begin(state, num):
    blocks = len(jax.tree.leaves(state.variables.params))
    zero = jax.tree.map(
      lambda a: (
        jnp.zeros((num, *a.shape), a.dtype) if _floating(a) else jnp.zeros(num)
      ),
      state,
    )
    return Estimate(zero, jnp.zeros((num, blocks), bool))

  def advance(ids, state, new, info, tracked, data, cohort, key):
    seen = new
    if through is not None:
      _check_alike(jax.eval_shape(through.init, key), state)
      seen, info = through.round(state, data, cohort, key)
    if carry == 'derivative':
      if through is None and 'uplink/distortion' in info.metrics:
        raise NoForwardMode(
          'the uplink codes what clients send, and its rounding has no '
          'derivative that could carry an influence; give `through` with '
          "straight_through(uplink), or use carry='identity', or retrain."
        )
      _check_forward_mode(via, state, data, cohort, key)

    def one(row):
      client, change, truncated = row
      here = _takes_part(cohort, client)

      def without(state):
        return via.round(state, data, _without(cohort, client), key)[0]

      def move():
        later, carried, cut = _carried(
          without, state, change, truncated, carry, truncation
        )
        of_round = jax.tree.map(
          lambda a, b, e: jnp.where(here, a - b, 0) if _floating(a) else e,
          later,
          seen,
          change,
        )
        return optax.tree.add(carried, of_round), cut

      moves = here
      if carry == 'derivative':
        moves |= jnp.any(
          jnp.stack([jnp.any(e != 0) for e in jax.tree.leaves(change)])
        )
      return jax.lax.cond(moves, move, lambda: (change, truncated))

    rows = jnp.asarray(ids), tracked.change, tracked.truncated
    tracked = Estimate(*_mapped(one, rows, at_once))
    metrics = {}
    if truncation is not None:
      metrics['influence/truncated'] = jnp.mean(tracked.truncated)
    return tracked, metrics

  return _wrapped(fed, clients, at_once, begin, advance)


def retraining(
  fed: Federation, clients: Sequence[int], *, at_once: int = 1
) -> Federation:
  """Adds a simulation without each tracked client beside the simulation itself.

  It computes what `tracking` estimates, by training C more models in the same
  program; in each of them, one client does not arrive. A round costs as much as
  C + 1 rounds.

  Args:
    fed: from `federation`.
    clients: ids of the C clients to leave out, one in each training.
    at_once: number of trainings that are stacked; 1 takes them one after
      another.

  Returns:
    The federation; see `tracking`.

  Raises:
    ValueError: as in `tracking`.
  """

  def begin(state, num):
    return Retrained(trees.stack(state, num))

  def advance(ids, state, new, info, tracked, data, cohort, key):
    del state, new, info

    def one(row):
      client, state = row
      return fed.round(state, data, _without(cohort, client), key)[0]

    rows = jnp.asarray(ids), tracked.states
    return Retrained(_mapped(one, rows, at_once)), {}

  return _wrapped(fed, clients, at_once, begin, advance)


def client_stage(part: Method) -> Method:
  """Returns `part` with the same slots but without its step on the server.

  Used in `through`, in place of a part that refines the model. The influence is
  then that on the model before it is refined; what refining adds is held
  constant.

  Args:
    part: a method.

  Returns:
    The method without its server step.
  """
  return part._replace(
    update=lambda variables, shared, received, key: (variables, shared, Info())
  )


def straight_through(
  uplink: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Wraps a codec so that it is differentiated as the identity.

  Used in `through`, in place of the run's uplink. Rounding to a grid turns a
  small change into 0 or a whole step; in the mean over its random dither it is
  the change itself.

  Args:
    uplink: one without error feedback.

  Returns:
    The uplink; its messages are the same.

  Raises:
    ValueError: when first used, for an uplink with error feedback, where what
      is not sent is kept for later and so is not lost in the mean.
  """
  uplink = optax.with_extra_args_support(uplink)

  @jax.custom_jvp
  def code(delta, state, params, key):
    return uplink.update(delta, state, params, key=key)

  @code.defjvp
  def derivative(primals, tangents):
    out = code(*primals)
    still = jax.tree.map(jnp.zeros_like, out[1])
    return out, (tangents[0], _tangent(out[1], still))

  def init(params):
    state = uplink.init(params)
    if jax.tree.leaves(optax.tree.get(state, 'residual', ())):
      raise NoForwardMode(
        'the uplink keeps what it does not send (error feedback), which has no '
        "derivative that could carry an influence; use carry='identity', or "
        'retrain.'
      )
    return state

  def update(delta, state, params=None, *, key, **extra):
    del extra
    return code(delta, state, params, key)

  return optax.GradientTransformationExtraArgs(init, update)


def untracked(state: State) -> State:
  """Returns the state of the simulation itself."""
  if not isinstance(state.shared, Slot):
    return state
  return state._replace(shared=state.shared.shared)


def models(state: State) -> Variables:
  """Returns the model without each tracked client, every leaf [C, ...]."""
  tracked = state.shared.tracked
  if isinstance(tracked, Retrained):
    return tracked.states.variables
  return jax.tree.map(
    lambda a, e: a + e if _floating(a) else trees.stack(a, len(e)),
    state.variables,
    tracked.change.variables,
  )


def changes(state: State) -> Variables:
  """Returns the model without each tracked client minus the model.

  This is the paper's influence on parameters; every leaf is [C, ...].
  """
  tracked = state.shared.tracked
  if isinstance(tracked, Estimate):
    return tracked.change.variables
  return jax.tree.map(
    lambda a, b: a - b, tracked.states.variables, state.variables
  )


@functools.partial(
  compiling.jit, cpu_options=compiling.OFTEN, static_argnums=(0, 4, 5)
)
def on_test(
  model: Model,
  state: State,
  x: jax.Array,
  y: jax.Array,
  batch_size: int = 500,
  batch_stats: bool = False,
) -> dict[str, jax.Array]:
  """Computes each tracked client's influence on the test set.

  It is the value of the model without the client minus that of the model: a
  difference of two evaluations, not a derivative.

  Args:
    model: the classifier.
    state: of a federation that tracks clients.
    x: [M, H, W, channels] images.
    y: [M] labels.
    batch_size: examples in a batch.
    batch_stats: see `evaluation.evaluate`.

  Returns:
    {'loss', 'accuracy', 'parameters'}: [C]. 'loss' is high for a client whose
    absence hurts (the paper's FIL); 'accuracy' is low for it (FIA);
    'parameters' is the norm of the change of the parameters.
  """

  def scores(variables):
    found = evaluation.evaluate(model, variables, x, y, batch_size, batch_stats)
    return found['loss'], found['accuracy']

  loss, accuracy = scores(state.variables)
  losses, accuracies = jax.lax.map(scores, models(state))
  return {
    'loss': losses - loss,
    'accuracy': accuracies - accuracy,
    'parameters': _lengths(changes(state)),
  }


def _wrapped(
  fed: Federation,
  clients: Sequence[int],
  at_once: int,
  begin: Callable,
  advance: Callable,
) -> Federation:
  """Adds a slot for tracked values to `fed` and updates it in every round."""
  ids = np.asarray(clients)
  if ids.ndim != 1 or not len(ids) or not np.issubdtype(ids.dtype, np.integer):
    raise ValueError(f'clients must be ids, at least one, got {clients}.')
  if len(np.unique(ids)) < len(ids) or ids.min() < 0:
    raise ValueError(
      f'clients must be different ids from 0 on, got {ids.tolist()}.'
    )
  if at_once < 1:
    raise ValueError(f'at_once must be at least 1, got {at_once}.')
  if fed.client_state != 'device':
    raise ValueError(
      "tracking clients needs client_state='device', got "
      f"{fed.client_state!r}: it keeps the changes of all clients' slots."
    )

  def init(key, /, folder=None):
    state = fed.init(key, folder)
    return state._replace(shared=Slot(state.shared, begin(state, len(ids))))

  @jax.jit
  def round_(state, data, cohort, key):
    num_clients = data.count.shape[0]
    if ids.max() >= num_clients:
      raise ValueError(
        f'client {ids.max()} cannot be tracked: the ids of the {num_clients} '
        f'clients are 0 to {num_clients - 1}.'
      )
    plain = untracked(state)
    new, info = fed.round(plain, data, cohort, key)
    tracked, metrics = advance(
      ids, plain, new, info, state.shared.tracked, data, cohort, key
    )
    state = new._replace(shared=Slot(new.shared, tracked))
    size = jnp.mean(_lengths(changes(state)))
    metrics['influence/size'] = size / optax.tree.norm(new.variables.params)
    return state, info._replace(metrics={**info.metrics, **metrics})

  def personalise(state, *args):
    return fed.personalise(untracked(state), *args)

  return fed._replace(init=init, round=round_, personalise=personalise)


def _without(cohort, client):
  """Returns the cohort in which `client` neither trains nor arrives."""
  stays = cohort.client_id != client
  worked = cohort.worked
  return cohort._replace(
    arrived=cohort.arrived & stays,
    worked=worked if worked is None else worked & stays,
  )


def _takes_part(cohort, client):
  there = cohort.arrived
  if cohort.worked is not None:
    there |= cohort.worked
  return jnp.any(there & (cohort.client_id == client))


def _mapped(function, rows, at_once):
  """Maps `function` over the tracked clients, some of them at once."""
  return jax.lax.map(
    function, rows, batch_size=at_once if at_once > 1 else None
  )


def _carried(without, state, change, truncated, carry, truncation):
  """Runs a round without a client and propagates `change` through it.

  Returns:
    The state after the round, the propagated change, and which arrays are
    truncated.
  """
  if carry == 'identity':
    return without(state), change, truncated
  tangent = _tangent(state, change)
  later, carried = jax.jvp(without, (state,), (tangent,))
  carried = jax.tree.map(
    lambda a, t, e: t if _floating(a) else e, state, carried, change
  )
  if truncation is None:
    return later, carried, truncated
  truncated |= _block_lengths(carried) > truncation * _block_lengths(change)
  params, structure = jax.tree.flatten(carried.variables.params)
  params = [jnp.where(cut, 0, a) for cut, a in zip(truncated, params)]
  variables = carried.variables._replace(params=structure.unflatten(params))
  return later, carried._replace(variables=variables), truncated


def _tangent(state, change):
  """Converts `change` to a JAX tangent; integers and flags have none."""
  return jax.tree.map(
    lambda a, e: e if _floating(a) else np.zeros(a.shape, jax.dtypes.float0),
    state,
    change,
  )


def _block_lengths(change):
  """Computes the norms [L] of the arrays of the parameters."""
  leaves = jax.tree.leaves(change.variables.params)
  return jnp.stack([jnp.sqrt(jnp.sum(jnp.square(a))) for a in leaves])


def _lengths(change: Variables) -> jax.Array:
  """Computes the norms [C] of the changes of the parameters."""
  return jax.vmap(optax.tree.norm)(change.params)


def _check_alike(state: State, other: State) -> None:
  """Checks that two states come from federations of the same kind.

  Raises:
    ValueError: if their structures differ.
  """
  if jax.tree.structure(state) != jax.tree.structure(other):  # type: ignore[operator]
    raise ValueError(
      'the states of `through` must have the structure of those of `fed`: give '
      "both chains equally many parts, such as curvature('exact') where the "
      "other has curvature('blocks')."
    )


def _check_forward_mode(fed, *args) -> None:
  """Checks that the round can be differentiated in forward mode.

  JAX detects this only when the derivative is lowered.

  Raises:
    NoForwardMode: if it cannot.
  """

  def along(state, *args):
    tangent = _tangent(state, jax.tree.map(jnp.zeros_like, state))
    return jax.jvp(lambda s: fed.round(s, *args)[0], (state,), (tangent,))

  shapes = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(jnp.shape(a), a.dtype), args
  )
  try:
    jax.jit(along).lower(*shapes)
  except TypeError as error:
    if 'forward-mode' not in str(error):
      raise
    raise NoForwardMode(
      'the round has no forward mode, since a function in it has a derivative '
      "for backward mode only: build the model with conv='im2col', call it "
      "through losses.frozen where no gradient is taken, use carry='identity', "
      'or retrain.'
    ) from error


def _floating(a: Any) -> bool:
  return jnp.issubdtype(a.dtype, jnp.floating)
