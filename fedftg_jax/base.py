"""Defines the parts of a federated round, each once, and `chain`.

A `Method` is what an algorithm adds to a round: one record of pure functions
(hooks), each with a default that does nothing. Every hook but `update` is
written for ONE client; the engine (`federation.py`) adds the client axis, the
masks and the bookkeeping. `chain` composes methods, so a combination of
algorithms never needs a file of its own.

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
Array = jax.Array | np.ndarray  # on the device or on the host
NO_LIMIT = 2**31 - 1  # `Cohort.num_steps` of a client that is not a straggler


class Variables(NamedTuple):
  """The variables of a model: its parameters and its BatchNorm statistics."""

  # Trained by clients, subject to penalties and weight decay, and updated by
  # server optimisers.
  params: PyTree
  stats: PyTree  # BatchNorm running statistics; empty without BatchNorm


class Output(NamedTuple):
  """The result of a forward pass."""

  logits: jax.Array  # [B, C]
  features: jax.Array  # [B, F], input of the last layer
  stats: PyTree  # new running statistics (unchanged in eval mode)
  # Input and output of the last stage; () for a model without stages.
  stages: tuple[jax.Array, jax.Array] | tuple[()] = ()
  # {'mean', 'var'} of each BatchNorm's input over this batch, also in eval
  # mode, in the structure of `Variables.stats`. The variance is the biased one.
  # () for a model without BatchNorm.
  moments: PyTree = ()


class InitModel(Protocol):
  """Draws the initial variables of a model or of a generator."""

  def __call__(self, key: jax.Array, /) -> Variables: ...


class ApplyModel(Protocol):
  """Runs a classifier forward.

  `x` [B, H, W, channels] is uint8 (raw pixels, which the model normalises) or
  float (already normalised, as generated images are). `mask` [B] is False on
  padding, which BatchNorm leaves out; None means that there is no padding. With
  `train=True` BatchNorm normalises by the batch and updates its running
  statistics.
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
  """The last layer of a classifier, as functions of its own parameters.

  A method that needs only this layer of each client can stack these parameters
  instead of whole models.
  """

  params: Callable[[Variables], PyTree]  # picks its parameters from a model's
  apply: Callable[[PyTree, jax.Array], jax.Array]  # params, features -> logits


class LastStage(Protocol):
  """Runs a slimmed version of a network's last stage.

  `x` [B, h, w, channels] is the stage's input, as in `Output.stages`. Only the
  first channels of each layer of the stage are used, about the share `width` (0
  to 1) of them, with the leading slices of the parameters. BatchNorm normalises
  by the batch, and its running statistics do not change. Returns the output of
  the stage.
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
  """A classifier as a pair of pure functions, with optional pieces.

  The pieces `head`, `last_stage` and `normalise` are what some methods need
  besides; a piece that the model does not have is None, see `models.need`.
  """

  init: InitModel
  apply: ApplyModel
  head: Head | None = None
  last_stage: LastStage | None = None
  # Normalises uint8 images; float images pass unchanged.
  normalise: Callable[[jax.Array], jax.Array] | None = None
  features: bool | None = True  # None if `Output.features` is always ()


class ApplyGenerator(Protocol):
  """Generates images or features from noise `z` [B, noise] and `labels` [B].

  Images [B, H, W, channels] are in the space of a model's float inputs;
  features [B, F] are like the inputs of a model's last layer. Returns them and
  the new running statistics.
  """

  def __call__(
    self,
    variables: Variables,
    z: jax.Array,
    labels: jax.Array,
    /,
    train: bool = False,
  ) -> tuple[jax.Array, PyTree]: ...


class Unpack(Protocol):
  """Unpacks a model's variables from a form that all architectures share."""

  def __call__(self, variables: Variables, /) -> Variables: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Personal:
  """A client's personal model, as a pytree of its variables.

  The model may have the common architecture or another one. If the clients'
  architectures differ, `variables` are packed in a form that is the same for
  all: `kinds` has the name of each architecture and the function that unpacks
  its variables, and `kind` is the index of this client's architecture.
  """

  apply: ApplyModel = dataclasses.field(metadata={'static': True})
  variables: Variables
  kinds: tuple[tuple[str, Unpack], ...] = dataclasses.field(
    default=(), metadata={'static': True}
  )
  kind: jax.Array | None = None  # [] int32


class Generator(NamedTuple):
  """A conditional generator of images or features, as two pure functions."""

  init: InitModel
  apply: ApplyGenerator
  noise_dim: int  # length of one noise vector z


class Batch(NamedTuple):
  """A padded batch; each mean over it is sum(mask * v) / max(sum(mask), 1)."""

  x: jax.Array  # [B, H, W, channels] uint8 or float
  y: jax.Array  # [B] int32
  mask: jax.Array  # [B] bool, False on padding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """The rows of all clients, one client's after another's.

  It is read like a table [N, cap] that is padded with zeros, by the number of a
  client or by an array of them. Its memory is that of the rows, however large
  the largest client is.
  """

  flat: jax.Array  # [M + 1] int32, ends with a 0 that is no client's
  ends: jax.Array  # [N + 1] int32: 0, then where the rows of each client end
  cap: int = dataclasses.field(metadata={'static': True})  # of the largest

  __iter__ = None  # a client past the end is no error, so it would not end

  @property
  def shape(self) -> tuple[int, int]:
    return len(self.ends) - 1, self.cap

  def __getitem__(self, client: Any) -> jax.Array:
    """Gathers rows, [cap] or [..., cap]; past the end are the last client's."""
    client = jnp.minimum(client, len(self.ends) - 2)
    place = self.ends[client][..., None] + jnp.arange(self.cap)
    end = self.ends[client + 1][..., None]
    last = len(self.flat) - 1  # a zero
    return self.flat[jnp.where(place < end, place, last)]


class Data(NamedTuple):
  """Holds all examples in flat arrays, and each client's indices into them."""

  x: jax.Array  # [M, H, W, channels], one array for all clients
  y: jax.Array  # [M] int32
  index: Any  # type: ignore[assignment]  # `Rows` of x, or a table [N, cap]; one client: [cap] int32
  count: jax.Array  # type: ignore[assignment]  # [N] int32 valid entries of `index`; one client: []
  public: PyTree = ()  # unlabelled images on the server; () on clients


class Cohort(NamedTuple):
  """One row of the schedule; the schedule itself has a leading axis [T]."""

  client_id: Array  # [S] int32, ascending; N marks a padding slot
  arrived: Array  # [S] bool, False for dropouts and padding
  num_steps: Array  # [S] int32, largest number of local steps (stragglers)
  # [S] bool, True for clients that trained and keep their new slots, whether
  # they arrived or not; None means the clients that arrived.
  worked: Array | None = None
  # [S] int32, the clients' rows in `State.clients`; None means that a client's
  # row is its id, as is the case when all clients' slots are there.
  place: Array | None = None


class View(NamedTuple):
  """Everything that one client sees in one round (no client axis)."""

  variables: Variables  # the model that it trains from, see `Method.start`
  received: Variables  # the model that the server sent to it
  shared: PyTree  # the part of the server's slot that is broadcast
  common: PyTree  # computed once for all clients, see `Method.common`
  own: PyTree  # the method's slot on this client
  data: Data  # the flat arrays, with this client's rows
  client_id: jax.Array  # [] int32
  share: jax.Array  # [] s_k = N n_k / sum_j n_j
  round: jax.Array  # [] int32, number of rounds before this one
  num_steps: jax.Array  # [] int32, largest number of local steps
  # State from which the solver's optimiser continues; None for a fresh state.
  optimizer_state: PyTree = None
  # [S] int32, ids of the cohort's clients; -1 marks a padding slot.
  peers: jax.Array | None = None


class LossAux(NamedTuple):
  """The values that `Objective.loss` returns besides the loss."""

  stats: PyTree  # new BatchNorm statistics
  # [] mean over the batch, without penalties. This is the loss on the data: it
  # is reported as `train_loss` and used by SCAFFOLD (option 1) and q-FedAvg.
  cross_entropy: jax.Array
  logits: PyTree = ()  # [B, C], for methods that add a loss of their own


class Loss(Protocol):
  """Computes the loss of a batch, including the method's penalty."""

  def __call__(
    self, variables: Variables, batch: Batch, key: jax.Array, /
  ) -> tuple[jax.Array, LossAux]: ...


class Direction(Protocol):
  """Computes the descent direction of a solver on a batch, and the `LossAux`.

  The direction is the gradient in the parameters, clipped, plus weight decay.
  """

  def __call__(
    self, variables: Variables, batch: Batch, key: jax.Array, /
  ) -> tuple[PyTree, LossAux]: ...


class Step(Protocol):
  """Takes one local step; returns (variables, memory, cross-entropy).

  `batches` are the batches of this step, `step_size` is the learning rate of
  the round. The cross-entropy is that of the first batch before the step.
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
  """A rule for local steps that replaces the solver's own descent."""

  memory: PyTree  # initial value of what is carried from step to step
  step: Step
  num_batches: int = 1  # consecutive batches that each step uses


class Objective(NamedTuple):
  """The objective that one client minimises."""

  loss: Loss
  decay: jax.Array  # [] added to the weight decay, not subject to clipping
  rule: Rule | None = None  # replaces the solver's own step


class Local(NamedTuple):
  """The result of local training."""

  variables: Variables
  num_steps: jax.Array  # [] int32, number of steps taken
  # [] how far a step moved the model per unit of a constant gradient, mean over
  # the steps: the learning rate of this round, with momentum more.
  step_size: jax.Array
  metrics: Mapping[str, jax.Array]  # scalars
  # In a chain: new slots of the inner parts. Hooks pass it on unchanged.
  within: tuple = ()
  optimizer_state: PyTree = None  # final state of the solver's optimiser
  # Memory of the objective's rule after the last step; () without a rule.
  memory: PyTree = ()


class Solver(Protocol):
  """Trains one client, starting from `view.variables`; see `solvers`."""

  def __call__(
    self, objective: Objective, view: View, key: jax.Array, /
  ) -> Local: ...


class Sent(NamedTuple):
  """One client's upload (no client axis), and its weight in means."""

  # Everything but `start` is 0 if the client did not arrive.
  start: Variables  # the model that local training began from
  delta: Variables  # change of the model, after the uplink
  message: PyTree  # the method's own upload
  weight: jax.Array  # [] weights sum to 1 over the clients that arrived
  share: jax.Array  # [] s_k = N n_k / sum_j n_j

  @property
  def model(self) -> Variables:
    """The client's model: `start` plus `delta`."""
    return jax.tree.map(jnp.add, self.start, self.delta)


class Received(NamedTuple):
  """Everything that the server receives from a cohort."""

  broadcast: Variables  # the model that the server had broadcast
  # Weighted mean of the clients' models; `broadcast` if no client arrived.
  average: Variables
  summed: PyTree  # the sum over clients of the method's `summed`
  # The method's `stacked`, each leaf [S, ...]. The rows are sharded over the
  # devices, so a `vmap` over them runs on all devices.
  stacked: PyTree
  arrived: jax.Array  # [S] bool
  round: jax.Array  # [] int32
  num_clients: int  # N
  public: PyTree  # unlabelled images on the server, if any
  client_id: jax.Array | None = None  # [S] int32; -1 marks a padding slot
  # The result of `Method.common`, which the server can compute as well.
  common: PyTree = ()


@jax.tree_util.register_static
class Same(tuple[tuple[str, str], ...]):
  """Pairs (name, other name) of identical models, known at trace time."""


class Info(NamedTuple):
  """Metrics and models for plots and logs; the next round never reads them."""

  # Scalars, stacked over rounds; NaN in a round in which no client arrived.
  metrics: Mapping[str, jax.Array] = {}
  models: Mapping[str, Variables] = {}  # models to evaluate, last round only
  # Which of `models` are identical to 'broadcast' (the server's new model) or
  # to each other; filled in by the engine.
  same: Same = Same()


class State(NamedTuple):
  """Everything that the next round needs, and nothing else."""

  variables: Variables  # the model that the server broadcasts
  shared: PyTree  # the method's slot on the server
  clients: PyTree  # (own, uplink) slots, every leaf [N, ...]
  round: jax.Array  # [] int32, number of rounds done


class InitState(Protocol):
  """Draws the initial state of a simulation.

  `folder`: where to memory-map the clients' slots from files, for a federation
  that keeps them on the host; see `client_state`.
  """

  def __call__(
    self, key: jax.Array, /, folder: str | os.PathLike[str] | None = None
  ) -> State: ...


class Round(Protocol):
  """Runs one round; `key` is the base key of the training.

  The metrics of `Info` are scalars, except 'bits_down' and 'bits_up' [S]
  uint32: the bits that each client of the cohort received and sent, 0 for a
  client that was not selected or did not arrive.
  """

  def __call__(
    self, state: State, data: Data, cohort: Cohort, key: jax.Array, /
  ) -> tuple[State, Info]: ...


class Personalise(Protocol):
  """Returns one client's models by name, before and after local training.

  Before: 'broadcast', the model that the client's next local training would
  start from if the server sent it the broadcast model, and the models of
  `Method.personal`. After: 'personalised', the result of that training, and
  'personalised_NAME' for each model of the method. `place` is the client's row
  in `State.clients`.
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
  """A simulation: its initial state, one round, and personalised models."""

  init: InitState
  round: Round
  personalise: Personalise
  mesh: jax.sharding.Mesh | None = None  # the devices; None for one device
  client_state: str = 'device'  # where `State.clients` is: 'device' or 'host'


class Init(Protocol):
  """Creates the server's slot and ONE client's slot: (shared, own)."""

  def __call__(
    self, key: jax.Array, variables: Variables, /
  ) -> tuple[PyTree, PyTree]: ...


class Broadcast(Protocol):
  """Selects the part of the server's slot that is sent to every client.

  The communication cost of a round includes it.
  """

  def __call__(self, shared: PyTree, /) -> PyTree: ...


class Send(Protocol):
  """Computes the model that the server sends to a client.

  `variables` is the server's model, or what earlier parts of a chain made of
  it; `shared` is the whole server slot; `position` [] int32 is the client's
  position in the cohort.
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
  """Computes what every client would compute identically from what it receives.

  It is computed once a round, for all clients, and costs no communication.
  `shared` is the part of the server's slot that is broadcast.
  """

  def __call__(
    self,
    variables: Variables,
    shared: PyTree,
    round_: jax.Array,
    key: jax.Array,
    /,
  ) -> PyTree: ...


class Start(Protocol):
  """Computes the model that a client's local training starts from.

  `view.variables` is the model that the client received, or what earlier parts
  of a chain made of it.
  """

  def __call__(self, view: View, key: jax.Array, /) -> Variables: ...


class Inner(Protocol):
  """Trains as the inner parts of a chain do, and finally the solver.

  Every call uses the same batches: those that the client draws in this round.
  """

  def __call__(self, objective: Objective, view: View, /) -> Local: ...


class Train(Protocol):
  """Trains one client, usually by calling `inner`; returns (local, own).

  `own` is the client's new slot. The result of `inner` is returned with its
  field `within` unchanged. To change the objective or the starting point, call
  `inner` with another objective or another `view.variables`.
  """

  def __call__(
    self, inner: Inner, objective: Objective, view: View, key: jax.Array, /
  ) -> tuple[Local, PyTree]: ...


class Penalty(Protocol):
  """Computes a scalar that is added to the local objective at each step.

  Gradient clipping applies to it. `output` is the model's output on `batch`, in
  training mode.
  """

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
  """Computes a scalar that is added to the weight decay, after clipping."""

  def __call__(self, view: View, /) -> jax.Array | float: ...


class Upload(Protocol):
  """Computes a client's new slot and its message; returns (own, message).

  It runs once per client and round. The message is what the client sends
  besides its model.
  """

  def __call__(
    self, view: View, local: Local, objective: Objective, key: jax.Array, /
  ) -> tuple[PyTree, PyTree]: ...


class PersonalModels(Protocol):
  """Returns the models that a client keeps for itself, by name, for evaluation.

  They are made from `view.own`, the client's slot before or after local
  training.
  """

  def __call__(self, view: View, /) -> Mapping[str, Personal]: ...


class ServerModels(Protocol):
  """Returns further models that the server keeps, by name, for evaluation.

  They are made from the server's slot after the round, also if no client
  arrived. A finished run keeps them. Models that are known only during a round
  belong into `Info.models`.
  """

  def __call__(self, shared: PyTree, /) -> Mapping[str, Variables]: ...


class MessageBits(Protocol):
  """Counts the bits of one client's message, as an integer."""

  def __call__(self, message: PyTree, /) -> jax.Array | int: ...


class Reduce(Protocol):
  """Selects values from what one client sent."""

  def __call__(self, sent: Sent, /) -> PyTree: ...


class Update(Protocol):
  """Runs the server's step, once per round; returns (variables, shared, Info).

  These are the new model and the new server slot. A hook that does not change a
  model must return the same object: that is how the engine knows that two names
  stand for one model.
  """

  def __call__(
    self,
    variables: Variables,
    shared: PyTree,
    received: Received,
    key: jax.Array,
    /,
  ) -> tuple[Variables, PyTree, Info]: ...


class Synthesise(Protocol):
  """Generates an image for each of `labels` [B]; used for pictures only."""

  def __call__(
    self, shared: PyTree, labels: jax.Array, key: jax.Array, /
  ) -> jax.Array: ...


class Method(NamedTuple):
  """An algorithm, as the hooks that it adds to a round.

  Every hook is a pure function, documented at its type. A hook that is not
  given does nothing.

  Attributes:
    init: creates the slots of the server and of a client.
    broadcast: selects the part of the server's slot that is sent to clients.
    send: computes the model that is sent to a client.
    common: computes once what all clients would compute identically.
    start: computes the model that local training starts from.
    penalty: a term of the local objective.
    decay: a term of the weight decay.
    train: local training, wrapped around that of later parts in a chain. The
      slot that it returns is `view.own` in `upload`.
    upload: computes a client's new slot and its message.
    message_bits: the size of a message in bits; by default that of its arrays.
    personal: the models that a client keeps for itself.
    summed: values of which the server needs only the sum over clients. They are
      added up as clients finish, so nothing is kept per client.
    stacked: values that the server needs from every client at the same time,
      such as their models as teachers.
    update: the server's step.
    models: further models that the server keeps, for evaluation.
    synthesise: images of the method's generator; None if it has no generator.
    aggregates: whether `update` makes the new model from the clients' models. A
      federation needs one such part, such as `fed_avg`. Set it to True also for
      a method that deliberately leaves the model as it is.
    sends_model: whether clients send their models.
    always: whether `update` runs even in a round in which no client arrives.
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
  models: ServerModels = lambda shared: {}
  synthesise: Synthesise | None = None
  aggregates: bool = False
  sends_model: bool = True
  always: bool = False


def merged(
  kind: str, some: dict[str, Any], others: dict[str, Any]
) -> dict[str, Any]:
  """Merges two dictionaries that must have no key in common.

  Args:
    kind: what the dictionaries hold, for the error message.
    some: values by name.
    others: values by name.

  Raises:
    ValueError: if both have a key.
  """
  both = sorted(some.keys() & others.keys())
  if both:
    raise ValueError(
      f'two parts give the {kind} {both[0]!r}; begin the name with the name '
      "of the method, as in 'fed_ftg/md'."
    )
  return {**some, **others}


def check_hooks(method: Method) -> None:
  """Checks that every hook accepts the arguments of its type.

  Raises:
    ValueError: names the hook that does not.
  """
  for name, default in Method._field_defaults.items():
    hook = getattr(method, name)
    if hook is default or not callable(hook) or not callable(default):
      continue
    want = inspect.signature(default).parameters
    try:
      inspect.signature(hook).bind(*want)
    except TypeError as error:
      raise ValueError(
        f"a method's {name} must take ({', '.join(want)}): {error}."
      ) from error


def chain(*parts: Method) -> Method:
  """Composes methods into one.

  The slots of a chain are tuples of its parts' slots, and so are its messages.
  Penalties and decays are added up. `send`, `start` and `update` run in the
  order of the parts. `train` nests, with the first part outermost. Parts
  therefore belong in the order in which the server works: aggregate, correct
  the mean (FedDyn), refine the model (FedDF, FedFTG).

  Example:
    method = chain(fed_avg(), fed_ftg(model, generator, num_classes=10))

  Args:
    *parts: the methods, at least one.

  Returns:
    One method.

  Raises:
    ValueError: if there is no part, if two parts aggregate, or if a hook does
      not accept its arguments.
  """
  if not parts:
    raise ValueError('chain() needs at least one method, got none.')
  if sum(p.aggregates for p in parts) > 1:
    raise ValueError(
      'chain() got more than one part that aggregates; the last one would '
      'overwrite the results of the others.'
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
      """Returns the local training of part `i` and all later parts.

      In its result, `within` has the new slots of these parts and, last, the
      `within` of what surrounds the chain.
      """

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

  def models(shared):
    kept = {}
    for p, s in zip(parts, shared):
      kept = merged('model', kept, dict(p.models(s)))
    return kept

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
    models=models,
    synthesise=synthesise if able else None,
    aggregates=any(p.aggregates for p in parts),
    sends_model=all(p.sends_model for p in parts),
    always=any(p.always for p in parts),
  )
