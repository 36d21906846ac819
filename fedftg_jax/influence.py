"""How the model would differ had a client never taken part, while it trains.

Xue, Niu, Zheng, Tang, Lyu, Wu and Chen, Toward Understanding the Influence of
Individual Clients in Federated Learning, AAAI 2021, arXiv:2012.10936
(Fed-Influence). With C_t the cohort of round t, s_t the state after it and
C_t \\ c the cohort in which client c does not arrive,

  eps_0^c = 0
  eps_t^c = round(s_{t-1}, C_t \\ c) - round(s_{t-1}, C_t)
            + d round(s_{t-1}, C_t \\ c)[eps_{t-1}^c]

estimates s_t without c less s_t. The first difference is what c's absence
changes in this round, the derivative carries on what it changed before. For
FedAvg with full gradients these are equations 10 and 11. Deviations:

- s_t is all that the next round needs: the model, BatchNorm statistics, the
  method's slots on the server and on clients. So the estimate is one for every
  method, and of its server step, too.
- The derivative is forward mode (`jax.jvp`) through the round as it is, with
  its mini-batches, clipping, decay and momentum. `curvature` has the paper's
  approximations.
- If c is alone in a cohort, that round leaves the model without c as it was.
- The rounding of a codec counts as the identity (`straight_through`).
- What is discrete, such as labels that are drawn, permutations, counters and
  flags, has no derivative: it is that of the run.

Both batches and schedule are those of the run: keys are by client and round,
and a cohort without c is the cohort in which c does not arrive. Shares of data
(s_k, N) stay those of all clients.
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
  """A round that cannot be differentiated forward."""


class Estimate(NamedTuple):
  """What is estimated for each of C tracked clients."""

  # eps: the state without the client less the state, every leaf [C, ...]; of
  # what is not floating point [C] zeros.
  change: State
  truncated: jax.Array  # [C, L] bool, arrays of the parameters


class Retrained(NamedTuple):
  """The simulation without each of C tracked clients."""

  states: State  # every leaf [C, ...]


class Slot(NamedTuple):
  """The server slot of a federation that tracks clients."""

  shared: PyTree  # of the method
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
  """The simulation that also estimates each tracked client's influence.

  The run itself is that of `fed`: `run`, chunks, checkpoints and `over_seeds`
  take the one for the other. A round costs, for each tracked client, about two
  rounds; nothing for a client that has not been selected so far. What is kept
  is one state for each tracked client.

  Example:
    fed = influence.tracking(fed, range(10))
    state, _ = federation.run(fed, fed.init(key), data, schedule, key)
    scores = influence.on_test(model, state, test_x, test_y)

  Args:
    fed: from `federation`.
    clients: ids of those to track, C of them.
    through: a federation with states like those of `fed`, whose rounds are
      taken in place of its own in the equation above: with a part of
      `curvature`, with `client_stage` of what refines the model on the server,
      or with the uplink `straight_through`. None for `fed`.
    carry: what becomes of earlier changes: the round's 'derivative', or the
      'identity', as if there were no curvature, which needs no forward mode.
    truncation: an array of the parameters whose change the derivative makes
      more than so many times as long has for ever after no carried part, only
      that of the round. The paper's layer-wise examination and truncation
      (LWET) is 1 with `curvature('blocks')`. None for never.
    at_once: tracked clients that are stacked; 1 takes them one after another
      and leaves out those that have no influence yet.

  Returns:
    The federation. Its metrics are those of `fed` and 'influence/size', the
    mean over the tracked clients of |eps| / |w|, both of the parameters, and
    with `truncation` 'influence/truncated', the share of truncated arrays.

  Raises:
    ValueError: for a value out of range, or slots of clients on the host; when
      the first round is traced, for a client that there is not, for a round
      without forward mode, or for an uplink that codes, whose rounding has no
      derivative.
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
          'derivative to carry an influence with; give `through` with '
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
  """The simulation, and beside it that without each tracked client.

  What `tracking` estimates, by as many trainings in the same program: in each,
  its client does not arrive. A round costs as much as so many rounds.

  Args:
    fed: from `federation`.
    clients: ids of those to leave out, one in each training.
    at_once: trainings that are stacked; 1 takes them one after another.

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
  """`part` without its step on the server, with slots like its own.

  In `through`, in the place of a part that refines the model: the influence is
  then that on the model before it is refined, with what refining adds to it
  held fixed.
  """
  return part._replace(
    update=lambda variables, shared, received, key: (variables, shared, Info())
  )


def straight_through(
  uplink: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """A codec that is differentiated as if it handed on what it gets.

  In `through`, in the place of the run's uplink. What rounding to a grid does
  to a small change is 0 or a whole step; over its random dither it is that
  change in the mean.

  Args:
    uplink: one without error feedback.

  Returns:
    The uplink, whose messages are the same.

  Raises:
    ValueError: when it is first used, for one with error feedback: what it does
      not send is not lost in the mean, but kept.
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
        "derivative to carry an influence with; use carry='identity', or "
        'retrain.'
      )
    return state

  def update(delta, state, params=None, *, key, **extra):
    del extra
    return code(delta, state, params, key)

  return optax.GradientTransformationExtraArgs(init, update)


def untracked(state: State) -> State:
  """The state of the simulation itself."""
  if not isinstance(state.shared, Slot):
    return state
  return state._replace(shared=state.shared.shared)


def models(state: State) -> Variables:
  """The model without each tracked client, every leaf [C, ...]."""
  tracked = state.shared.tracked
  if isinstance(tracked, Retrained):
    return tracked.states.variables
  return jax.tree.map(
    lambda a, e: a + e if _floating(a) else trees.stack(a, len(e)),
    state.variables,
    tracked.change.variables,
  )


def changes(state: State) -> Variables:
  """The model without each tracked client less the model (the paper's influence
  on parameters), every leaf [C, ...]."""
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
  """Each tracked client's influence on the test set.

  The values of the model without the client less those of the model: a
  difference of two evaluations, not a derivative.

  Args:
    model: the classifier.
    state: of a federation that tracks clients.
    x: [M, H, W, channels] images.
    y: [M] labels.
    batch_size: examples at once.
    batch_stats: see `evaluation.evaluate`.

  Returns:
    {'loss', 'accuracy', 'parameters'}: [C]. 'loss' is high for a client whose
    absence hurts (the paper's FIL); 'accuracy' is low for it (FIA);
    'parameters' is the length of the change of the parameters.
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
  """`fed` with a slot for what is tracked, and what advances it."""
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
      "tracking clients needs client_state='device': what a client changes is "
      "kept for all clients' slots."
    )

  def init(key, /, folder=None):
    state = fed.init(key, folder)
    return state._replace(shared=Slot(state.shared, begin(state, len(ids))))

  @jax.jit
  def round_(state, data, cohort, key):
    num_clients = data.count.shape[0]
    if ids.max() >= num_clients:
      raise ValueError(
        f'client {ids.max()} is to be tracked; there are {num_clients}, 0 to '
        f'{num_clients - 1}.'
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
  """The cohort in which `client` neither works nor arrives."""
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
  """`function` over the tracked clients, some at once."""
  return jax.lax.map(
    function, rows, batch_size=at_once if at_once > 1 else None
  )


def _carried(without, state, change, truncated, carry, truncation):
  """A round without a client: (state after it, what it makes of `change`, which
  arrays are truncated)."""
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
  """`change` as JAX takes it; what is not floating point has no tangent."""
  return jax.tree.map(
    lambda a, e: e if _floating(a) else np.zeros(a.shape, jax.dtypes.float0),
    state,
    change,
  )


def _block_lengths(change):
  """[L] lengths of the arrays of the parameters."""
  leaves = jax.tree.leaves(change.variables.params)
  return jnp.stack([jnp.sqrt(jnp.sum(jnp.square(a))) for a in leaves])


def _lengths(change: Variables) -> jax.Array:
  """[C] lengths of the changes of the parameters."""
  return jax.vmap(optax.tree.norm)(change.params)


def _check_alike(state: State, other: State) -> None:
  """ValueError for states of different kinds of federations."""
  if jax.tree.structure(state) != jax.tree.structure(other):  # type: ignore[operator]
    raise ValueError(
      'the states of `through` must be like those of `fed`: give both chains '
      "as many parts, such as curvature('exact') where the other has "
      "curvature('blocks')."
    )


def _check_forward_mode(fed, *args) -> None:
  """Raises NoForwardMode if the round of `args` cannot be differentiated
  forward; JAX says that only when it is lowered."""

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
      'the round has no forward mode, since the derivative of a function in it '
      "is written for backward mode alone: build the model with conv='im2col', "
      'or call it by losses.frozen where no gradient is taken, or use '
      "carry='identity', or retrain."
    ) from error


def _floating(a: Any) -> bool:
  return jnp.issubdtype(a.dtype, jnp.floating)
