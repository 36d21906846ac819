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
import dataclasses
import functools
import inspect
import os
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fedftg_jax import trees

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
  # Input and output of the last stage; () of a model without stages.
  stages: tuple[jax.Array, jax.Array] | tuple[()] = ()
  # In the structure of `Variables.stats`, of each BatchNorm's input in this
  # batch {'mean', 'var'}, the variance biased, also in eval mode; () without.
  moments: PyTree = ()


class InitModel(Protocol):
  """Draws the variables of a model or of a generator."""

  def __call__(self, key: jax.Array, /) -> Variables: ...


class ApplyModel(Protocol):
  """Runs a classifier forward.

  `x` [B, H, W, channels] is uint8 (raw pixels, normalised inside) or float
  (already in the model's space, as generated images are). `mask` [B] is False
  on padding, which BatchNorm leaves out; None for no padding. With `train`
  BatchNorm normalises by the batch and renews its running statistics.
  """

  def __call__(
    self,
    variables: Variables,
    x: jax.Array,
    /,
    mask: jax.Array | None = None,
    train: bool = False,
  ) -> Output: ...


class Head(NamedTuple):
  """The last layer of a classifier, apart: where only it is needed of each
  client, only its parameters are stacked."""

  params: Callable[[Variables], PyTree]  # its share of a model's
  apply: Callable[[PyTree, jax.Array], jax.Array]  # to features: logits


class LastStage(Protocol):
  """Runs the last stage of a network, slimmed, on the stage's own input.

  Of `x` [B, h, w, channels], as `Output.stages` has it, and of the stage's
  layers the first channels are taken, about `width` (0 to 1) of them, with the
  leading slices of the parameters. BatchNorm normalises by the batch, and its
  running statistics stay as they are. Gives the stage's output.
  """

  def __call__(
    self,
    variables: Variables,
    x: jax.Array,
    mask: jax.Array | None,
    width: float,
    /,
  ) -> jax.Array: ...


class Model(NamedTuple):
  """A classifier as a pair of pure functions, and what some methods need of it
  beside them, see `models.need`; None where it has no such piece."""

  init: InitModel
  apply: ApplyModel
  head: Head | None = None
  last_stage: LastStage | None = None
  # uint8 images to the space of float ones, which stay as they are.
  normalise: Callable[[jax.Array], jax.Array] | None = None


class ApplyGenerator(Protocol):
  """Makes images [B, H, W, channels] in the space of a model's float inputs, or
  features [B, F] like those of its last layer's input, and new running
  statistics, of noise `z` [B, noise] and `labels` [B]."""

  def __call__(
    self,
    variables: Variables,
    z: jax.Array,
    labels: jax.Array,
    /,
    train: bool = False,
  ) -> tuple[jax.Array, PyTree]: ...


class Unpack(Protocol):
  """Gives the variables of a model from those of all in one form."""

  def __call__(self, variables: Variables, /) -> Variables: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Personal:
  """A client's model, of the common architecture or of another one; a pytree
  of its variables.

  Where clients' architectures differ, `variables` are packed alike for all:
  `kinds` has each architecture's name and the function that unpacks them, and
  `kind` is the number of this client's.
  """

  apply: ApplyModel = dataclasses.field(metadata={'static': True})
  variables: Variables
  kinds: tuple[tuple[str, Unpack], ...] = dataclasses.field(
    default=(), metadata={'static': True}
  )
  kind: jax.Array | None = None  # [] int32


class Generator(NamedTuple):
  """A conditional generator of images or of features, as a pair of pure
  functions."""

  init: InitModel
  apply: ApplyGenerator
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
  # [S] bool, who has worked and keeps its new slots, arrived or not; None for
  # those that arrived.
  worked: Array | None = None
  # [S] int32, rows of `State.clients` that are theirs; None where that is
  # client_id, as whenever all clients' slots lie there.
  place: Array | None = None


class View(NamedTuple):
  """What one client sees in one round (no client axis)."""

  variables: Variables  # the model it begins from, see `Method.start`
  received: Variables  # the model that the server sent to it
  shared: PyTree  # what the server broadcasts of its slot
  common: PyTree  # what all clients make of that alike, see `Method.common`
  own: PyTree  # the method's slot kept on this client
  data: Data  # its row of the index table, over the flat arrays
  client_id: jax.Array  # [] int32
  share: jax.Array  # [] s_k = N n_k / sum_j n_j
  round: jax.Array  # [] int32, rounds done before: 0 in the first
  num_steps: jax.Array  # [] int32, at most so many local steps
  # Of the solver's optimiser, where it goes on; None to begin afresh.
  optimizer_state: PyTree = None
  peers: jax.Array | None = None  # [S] int32, the round's clients; -1: nobody


class LossAux(NamedTuple):
  """What `Objective.loss` returns beside the loss."""

  stats: PyTree  # new BatchNorm statistics
  # [] mean over the batch, without penalties: the loss on the data, which is
  # `train_loss`, and which SCAFFOLD (option 1) and q-FedAvg ask for.
  cross_entropy: jax.Array
  logits: PyTree = ()  # [B, C], for parts that add a loss of their own


class Loss(Protocol):
  """Gives the loss of a batch, a scalar with the method's penalty in it."""

  def __call__(
    self, variables: Variables, batch: Batch, key: jax.Array, /
  ) -> tuple[jax.Array, LossAux]: ...


class Direction(Protocol):
  """Gives where a solver would descend on a batch, and the loss's `LossAux`:
  the gradient in the parameters, clipped, then with weight decay."""

  def __call__(
    self, variables: Variables, batch: Batch, key: jax.Array, /
  ) -> tuple[PyTree, LossAux]: ...


class Step(Protocol):
  """Takes one local step: (variables, memory, cross-entropy).

  `batches` are those of this step, `step_size` is the learning rate of the
  round. The cross-entropy is that on the first of the batches, before the step.
  """

  def __call__(
    self,
    direction: Direction,
    variables: Variables,
    memory: PyTree,
    batches: tuple[Batch, ...],
    step_size: jax.Array,
    key: jax.Array,
    /,
  ) -> tuple[Variables, PyTree, jax.Array]: ...


class Rule(NamedTuple):
  """What a local step does, where it is not a solver's own descent."""

  memory: PyTree  # what it keeps from step to step, before the first
  step: Step
  num_batches: int = 1  # batches that each step draws, one after the other


class Objective(NamedTuple):
  """What one client minimises."""

  loss: Loss
  decay: jax.Array  # [] added to the optimiser's weight decay, outside the clip
  rule: Rule | None = None  # how, if not as the solver does


class Local(NamedTuple):
  """What local training returns."""

  variables: Variables
  num_steps: jax.Array  # [] int32, steps actually taken
  step_size: jax.Array  # [] learning rate of this round
  metrics: Mapping[str, jax.Array]  # scalars
  # Of a chain, new slots of the parts within; handed on as they are.
  within: tuple = ()
  optimizer_state: PyTree = None  # of the solver's optimiser, in the end
  # What the objective's rule keeps after the last step; () without a rule.
  memory: PyTree = ()


class Solver(Protocol):
  """Trains one client from `view.variables`, see `solvers`."""

  def __call__(
    self, objective: Objective, view: View, key: jax.Array, /
  ) -> Local: ...


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
  # Weighted mean of the models; as `broadcast` if none arrived.
  average: Variables
  summed: PyTree  # the method's `summed`, added up over the clients
  # The method's `stacked`, each leaf [S, ...]; the rows lie on the devices that
  # there are, so that what is mapped over them runs on all.
  stacked: PyTree
  arrived: jax.Array  # [S] bool
  round: jax.Array  # [] int32
  num_clients: int  # N
  public: PyTree  # unlabelled images of the server, if any
  client_id: jax.Array | None = None  # [S] int32; -1: nobody
  # What the clients made alike, see `Method.common`; the server can, too.
  common: PyTree = ()


@jax.tree_util.register_static
class Same(tuple[tuple[str, str], ...]):
  """Pairs (name, other name) of models that are one; not an array, but known
  when a round is traced."""


class Info(NamedTuple):
  """What one may want to plot or trace; never read by the next round."""

  # Scalars, stacked over rounds; NaN where nobody arrived.
  metrics: Mapping[str, jax.Array] = {}
  models: Mapping[str, Variables] = {}  # models to evaluate, last round only
  # Which of `models` are 'broadcast', the server's new model, or another one
  # of them; filled in by the engine.
  same: Same = Same()


class State(NamedTuple):
  """All that the next round needs, and nothing else."""

  variables: Variables  # the model that the server broadcasts
  shared: PyTree  # the method's server slot
  clients: PyTree  # (own, uplink) slots, every leaf [N, ...]
  round: jax.Array  # [] int32, rounds done


class InitState(Protocol):
  """Draws the state in which a simulation begins.

  `folder`: where clients' slots are mapped from files, of a federation that
  keeps them on the host; see `client_state`.
  """

  def __call__(
    self, key: jax.Array, /, folder: str | os.PathLike[str] | None = None
  ) -> State: ...


class Round(Protocol):
  """Runs one round; `key` is the base key of the training.

  Info's metrics have, beside scalars, 'bits_down' and 'bits_up' [S] uint32:
  what each client of the cohort got and sent, 0 for who was not selected or
  did not arrive.
  """

  def __call__(
    self, state: State, data: Data, cohort: Cohort, key: jax.Array, /
  ) -> tuple[State, Info]: ...


class Personalise(Protocol):
  """Gives one client's models by name, before its next local training and after
  it, if the server sent it what it broadcasts.

  Before: 'broadcast', which it would begin from, and the method's
  `Method.personal`. After: 'personalised', what local training makes of that,
  and 'personalised_NAME' of each of the method's. `place` is the client's row
  of `State.clients`.
  """

  def __call__(
    self,
    state: State,
    data: Data,
    client_id: jax.Array,
    place: jax.Array,
    key: jax.Array,
    /,
  ) -> tuple[dict[str, Personal], dict[str, Personal]]: ...


class Federation(NamedTuple):
  """The outer pair: how a simulation begins, and one round of it."""

  init: InitState
  round: Round
  personalise: Personalise
  mesh: jax.sharding.Mesh | None = None  # of the devices; None for one device
  client_state: str = 'device'  # where `State.clients` lies, or 'host'


class Init(Protocol):
  """Makes the server's slot, and ONE client's: (shared, own)."""

  def __call__(
    self, key: jax.Array, variables: Variables, /
  ) -> tuple[PyTree, PyTree]: ...


class Broadcast(Protocol):
  """Gives what of the server's slot clients see and are billed for."""

  def __call__(self, shared: PyTree, /) -> PyTree: ...


class Send(Protocol):
  """Gives the model that the server sends to a client.

  `variables` is the server's, or what the parts before made of it; `shared` the
  whole server slot; `position` [] int32 the client's place in the cohort.
  """

  def __call__(
    self,
    variables: Variables,
    shared: PyTree,
    position: jax.Array,
    key: jax.Array,
    /,
  ) -> Variables: ...


class Common(Protocol):
  """Gives what every client would make alike of what it receives: computed
  once a round, for all, and not billed. `shared` is what is broadcast."""

  def __call__(
    self,
    variables: Variables,
    shared: PyTree,
    round_: jax.Array,
    key: jax.Array,
    /,
  ) -> PyTree: ...


class Start(Protocol):
  """Gives the model that a client begins from; `view.variables` is the one that
  it received, or what the parts before made of that."""

  def __call__(self, view: View, key: jax.Array, /) -> Variables: ...


class Inner(Protocol):
  """Trains as the parts within do, and in the end the solver; the batches are
  those that the client draws in this round, whoever asks."""

  def __call__(self, objective: Objective, view: View, /) -> Local: ...


class Train(Protocol):
  """Trains one client, mostly by `inner`: (local, own), own the new slot.

  What comes of `inner` is handed on with its `within`. To change the objective
  or where training begins, call `inner` with another one, or with another
  `view.variables`.
  """

  def __call__(
    self, inner: Inner, objective: Objective, view: View, key: jax.Array, /
  ) -> tuple[Local, PyTree]: ...


class Penalty(Protocol):
  """Gives a scalar that is added to the local objective at each step, inside
  the gradient clip; `output` is the model's on `batch`, in training mode."""

  def __call__(
    self,
    variables: Variables,
    output: Output,
    batch: Batch,
    view: View,
    key: jax.Array,
    /,
  ) -> jax.Array | float: ...


class Decay(Protocol):
  """Gives a scalar that is added to the weight decay, outside the clip."""

  def __call__(self, view: View, /) -> jax.Array | float: ...


class Upload(Protocol):
  """Gives, once per client and round, (own, message): the client's new slot,
  and what it sends beside its model."""

  def __call__(
    self, view: View, local: Local, objective: Objective, key: jax.Array, /
  ) -> tuple[PyTree, PyTree]: ...


class PersonalModels(Protocol):
  """Gives the models that a client keeps to itself, by name, to be evaluated:
  of `view.own`, its slot before local training or after it."""

  def __call__(self, view: View, /) -> Mapping[str, Personal]: ...


class MessageBits(Protocol):
  """Counts the bits of one client's message, as an integer."""

  def __call__(self, message: PyTree, /) -> jax.Array | int: ...


class Reduce(Protocol):
  """Picks from what one client sent."""

  def __call__(self, sent: Sent, /) -> PyTree: ...


class Update(Protocol):
  """Gives, once per round and on the server, (variables, shared, Info): the new
  model and the new server slot. A model that it does not change it gives back
  as the same object, by which it is known that two names are one model."""

  def __call__(
    self,
    variables: Variables,
    shared: PyTree,
    received: Received,
    key: jax.Array,
    /,
  ) -> tuple[Variables, PyTree, Info]: ...


class Synthesise(Protocol):
  """Draws an image for each of `labels` [B], for pictures only."""

  def __call__(
    self, shared: PyTree, labels: jax.Array, key: jax.Array, /
  ) -> jax.Array: ...


class Method(NamedTuple):
  """What an algorithm adds to a round.

  Every hook is a pure function, documented with its type; one that is not given
  does nothing.

  Attributes:
    init: the slots of the server and of a client.
    broadcast: what of the server's slot is sent to clients.
    send: the model that is sent to a client.
    common: what clients make of what they receive, once for all.
    start: the model that a client begins from.
    penalty: a term of the local objective.
    decay: a term of the weight decay.
    train: local training, around that of the parts after it in a chain. The
      slot that it gives is `view.own` in `upload`.
    upload: a client's new slot, and its message.
    message_bits: what a message is billed for; its arrays, if not given.
    personal: models that a client keeps to itself.
    summed: what the server needs only the sum of over clients. It is added up
      as clients finish; nothing of the kind is kept per client.
    stacked: what the server needs of every client at the same time, such as
      their models as teachers.
    update: the server's step.
    synthesise: images of the method's generator; None where it has none.
    aggregates: whether `update` makes the new model of the clients' models. A
      federation needs one part that does, such as `fed_avg`; True also where
      the model is meant to stay as it is.
    sends_model: whether clients send their models.
    always: whether `update` acts also in a round in which nobody arrives.
  """

  init: Init = lambda key, variables: ((), ())
  broadcast: Broadcast = lambda shared: ()
  send: Send = lambda variables, shared, position, key: variables
  common: Common = lambda variables, shared, round_, key: ()
  start: Start = lambda view, key: view.variables
  penalty: Penalty = lambda variables, output, batch, view, key: 0.0
  decay: Decay = lambda view: 0.0
  train: Train = lambda inner, objective, view, key: (
    inner(objective, view),
    view.own,
  )
  upload: Upload = lambda view, local, objective, key: (view.own, ())
  message_bits: MessageBits = trees.num_bits
  personal: PersonalModels = lambda view: {}
  summed: Reduce = lambda sent: ()
  stacked: Reduce = lambda sent: ()
  update: Update = lambda variables, shared, received, key: (
    variables,
    shared,
    Info(),
  )
  synthesise: Synthesise | None = None
  aggregates: bool = False
  sends_model: bool = True
  always: bool = False


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


def check_hooks(method: Method) -> None:
  """Raises ValueError for a hook that does not take its arguments."""
  for name, default in Method._field_defaults.items():
    hook = getattr(method, name)
    if hook is default or not callable(hook) or not callable(default):
      continue
    want = inspect.signature(default).parameters
    try:
      inspect.signature(hook).bind(*want)
    except TypeError as error:
      raise ValueError(
        f"a method's {name} takes ({', '.join(want)}): {error}."
      ) from error


def chain(*parts: Method) -> Method:
  """Composes methods; the slots of a chain are the tuples of its parts' slots.

  Penalties and decays add up, messages are tupled, `send`, `start` and `update`
  run in the written order, and `train` nests, the first part outermost. Server
  steps therefore belong in the order: aggregate, correct the mean (FedDyn),
  refine (FedDF, FedFTG).

  Example:
    method = chain(fed_avg(), fed_ftg(model, generator, num_classes=10))

  Args:
    *parts: the methods, at least one.

  Returns:
    One method.

  Raises:
    ValueError: without a part, with two that aggregate, or for a hook that does
      not take its arguments.
  """
  if not parts:
    raise ValueError('chain() needs at least one method, got none.')
  if sum(p.aggregates for p in parts) > 1:
    raise ValueError(
      'chain() got more than one part that aggregates; the last would undo '
      'what the others did.'
    )

  for part in parts:
    check_hooks(part)

  def split(key):
    return [jax.random.fold_in(key, i) for i in range(len(parts))]

  def views(view):
    return [
      view._replace(shared=s, common=c, own=o)
      for s, c, o in zip(view.shared, view.common, view.own)
    ]

  def init(key, variables):
    slots = [p.init(k, variables) for p, k in zip(parts, split(key))]
    return tuple(s for s, _ in slots), tuple(o for _, o in slots)

  def broadcast(shared):
    return tuple(p.broadcast(s) for p, s in zip(parts, shared))

  def send(variables, shared, position, key):
    for p, s, k in zip(parts, shared, split(key)):
      variables = p.send(variables, s, position, k)
    return variables

  def common(variables, shared, round_, key):
    return tuple(
      p.common(variables, s, round_, k)
      for p, s, k in zip(parts, shared, split(key))
    )

  def start(view, key):
    variables = view.variables
    for p, v, k in zip(parts, views(view), split(key)):
      variables = p.start(v._replace(variables=variables), k)
    return variables

  def penalty(variables, output, batch, view, key):
    return sum(
      p.penalty(variables, output, batch, v, k)
      for p, v, k in zip(parts, views(view), split(key))
    )

  def decay(view):
    return sum(p.decay(v) for p, v in zip(parts, views(view)))

  def train(inner, objective, view, key):
    whole, each_key, each_view = view, split(key), views(view)

    def seen_by(part, view):
      return view._replace(shared=part.shared, common=part.common, own=part.own)

    def nested(i):
      """The training of the parts from `i` on. In what it gives, `within` has
      their new slots and, last, what was `within` the whole chain."""

      def run(objective, view):
        if i == len(parts):
          local = inner(objective, seen_by(whole, view))
          return local._replace(within=(local.within,))
        local, own = parts[i].train(
          nested(i + 1), objective, seen_by(each_view[i], view), each_key[i]
        )
        rest = local.within or (*(v.own for v in each_view[i + 1 :]), ())
        return local._replace(within=(own, *rest))

      return run

    local = nested(0)(objective, view)
    *own, within = local.within
    return local._replace(within=within), tuple(own)

  def message_bits(message):
    return sum(p.message_bits(m) for p, m in zip(parts, message))

  def personal(view):
    models = {}
    for p, v in zip(parts, views(view)):
      models = merged('personal model', models, dict(p.personal(v)))
    return models

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
    for p, own, summed, stacked, c, k in zip(
      parts,
      shared,
      received.summed,
      received.stacked,
      received.common,
      split(key),
      strict=True,
    ):
      seen = received._replace(summed=summed, stacked=stacked, common=c)
      variables, own, info = p.update(variables, own, seen, k)
      new_shared.append(own)
      metrics = merged('metric', metrics, info.metrics)
      models = merged('model', models, info.models)
    return variables, tuple(new_shared), Info(metrics, models)

  able = [i for i, p in enumerate(parts) if p.synthesise is not None]

  def synthesise(shared, labels, key):
    return parts[able[-1]].synthesise(shared[able[-1]], labels, key)

  return Method(
    init=init,
    broadcast=broadcast,
    send=send,
    common=common,
    start=start,
    penalty=penalty,
    decay=decay,
    train=train,
    upload=upload,
    message_bits=message_bits,
    personal=personal,
    summed=functools.partial(each, 'summed'),
    stacked=functools.partial(each, 'stacked'),
    update=update,
    synthesise=synthesise if able else None,
    aggregates=any(p.aggregates for p in parts),
    sends_model=all(p.sends_model for p in parts),
    always=any(p.always for p in parts),
  )
