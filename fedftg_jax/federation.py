"""The engine: one round of any method, and a jitted scan of rounds.

These rules hold for every method, and they are implemented only here:
- The clients of a round are stacked and trained in parallel. What the server
  sends is closed over, never copied along the client axis.
- A client that was not selected, or did not train, keeps its slot and its
  uplink state bit for bit. A client that trains also arrives, unless the
  schedule says otherwise; the message of a client that did not arrive is zero.
  A padding slot has client id N, and its results are dropped. A client without
  examples never arrives.
- A round in which no client arrives or is selected leaves the model and the
  server's slot unchanged, unless the method acts in it (`Method.always`).
- Chunks of rounds are padded to equal length, so that a whole run is traced
  once. A row of padding (`num_steps` below 0) is skipped: it costs nothing and
  changes nothing.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedftg_jax import client_state as client_state_lib
from fedftg_jax import compiling, keys, losses, stacking, trees
from fedftg_jax.base import (
  NO_LIMIT,
  Cohort,
  Data,
  Federation,
  Info,
  LossAux,
  Method,
  Model,
  Objective,
  Personal,
  PyTree,
  Received,
  Same,
  Sent,
  Solver,
  State,
  View,
  check_hooks,
  merged,
)

WEIGHTINGS = ('examples', 'uniform')
SHARE = 0.8  # of a device's memory, for clients and data, see `chunk_that_fits`


def federation(
  model: Model,
  method: Method,
  solver: Solver,
  num_clients: int,
  *,
  weighting: str = 'examples',
  uplink: optax.GradientTransformation | None = None,
  client_chunk: int | None = None,
  mesh: jax.sharding.Mesh | None = None,
  client_state: str = 'device',
) -> Federation:
  """Builds the simulation of `method` with `solver` on `num_clients` clients.

  Args:
    model: the classifier.
    method: what the algorithm adds to a round, see `base.Method` and `chain`;
      one part of it must aggregate.
    solver: local training, see `solvers`.
    num_clients: N.
    weighting: how clients are weighted in means: by their number of 'examples',
      or 'uniform' over the clients that arrived.
    uplink: a codec for the change of the parameters that a client sends, see
      `uplinks`; None sends the change as it is. Its state is kept per client,
      and its `update` gets a `key` if it takes one. A field `bits` of its state
      is the size of the client's upload, and the scalars in a field `columns`,
      a dictionary, are reported as 'uplink/NAME', as means over the clients
      that arrived.
    client_chunk: number of clients that are stacked at once; 0 for all, None
      for what suits the device, see `stacking.default_chunk`.
    mesh: devices that share the clients of a round, see `stacking.make_mesh`;
      None for one device.
    client_state: where the clients' slots are between chunks of rounds: on the
      'device', or, for federations that are too large for it, on the 'host',
      see the module `client_state`. Results are the same. On the host the slots
      of a state are NumPy arrays that `run` changes in place, and `init` takes
      a folder in which to memory-map them from files.

  Returns:
    The simulation: `init`, `round` and `personalise`.

  Raises:
    ValueError: if a value is out of range, if no part aggregates, or if there
      is an uplink but no model is sent.
  """
  check_hooks(method)
  if not method.aggregates:
    raise ValueError(
      "no part of the method makes a new model from the clients' models: begin "
      'with one that does, as in chain(fed_avg(), ...), or give your own '
      'Method(..., aggregates=True).'
    )
  if num_clients < 1:
    raise ValueError(f'num_clients must be at least 1, got {num_clients}.')
  if weighting not in WEIGHTINGS:
    raise ValueError(
      f'weighting must be one of {WEIGHTINGS}, got {weighting!r}.'
    )
  if client_chunk is None:
    client_chunk = stacking.default_chunk()
  if client_chunk < 0:
    raise ValueError(
      f'client_chunk must be 0 (all at once) or more, got {client_chunk}.'
    )
  if client_state not in client_state_lib.PLACES:
    raise ValueError(
      f'client_state must be one of {client_state_lib.PLACES}, got '
      f'{client_state!r}.'
    )
  if uplink is not None and not method.sends_model:
    raise ValueError(
      'an uplink codes the models that clients send, but clients of this '
      'method send no model (sends_model=False): leave the uplink out.'
    )
  uplink = optax.with_extra_args_support(uplink or optax.identity())

  def init_one(key):
    """Draws the initial state, with the slots of one client."""
    key_model, key_method = jax.random.split(key)
    variables = model.init(key_model)
    shared, own = method.init(key_method, variables)
    slots = own, uplink.init(variables.params)
    return State(variables, shared, slots, jnp.int32(0))

  init_one_client = compiling.jit(init_one, compiling.ONCE)

  @functools.partial(compiling.jit, cpu_options=compiling.ONCE)
  def init_on_device(key):
    state = init_one(key)
    return state._replace(clients=trees.stack(state.clients, num_clients))

  def init(key, /, folder=None):
    if client_state == 'device':
      if folder is not None:
        raise ValueError(
          "a folder for the clients' slots needs client_state='host', got "
          "client_state='device'."
        )
      return init_on_device(key)
    state = init_one_client(key)
    return state._replace(
      clients=client_state_lib.allocate(state.clients, num_clients, folder)
    )

  # Jitted so that rounds and personal models share one trace.
  run_client = jax.jit(
    functools.partial(_run_client, model, method, solver, uplink), inline=True
  )

  def client_round(shared, row):
    """Runs the round of one client; returns (to sum over clients, to stack)."""
    broadcast, server_slot, seen = shared
    key = keys.client_keys(seen.key, seen.round, row.client_id)
    received = method.send(broadcast, server_slot, row.position, key.send)
    slots, sent, local, bits, coding = run_client(received, seen, row, key)
    moved = jax.tree.map(  # relative to the broadcast model
      lambda start, delta, old: (
        delta if start is old else delta + (start - old)
      ),
      sent.start,
      sent.delta,
      broadcast,
    )
    return (
      (optax.tree.scale(sent.weight, moved), method.summed(sent), coding),
      (slots, local.num_steps, local.metrics, bits, method.stacked(sent)),
    )

  @jax.jit
  def round_(state, data, cohort, key):
    size = len(cohort.client_id)
    padded = _pad_cohort(
      cohort, stacking.num_rows(size, client_chunk, mesh), num_clients
    )
    rows = _rows(state, data, padded, num_clients, weighting)
    seen = _seen(method, state, data, key, rows.client_id)
    shared = state.variables, state.shared, seen
    (
      (change, summed, coding),
      (slots, num_steps, local_metrics, bits_up, stacked),
    ) = stacking.over_clients(client_round, shared, rows, client_chunk, mesh)
    arrived = rows.arrived
    average = optax.tree.add(state.variables, change)
    stacked = jax.tree.map(lambda a: a[:size], stacked)
    received = Received(
      state.variables,
      average,
      summed,
      stacking.shard(stacked, mesh),
      arrived[:size],
      state.round,
      num_clients,
      data.public,
      seen.peers[:size],
      seen.common,
    )
    variables, server_slot, info = method.update(
      state.variables, state.shared, received, keys.server_key(key, state.round)
    )
    models = merged('model', {'average': average}, info.models)
    same = _same({'broadcast': variables, **models})
    acts = jnp.any(arrived) | method.always
    variables, server_slot = trees.where(
      acts, (variables, server_slot), (state.variables, state.shared)
    )
    # Clients that did not train write past the end, which drops the write.
    written = jnp.where(rows.worked, rows.place, num_clients)
    selected = rows.client_id < num_clients
    bits_down = trees.num_bits((state.variables, seen.shared))
    counts = {
      'num_selected': jnp.sum(selected),
      'num_arrived': jnp.sum(arrived),
      'bits_down': jnp.where(selected, jnp.uint32(bits_down), 0)[:size],
      'bits_up': bits_up[:size],
    }
    metrics = merged(
      'metric',
      _metrics(rows, num_steps, local_metrics, info, acts),
      counts | _of_uplink(coding),
    )
    models |= {
      name: trees.where(acts, models[name], state.variables)
      for name in info.models
    }
    models = merged('model', models, dict(method.models(server_slot)))
    clients = trees.scatter(state.clients, written, slots)
    return stacking.everywhere(
      (
        State(variables, server_slot, clients, state.round + 1),
        Info(metrics, models, same),
      ),
      mesh,
    )

  def personalise(state, data, client_id, place, key):
    """Returns the models of one client (no client axis)."""
    cohort = Cohort(
      client_id[None],
      jnp.ones(1, bool),
      jnp.full(1, NO_LIMIT, jnp.int32),
      place=place[None],
    )
    rows = _rows(state, data, cohort, num_clients, weighting)
    row = jax.tree.map(lambda a: a[0], rows)
    seen = _seen(method, state, data, key, rows.client_id)
    client_key = keys.client_keys(key, state.round, client_id)
    (own, _), sent, local, *_ = run_client(
      state.variables, seen, row, client_key
    )
    view = _view(state.variables, seen, row)
    trained = method.personal(view._replace(variables=local.variables, own=own))
    before, after = (
      merged('personal model', {name: Personal(model.apply, variables)}, more)
      for name, variables, more in (
        (
          'broadcast',
          sent.start,
          method.personal(view._replace(variables=sent.start)),
        ),
        (
          'personalised',
          local.variables,
          {f'personalised_{name}': m for name, m in trained.items()},
        ),
      )
    )
    return before, after

  return Federation(init, round_, personalise, mesh, client_state)


def _same(models) -> Same:
  """Finds the models that are made of the same arrays at trace time."""
  first, same = {}, []
  for name, model in models.items():
    arrays = tuple(map(id, jax.tree.leaves(model)))
    if arrays in first:
      same.append((name, first[arrays]))
    first.setdefault(arrays, name)
  return Same(same)


class _Seen(NamedTuple):
  """Everything that all clients of a round see, apart from their models."""

  shared: PyTree
  common: PyTree
  x: jax.Array
  y: jax.Array
  round: jax.Array
  key: jax.Array  # base key of the training
  peers: jax.Array


class _Row(NamedTuple):
  """One slot of a cohort; when stacked, every leaf has a leading axis [S]."""

  client_id: jax.Array
  arrived: jax.Array
  worked: jax.Array
  num_steps: jax.Array
  slots: PyTree  # (own, uplink) slots
  index: jax.Array  # type: ignore[assignment]
  count: jax.Array  # type: ignore[assignment]
  share: jax.Array  # s_k
  weight: jax.Array  # in the mean
  position: jax.Array  # 0, 1, 2 ... in the cohort
  place: jax.Array  # row of its slots in `State.clients`


def _pad_cohort(cohort, num_rows, num_clients):
  """Adds slots without a client, up to `num_rows` slots."""

  def pad(column, value):
    rows = 0, num_rows - len(cohort.client_id)
    return jnp.pad(column, rows, constant_values=value)

  return Cohort(
    pad(cohort.client_id, num_clients),
    pad(cohort.arrived, False),
    pad(cohort.num_steps, 0),
    cohort.worked if cohort.worked is None else pad(cohort.worked, False),
    cohort.place if cohort.place is None else pad(cohort.place, num_clients),
  )


def _rows(state, data, cohort, num_clients, weighting) -> _Row:
  """Collects the data, slots and weights of the cohort's clients."""
  # A sum of integers is exact for more examples than a float can count.
  total = jnp.maximum(jnp.sum(data.count), 1)
  place = cohort.client_id if cohort.place is None else cohort.place
  slots = trees.gather(state.clients, place)
  client = jnp.minimum(cohort.client_id, len(data.count) - 1)
  index, count = data.index[client], data.count[client]
  share = num_clients * count.astype(jnp.result_type(float)) / total
  count = jnp.where(cohort.client_id < num_clients, count, 0)
  arrived = cohort.arrived & (count > 0)
  worked = arrived  # a client that arrived has trained
  if cohort.worked is not None:
    worked |= cohort.worked & (count > 0)
  mass = arrived * (count if weighting == 'examples' else 1.0)
  weight = mass / jnp.maximum(jnp.sum(mass), 1)
  return _Row(
    cohort.client_id,
    arrived,
    worked,
    cohort.num_steps,
    slots,
    index,
    count,
    share,
    weight,
    jnp.arange(len(count)),
    place,
  )


def _seen(method, state, data, key, client_id) -> _Seen:
  shared = method.broadcast(state.shared)
  common = method.common(
    state.variables, shared, state.round, keys.common_key(key, state.round)
  )
  peers = jnp.where(client_id < len(data.count), client_id, -1)
  return _Seen(shared, common, data.x, data.y, state.round, key, peers)


def _view(received, seen, row) -> View:
  """Builds the view of a client that was sent the model `received`."""
  return View(
    received,
    received,
    seen.shared,
    seen.common,
    row.slots[0],
    Data(seen.x, seen.y, row.index, row.count),
    row.client_id,
    row.share,
    seen.round,
    jnp.where(row.worked, row.num_steps, 0),
    peers=seen.peers,
  )


def _run_client(model, method, solver, uplink, received, seen, row, key):
  """Runs one client's round (no client axis): start, train, upload, encode.

  Returns:
    Its slots, what it sends, the result of local training, the number of bits
    that it sends, and the uplink's statistics to sum over clients, see
    `_coding`.
  """
  view, (_, uplink_state) = _view(received, seen, row), row.slots
  start = method.start(view, key.start)
  view = view._replace(variables=start)
  objective = Objective(
    functools.partial(_local_loss, model, method, view), method.decay(view)
  )
  local, own = method.train(
    lambda objective, view: solver(objective, view, key.solve),
    objective,
    view,
    key.train,
  )
  own, message = method.upload(
    view._replace(own=own), local, objective, key.upload
  )
  delta = jax.tree.map(jnp.subtract, local.variables, start)
  coded, uplink_state = uplink.update(
    delta.params, uplink_state, start.params, key=key.encode
  )
  sent = delta._replace(params=coded), message
  sent = trees.where(row.arrived, sent, jax.tree.map(jnp.zeros_like, sent))
  bits = method.message_bits(message)
  if method.sends_model:
    bits += optax.tree.get(uplink_state, 'bits', trees.num_bits(coded))
    bits += trees.num_bits(delta.stats)
  return (
    (own, uplink_state),
    Sent(start, *sent, row.weight, row.share * row.arrived),
    local,
    jnp.where(row.arrived, jnp.asarray(bits, jnp.uint32), 0),
    _coding(row.arrived, delta.params, coded, uplink_state),
  )


class _Coding(NamedTuple):
  """Statistics of an uplink, summed over the clients that arrived."""

  error: jax.Array  # squared norm of the coding error
  whole: jax.Array  # squared norm of what was coded
  columns: dict[str, jax.Array]  # `columns` of the uplink's state
  num: jax.Array  # number of clients


def _coding(arrived, delta, coded, uplink_state) -> _Coding | tuple[()]:
  """Computes one client's share; () if the uplink changes nothing."""
  pairs = list(zip(jax.tree.leaves(coded), jax.tree.leaves(delta)))
  if all(a is b for a, b in pairs):
    return ()
  error, whole = (
    optax.tree.norm(values, squared=True)
    for values in ([a - b for a, b in pairs], [b for _, b in pairs])
  )
  columns = optax.tree.get(uplink_state, 'columns', {})
  one = _Coding(error, whole, columns, jnp.float32(1))
  return trees.where(arrived, one, jax.tree.map(jnp.zeros_like, one))


def _of_uplink(coding: _Coding | tuple[()]) -> dict[str, jax.Array]:
  """Computes the metrics of an uplink.

  'uplink/distortion' is the squared norm of the error divided by that of what
  was coded.
  """
  if not coding:
    return {}
  distortion = coding.error / jnp.where(coding.whole > 0, coding.whole, 1)
  means = {name: value / coding.num for name, value in coding.columns.items()}
  means['distortion'] = jnp.where(coding.num > 0, distortion, jnp.nan)
  return {f'uplink/{name}': value for name, value in means.items()}


def _metrics(rows, num_steps, local_metrics, info, acts):
  """Computes the scalars of a round; a mean over no clients is NaN."""
  worked = rows.weight * (num_steps > 0)
  of_clients = {
    name: jnp.sum(worked * value) / jnp.sum(worked)
    for name, value in local_metrics.items()
  }
  of_server = {
    name: jnp.where(acts, value, jnp.nan)
    for name, value in info.metrics.items()
  }
  return merged('metric', of_clients, of_server)


def _local_loss(model, method, view, variables, batch, key):
  """Computes the local loss: mean cross-entropy plus the method's penalty."""
  output = model.apply(variables, batch.x, mask=batch.mask, train=True)
  cross_entropy = losses.cross_entropy(output.logits, batch.y, batch.mask)
  penalty = method.penalty(variables, output, batch, view, key)
  return (
    cross_entropy + penalty,
    LossAux(output.stats, cross_entropy, output.logits),
  )


def over_seeds(fed: Federation) -> Federation:
  """Runs the same simulation for several seeds at once.

  Keys and every leaf of the state get a leading axis [R]; all seeds share the
  data and the schedule. `personalise` remains that of one seed.

  Args:
    fed: from `federation`, with the clients' slots on the device.

  Returns:
    The federation of R seeds.

  Raises:
    ValueError: if the clients' slots are on the host.
  """
  if fed.client_state != 'device':
    raise ValueError(
      f"over_seeds needs client_state='device', got {fed.client_state!r}."
    )
  return Federation(
    compiling.jit(jax.vmap(fed.init), compiling.ONCE),
    jax.jit(jax.vmap(fed.round, in_axes=(0, None, None, 0))),
    fed.personalise,
    fed.mesh,
  )


def bytes_per_client(fed: Federation, data: Data) -> int:
  """Estimates the memory that a stacked client needs in a round.

  The local training of two clients is compiled, not run. To it come the slot
  before and after the round, and twice the size of the model, for what is sent.

  Args:
    fed: the simulation, with the clients' slots on the device.
    data: of all clients.

  Returns:
    Bytes.
  """
  key = jax.random.key(0)
  state = jax.eval_shape(fed.init, key)
  ids = jax.ShapeDtypeStruct((2,), jnp.int32)
  compiled = (
    jax.jit(jax.vmap(fed.personalise, (None, None, 0, 0, None)))
    .lower(state, data, ids, ids, key)
    .compile()
  )
  memory: Any = compiled.memory_analysis()
  training = memory.temp_size_in_bytes + memory.output_size_in_bytes
  slot = trees.num_bits(state.clients) // 8 // len(data.count)
  return training // 2 + 2 * slot + trees.num_bits(state.variables) // 4


def chunk_that_fits(
  fed: Federation, data: Data, cohort: int, slots: int, num_devices: int = 1
) -> int:
  """Returns how many clients of a round fit the device's memory at once.

  A fifth of the memory is left for the server's work.

  Args:
    fed: the simulation, with the clients' slots on the device.
    data: of all clients.
    cohort: number of clients in a round.
    slots: number of clients whose slots are on the device.
    num_devices: number of devices that share the clients.

  Returns:
    The number; the default if the device does not say how much memory it has.
  """
  limit = stacking.memory_limit()
  if limit is None:
    return stacking.default_chunk()
  state = jax.eval_shape(fed.init, jax.random.key(0))
  slot = trees.num_bits(state.clients) // 8 // len(data.count)
  sent = cohort * (2 * slot + trees.num_bits(state.variables) // 8)
  free = SHARE * limit - (trees.num_bits(data) // 8 + slots * slot + sent)
  return stacking.chunk_that_fits(
    free, bytes_per_client(fed, data), -(-cohort // num_devices)
  )


def run(
  fed: Federation,
  state: State,
  data: Data,
  schedule: Cohort,
  key: jax.Array,
  *,
  every: int | None = None,
  callback: Callable | None = None,
) -> tuple[State, dict[str, np.ndarray]]:
  """Runs the rounds of `schedule`: a jitted scan in chunks of `every` rounds.

  Args:
    fed: from `federation` (or `over_seeds`).
    state: the state to start from. Its buffers are donated: do not use it
      afterwards.
    data: all clients' data.
    schedule: rows to run, every leaf [T, S]; checked by `check_schedule`.
    key: base key of the training, the same for every call of one run.
    every: rounds per chunk; None for one chunk.
    callback: called after each chunk with (number of rounds done in this call,
      state, Info of the chunk: metrics as NumPy arrays over its rounds, models
      of its last round). The state is donated to the next chunk: copy what you
      want to keep.

  Returns:
    The last state, and the metrics of all rounds as NumPy arrays; 'bits_down'
    and 'bits_up' are sums over the clients, as 64-bit integers.

  Raises:
    ValueError: for an invalid schedule, `every` below 1, or a state whose
      buffers were donated before.
  """
  num_rounds = len(schedule.client_id)
  if every is None:
    every = max(num_rounds, 1)
  if every < 1:
    raise ValueError(f'every must be at least 1, got {every}.')
  if any(
    getattr(leaf, 'is_deleted', bool)() for leaf in jax.tree.leaves(state)
  ):
    raise ValueError(
      'this state was given to `run` before, which donates its buffers; to '
      'start from it twice, copy it first: jax.tree.map(jnp.copy, state).'
    )
  num_clients = data.count.shape[0]
  schedule = check_schedule(schedule, num_clients)
  data, key = stacking.put((data, key), fed.mesh)
  history = []
  for first in range(0, num_rounds, every):
    rows = jax.tree.map(lambda a: a[first : first + every], schedule)
    length = len(rows.client_id)
    rows = _pad_rounds(rows, every - length, num_clients)
    state, info = _run_chunk(fed, state, data, rows, key)
    metrics = jax.device_get(info.metrics)
    for name in ('bits_down', 'bits_up'):
      metrics[name] = np.sum(metrics[name], axis=-1, dtype=np.int64)
    metrics = {
      name: np.moveaxis(value, 0, -1)[..., :length]
      for name, value in metrics.items()
    }
    history.append(metrics)
    if callback is not None:
      callback(first + length, state, info._replace(metrics=metrics))
  return state, {
    name: np.concatenate([h[name] for h in history], -1)
    for name in (history[0] if history else {})
  }


def _run_chunk(fed, state, data, rows, key):
  """Runs the rounds of a chunk; moves slots from and to the host if needed."""
  if fed.client_state == 'device':
    return _scan_rounds(fed, *stacking.put((state, data, rows), fed.mesh), key)
  num_clients = data.count.shape[0]
  size = client_state_lib.table_size(num_clients, *rows.client_id.shape)
  table, rows, ids = client_state_lib.to_table(
    state.clients, rows, num_clients, size
  )
  done, info = _scan_rounds(
    fed,
    *stacking.put((state._replace(clients=table), data, rows), fed.mesh),
    key,
  )
  client_state_lib.from_table(state.clients, jax.device_get(done.clients), ids)
  return done._replace(clients=state.clients), info


@functools.partial(
  compiling.jit, cpu_options=compiling.OFTEN, static_argnums=0, donate_argnums=1
)
def _scan_rounds(fed, state, data, rows, key):
  """Scans over rounds; returns metrics [T, ...] and the last round's models."""
  # `fed.round` is jitted, so the scan reuses this trace.
  blank = jax.tree.map(
    lambda a: jnp.zeros(a.shape, a.dtype),
    jax.eval_shape(
      fed.round, state, data, jax.tree.map(lambda a: a[0], rows), key
    )[1],
  )

  def one(carry, cohort):
    def go():
      state, info = fed.round(carry[0], data, cohort, key)
      return (state, info.models), info.metrics

    is_round = jnp.all(cohort.num_steps >= 0)
    return jax.lax.cond(is_round, go, lambda: (carry, blank.metrics))

  (state, models), metrics = jax.lax.scan(one, (state, blank.models), rows)
  return state, Info(metrics, models, blank.same)


def _pad_rounds(rows: Cohort, num_rows: int, num_clients: int) -> Cohort:
  """Adds rows of padding, which the scan skips."""

  def pad(column, value):
    shape = num_rows, column.shape[1]
    return np.concatenate([column, np.full(shape, value, column.dtype)])

  return Cohort(
    pad(rows.client_id, num_clients),
    pad(rows.arrived, False),
    pad(rows.num_steps, -1),
    rows.worked if rows.worked is None else pad(rows.worked, False),
  )


def check_schedule(schedule: Cohort, num_clients: int) -> Cohort:
  """Validates a schedule and sorts its rows by client id.

  Args:
    schedule: every leaf [T, S]; ids in [0, N], where N is padding.
    num_clients: N.

  Returns:
    The schedule as NumPy arrays of the right types; padding never arrives.

  Raises:
    ValueError: for a wrong shape, an id or a number of steps out of range, or a
      client that appears twice in a round; names the round.
  """
  ids = np.asarray(schedule.client_id)
  if ids.ndim != 2:
    raise ValueError(f'a schedule has shape [rounds, cohort], got {ids.shape}.')
  arrived = np.broadcast_to(np.asarray(schedule.arrived, bool), ids.shape)
  num_steps = np.broadcast_to(np.asarray(schedule.num_steps), ids.shape)
  worked = schedule.worked
  if worked is not None:
    worked = np.broadcast_to(np.asarray(worked, bool), ids.shape)
  outside = (ids < 0) | (ids > num_clients)
  if outside.any():
    t, s = np.argwhere(outside)[0]
    raise ValueError(
      f'client {ids[t, s]} in round {t} of the schedule: ids are 0 to '
      f'{num_clients - 1} ({num_clients} is padding).'
    )
  order = np.argsort(ids, axis=1, kind='stable')
  if num_steps.min(initial=0) < 0:
    raise ValueError(
      'num_steps must be at least 0 in a schedule, got '
      f'{num_steps.min(initial=0)}.'
    )
  ids, arrived, num_steps = (
    np.take_along_axis(a, order, 1) for a in (ids, arrived, num_steps)
  )
  twice = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] < num_clients)
  if twice.any():
    t, s = np.argwhere(twice)[0]
    raise ValueError(
      f'client {ids[t, s]} is twice in round {t} of the schedule.'
    )
  return Cohort(
    ids.astype(np.int32),
    arrived & (ids < num_clients),
    np.minimum(num_steps, NO_LIMIT).astype(np.int32),
    worked
    if worked is None
    else np.take_along_axis(worked, order, 1) & (ids < num_clients),
  )
