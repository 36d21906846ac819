"""The nouns of a federated round, each defined once, and `chain`.

A `Method` is what an algorithm adds to a round: one record of pure functions,
each with a do-nothing default. Everything but `update` is written for ONE
client; the engine (`federation.py`) adds the client axis, the masks and the
bookkeeping. `chain` composes methods, so that a combination of algorithms is
never a file of its own.

Axes in shape comments: N clients, S clients of one round (the cohort), B batch,
C classes, M examples, T rounds.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
Array = jax.Array | np.ndarray  # also on the host
NO_LIMIT = 2**31 - 1  # `Cohort.num_steps` of a client that is no straggler.


class Variables(NamedTuple):
  """What a model is."""

  params: PyTree  # trained, penalised, decayed, moved by server optimisers
  stats: PyTree  # BatchNorm running statistics; empty without BatchNorm


class Output(NamedTuple):
  """What a forward pass gives."""

  logits: jax.Array  # [B, C]
  features: jax.Array  # [B, F], input of the last layer
  stats: PyTree  # new running statistics (as received in eval mode)


class Model(NamedTuple):
  """A classifier as a pair of pure functions.

  `apply` takes images as uint8 (raw pixels, normalised inside) or as floats
  (already in the model's space, e.g. generated images).
  """

  init: Callable  # (key) -> Variables
  apply: Callable  # (variables, x, mask=None, train=False) -> Output


class Generator(NamedTuple):
  """A conditional image generator as a pair of pure functions."""

  init: Callable  # (key) -> Variables
  apply: Callable  # (variables, z, labels, train=False) -> (images, stats)
  noise_dim: int  # length of one z


class Batch(NamedTuple):
  """A padded batch; every mean over it is sum(mask * v) / max(sum(mask), 1)."""

  x: jax.Array  # [B, H, W, channels] uint8 or float
  y: jax.Array  # [B] int32
  mask: jax.Array  # [B] bool, False on padding


class Data(NamedTuple):
  """All examples, flat, and which of them belong to whom."""

  x: jax.Array  # [M, H, W, channels], shared by all clients
  y: jax.Array  # [M] int32
  index: jax.Array  # type: ignore[assignment]  # [N, cap] int32 rows of x; one client: [cap]
  count: jax.Array  # type: ignore[assignment]  # [N] int32 valid entries of `index`; one client: []
  public: PyTree = ()  # unlabelled images that the server holds; () on clients


class Cohort(NamedTuple):
  """One row of the schedule (the schedule itself has a leading axis [T])."""

  client_id: Array  # [S] int32, ascending; N marks a padding slot
  arrived: Array  # [S] bool, False for dropouts and padding
  num_steps: Array  # [S] int32, at most so many local steps (stragglers)
  # [S] int32, rows of `State.clients` that are theirs; None where that is
  # client_id, as whenever all clients' slots lie there.
  place: Array | None = None


class View(NamedTuple):
  """What one client sees in one round (no client axis)."""

  variables: Variables  # the model it begins from, see `Method.start`
  received: Variables  # the model that the server broadcast
  shared: PyTree  # what the server broadcasts of its slot
  own: PyTree  # the method's slot kept on this client
  data: Data  # its row of the index table, over the flat arrays
  client_id: jax.Array  # [] int32
  share: jax.Array  # [] s_k = N n_k / sum_j n_j
  round: jax.Array  # [] int32
  num_steps: jax.Array  # [] int32, at most so many local steps


class Objective(NamedTuple):
  """What one client minimises."""

  loss: Callable  # (variables, batch, key) -> (scalar, LossAux)
  decay: jax.Array  # [] added to the optimiser's weight decay, outside the clip


class LossAux(NamedTuple):
  """What `Objective.loss` returns beside the loss."""

  stats: PyTree  # new BatchNorm statistics
  cross_entropy: jax.Array  # [] mean over the batch, without penalties


class Local(NamedTuple):
  """What local training returns."""

  variables: Variables
  num_steps: jax.Array  # [] int32, steps actually taken
  step_size: jax.Array  # [] learning rate of this round
  metrics: Mapping[str, jax.Array]  # scalars


class Sent(NamedTuple):
  """What one client sends (no client axis), and how it counts."""

  start: Variables  # the model it began from
  delta: Variables  # its change through the uplink; 0 if it did not arrive
  message: PyTree  # the method's own upload; 0 if it did not arrive
  weight: jax.Array  # [] these sum to 1 over the arrived; 0 if it did not
  share: jax.Array  # [] s_k = N n_k / sum_j n_j; 0 if it did not arrive

  @property
  def model(self) -> Variables:
    return jax.tree.map(jnp.add, self.start, self.delta)


class Received(NamedTuple):
  """What the server gets from a cohort."""

  broadcast: Variables  # the model that the clients had received
  average: (
    Variables  # weighted mean of the models; as broadcast if none arrived
  )
  summed: PyTree  # the method's `summed`, added up over the clients
  stacked: PyTree  # the method's `stacked`, each leaf [S, ...]
  arrived: jax.Array  # [S] bool
  round: jax.Array  # [] int32
  num_clients: int  # N
  public: PyTree  # unlabelled images of the server, if any
  # Lays the rows of a tree [S, ...] on different devices, where there are
  # several: what is mapped over them then runs on all.
  spread: Callable = lambda tree: tree


class Info(NamedTuple):
  """What one may want to plot or trace; never read by the next round."""

  metrics: Mapping[str, jax.Array] = {}  # scalars, stacked over rounds
  models: Mapping[str, Variables] = {}  # models to evaluate, last round only


class State(NamedTuple):
  """All that the next round needs, and nothing else."""

  variables: Variables  # the model that the server broadcasts
  shared: PyTree  # the method's server slot
  clients: PyTree  # (own, uplink) slots, every leaf [N, ...]
  round: jax.Array  # [] int32, rounds done


class Federation(NamedTuple):
  """The outer pair: how a simulation begins, and one round of it."""

  init: Callable  # (key) -> State; on the host also (key, folder)
  round: Callable  # (state, data, cohort, key) -> (State, Info)
  traffic: Callable  # (state, data) -> (bits down, bits up) of one client
  # (state, data, client_id, its row of state.clients, key) -> (start, trained)
  personalise: Callable
  mesh: jax.sharding.Mesh | None = None  # of the devices; None for one device
  client_state: str = 'device'  # where `State.clients` lies, or 'host'


class Method(NamedTuple):
  """What an algorithm adds to a round.

  Every field is a pure function; a field that is not given does nothing.

  Attributes:
    init: (key, variables) -> (shared, own): the server's slot, and ONE
      client's.
    broadcast: (shared) -> tree: what of the server slot clients see and are
      billed for.
    start: (view, shared, slot, key) -> variables: the model that the client in
      place `slot` of the cohort begins from. `shared` is the whole server slot;
      `view.variables` what the parts before made of the received model.
    penalty: (variables, output, batch, view, key) -> scalar: added to the local
      objective at each step, inside the gradient clip.
    decay: (view) -> scalar: added to the weight decay, outside the clip.
    upload: (view, local, objective, key) -> (own, message): once per client and
      round.
    summed: (sent) -> tree: what the server needs only the sum of over clients.
      It is added up as clients finish; nothing of the kind is kept per client.
    stacked: (sent) -> tree: what it needs of every client at the same time,
      such as their models as teachers.
    update: (variables, shared, received, key) -> (variables, shared, Info):
      once per round, on the server.
    synthesise: (shared, labels, key) -> images, where the method has a
      generator (for pictures only); None where it has none.
  """

  init: Callable = lambda key, variables: ((), ())
  broadcast: Callable = lambda shared: ()
  start: Callable = lambda view, shared, slot, key: view.variables
  penalty: Callable = lambda variables, output, batch, view, key: 0.0
  decay: Callable = lambda view: 0.0
  upload: Callable = lambda view, local, objective, key: (view.own, ())
  summed: Callable = lambda sent: ()
  stacked: Callable = lambda sent: ()
  update: Callable = lambda variables, shared, received, key: (
    variables,
    shared,
    Info(),
  )
  synthesise: Callable | None = None


def merged(
  kind: str, some: dict[str, Any], others: dict[str, Any]
) -> dict[str, Any]:
  """Both dictionaries; ValueError where one would overwrite the other's.

  Args:
    kind: what they hold, for the error.
    some: by name.
    others: by name.
  """
  both = sorted(some.keys() & others.keys())
  if both:
    raise ValueError(
      f'two parts give the {kind} {both[0]!r}; begin its name with the '
      "method's, as in 'fed_ftg/md'."
    )
  return {**some, **others}


def chain(*parts: Method) -> Method:
  """Composes methods; the slots of a chain are the tuples of its parts' slots.

  Penalties and decays add up, what is sent and received is tupled, `start` and
  `update` run in the written order. Server steps therefore belong in the order:
  aggregate, correct the mean (FedDyn), refine (FedDF, FedFTG).

  Example:
    method = chain(fed_avg(), fed_ftg(model, generator, num_classes=10))

  Args:
    *parts: the methods, at least one.

  Returns:
    One method.
  """
  if not parts:
    raise ValueError('chain() needs at least one method, got none.')

  def split(key):
    return [jax.random.fold_in(key, i) for i in range(len(parts))]

  def views(view):
    return [
      view._replace(shared=s, own=o) for s, o in zip(view.shared, view.own)
    ]

  def init(key, variables):
    slots = [p.init(k, variables) for p, k in zip(parts, split(key))]
    return tuple(s for s, _ in slots), tuple(o for _, o in slots)

  def broadcast(shared):
    return tuple(p.broadcast(s) for p, s in zip(parts, shared))

  def start(view, shared, slot, key):
    variables = view.variables
    for p, v, s, k in zip(parts, views(view), shared, split(key)):
      variables = p.start(v._replace(variables=variables), s, slot, k)
    return variables

  def penalty(variables, output, batch, view, key):
    return sum(
      p.penalty(variables, output, batch, v, k)
      for p, v, k in zip(parts, views(view), split(key))
    )

  def decay(view):
    return sum(p.decay(v) for p, v in zip(parts, views(view)))

  def upload(view, local, objective, key):
    pairs = [
      p.upload(v, local, objective, k)
      for p, v, k in zip(parts, views(view), split(key))
    ]
    return tuple(o for o, _ in pairs), tuple(m for _, m in pairs)

  def each(hook, sent):
    return tuple(
      getattr(p, hook)(sent._replace(message=m))
      for p, m in zip(parts, sent.message)
    )

  def update(variables, shared, received, key):
    new_shared, metrics, models = [], {}, {}
    for p, own, summed, stacked, k in zip(
      parts, shared, received.summed, received.stacked, split(key)
    ):
      variables, own, info = p.update(
        variables, own, received._replace(summed=summed, stacked=stacked), k
      )
      new_shared.append(own)
      metrics = merged('metric', metrics, info.metrics)
      models = merged('model', models, info.models)
    return variables, tuple(new_shared), Info(metrics, models)

  able = [i for i, p in enumerate(parts) if p.synthesise is not None]

  def synthesise(shared, labels, key):
    return parts[able[-1]].synthesise(shared[able[-1]], labels, key)

  return Method(
    init,
    broadcast,
    start,
    penalty,
    decay,
    upload,
    functools.partial(each, 'summed'),
    functools.partial(each, 'stacked'),
    update,
    synthesise if able else None,
  )
