"""Accuracy and loss of models, on whole data sets and client by client."""

from collections.abc import Iterator
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedftg_jax import client_state, compiling, stacking, trees
from fedftg_jax.base import (
  Data,
  Federation,
  Method,
  Model,
  Personal,
  State,
  Variables,
)
from fedftg_jax.data import clients

_HOST_BLOCK = 64  # number of clients whose slots are on the device at once
_CONFUSED = 100  # largest number of classes with a confusion matrix


@functools.partial(
  compiling.jit, cpu_options=compiling.OFTEN, static_argnums=(0, 4, 5)
)
def evaluate(
  model: Model,
  variables: Variables,
  x: jax.Array,
  y: jax.Array,
  batch_size: int = 500,
  batch_stats: bool = False,
) -> dict[str, jax.Array]:
  """Computes loss, accuracy, accuracy on each class, and the confusion matrix.

  Args:
    model: the classifier.
    variables: its variables.
    x: [M, H, W, channels] images.
    y: [M] labels.
    batch_size: examples in a batch; the last batch is padded and masked.
    batch_stats: whether BatchNorm normalises by each batch, for a model whose
      running statistics are meaningless, or else by the running statistics.
      Batches are then of examples in a fixed random order, since test sets are
      often sorted by class.

  Returns:
    {'loss', 'accuracy'}: scalars, the mean cross-entropy and the share of
    examples that are classified correctly; {'per_class'}: [C], the accuracy on
    each class, NaN for a class without examples; and for at most 100 classes
    {'confusion'}: [C, C] int32, the number of examples of each class (rows) by
    predicted class (columns).
  """
  return _of_all(
    model.apply, variables, x, y, batch_size, batch_stats, confusion=True
  )


def predict(
  model: Model,
  variables: Variables,
  x: np.ndarray,
  batch_size: int = 500,
  batch_stats: bool = False,
) -> np.ndarray:
  """Computes the probability of each class.

  Args:
    model: the classifier.
    variables: its variables.
    x: [M, H, W, channels] images.
    batch_size: examples at once; the last batch is padded and masked.
    batch_stats: as for `evaluate`.

  Returns:
    [M, C] float32, on the host; rows sum to 1.
  """
  found = []
  order = _order(len(x), batch_stats)
  for first in range(0, len(x), batch_size):
    some = np.asarray(x[order[first : first + batch_size]])
    missing = min(batch_size, len(x)) - len(some)
    mask = np.arange(len(some) + missing) < len(some)
    padded = np.pad(some, [(0, missing)] + [(0, 0)] * (some.ndim - 1))
    probabilities = _probabilities(model, variables, padded, mask, batch_stats)
    found.append(np.asarray(probabilities)[: len(some)])
  return np.concatenate(found)[np.argsort(order)]


def _order(num: int, batch_stats: bool) -> np.ndarray:
  """Returns the order of examples in batches: [M], random for `batch_stats`."""
  if not batch_stats:
    return np.arange(num)
  return np.random.RandomState(0).permutation(num)


@functools.partial(
  compiling.jit, cpu_options=compiling.OFTEN, static_argnums=(0, 4)
)
def _probabilities(model, variables, x, mask, batch_stats):
  logits = model.apply(variables, x, mask=mask, train=batch_stats).logits
  return jax.nn.softmax(logits.astype(jnp.float32))


def calibration(
  probabilities: np.ndarray, y: np.ndarray, num_bins: int = 15
) -> dict[str, float]:
  """Measures how well predicted probabilities match the accuracy.

  The expected calibration error is that of Guo et al., On Calibration of Modern
  Neural Networks, ICML 2017 (arXiv:1706.04599), Eq. 3: examples are grouped by
  their largest probability into bins of equal width, and the error is the mean
  over the examples of |accuracy of the bin - mean probability of the bin|. The
  Brier score is the mean squared distance between the probabilities and the
  one-hot label.

  Args:
    probabilities: [M, C], from `predict`.
    y: [M] labels.
    num_bins: number of bins of the calibration error.

  Returns:
    {'calibration_error', 'brier'}: numbers from 0 (best) on.
  """
  confidence = probabilities.max(1).astype(float)
  hits = probabilities.argmax(1) == y
  # A bin holds its upper edge, as in the paper.
  bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, None)
  gaps = np.bincount(bins, hits - confidence, num_bins)
  one_hot = np.eye(probabilities.shape[1])[y]
  return {
    'calibration_error': float(np.abs(gaps).sum() / len(y)),
    'brier': float(np.mean(np.sum((probabilities - one_hot) ** 2, axis=1))),
  }


def _of_all(
  apply, variables, x, y, batch_size, batch_stats=False, confusion=False
):
  num = len(y)
  order = jnp.asarray(_order(num, batch_stats))
  data = Data(x, y, order, jnp.int32(num))
  means = clients.mean_over_examples(
    functools.partial(
      _scores, apply, variables, batch_stats, confusion=confusion
    ),
    data,
    min(batch_size, num),
  )
  present, correct = means.pop('present'), means.pop('correct')
  if 'confusion' in means:
    counts = jnp.round(num * means['confusion'])
    means['confusion'] = counts.astype(jnp.int32)
  return {**means, 'per_class': correct / present}


def evaluate_clients(
  fed: Federation,
  state: State,
  data: Data,
  test: Data,
  key: jax.Array,
  *,
  ids: np.ndarray | None = None,
  personalise: bool = False,
  by_class: bool = False,
  chunk: int = 1,
  batch_size: int = 500,
) -> dict[str, dict[str, jax.Array]]:
  """Evaluates broadcast and personal models on the clients' test examples.

  'broadcast' is the model that the client's local training would start from;
  its BatchNorm statistics are the client's own if the method keeps them on
  clients. 'personalised' is that model after local training, with the random
  draws of the next round: a client that is selected in that round trains the
  same model. For the personal models of a method see `base.Personalise`.

  Models whose architecture differs between clients are reported once for all
  clients and once for each architecture, as 'custom' and 'custom_lenet'.

  Args:
    fed: the simulation, of one seed.
    state: the state after the last round, of one seed.
    data: the clients' training data.
    test: the clients' test data; its `index` and `count` have the same N rows.
    key: base key of the training.
    ids: [K] the clients to evaluate; None for all N.
    personalise: whether to train locally before a second evaluation; costs one
      local training of every client that is evaluated.
    by_class: whether to evaluate these clients' models on all of `test`, too.
    chunk: number of clients stacked at once, see `stacking.over_clients`.
    batch_size: examples in a batch; the last batch is padded and masked.

  Returns:
    By model: {'loss', 'accuracy'}, [K], NaN for clients without test examples
    and for clients of another architecture. With `by_class` also {'per_class'}:
    [K, C], the accuracy on each class of the whole test set, NaN for a class
    without test examples.
  """
  if ids is None:
    ids = np.arange(len(test.count))
  size = len(ids) if fed.client_state == 'device' else _HOST_BLOCK
  found = [
    _evaluate_some(
      fed,
      part,
      data,
      test,
      key,
      some,
      personalise=personalise,
      by_class=by_class,
      chunk=chunk,
      batch_size=batch_size,
    )
    for some, part in _blocks(fed, state, ids, size)
  ]
  return jax.tree.map(lambda *a: jnp.concatenate(a)[: len(ids)], *found)


def _blocks(fed, state, ids, size):
  """Yields blocks of `size` of the client ids, each with the state of a round.

  Slots on the host are those of the block, in its order. The last block is
  filled up with the last client.
  """
  size = min(size, len(ids))
  for first in range(0, len(ids), size):
    some = ids[np.minimum(np.arange(first, first + size), len(ids) - 1)]
    slots = state.clients
    if fed.client_state != 'device':
      slots = client_state.read(slots, some)
    yield some, state._replace(clients=slots)


def personal_models(
  fed: Federation,
  state: State,
  data: Data,
  key: jax.Array,
  chunk: int = 1,
  ids: np.ndarray | None = None,
) -> Iterator[tuple[int, dict[str, Personal]]]:
  """Yields the clients' personal models before their next local training.

  It yields nothing if the method has no personal models.

  Args:
    fed: the simulation, of one seed.
    state: the state after the last round, of one seed.
    data: the clients' training data.
    key: base key of the training.
    chunk: number of clients stacked at once, see `stacking.over_clients`.
    ids: [K] the clients; None for all.

  Yields:
    A client's id and its models by name, without 'broadcast', on the host. The
    models of a block of clients are copied from the device at a time.
  """
  if ids is None:
    ids = np.arange(len(data.count))
  left = len(ids)
  for some, part in _blocks(fed, state, ids, _HOST_BLOCK):
    found = jax.device_get(_personal_of_some(fed, part, data, key, some, chunk))
    if not found:
      return
    for place in range(min(len(some), left)):
      yield (int(some[place]), jax.tree.map(lambda a: a[place], found))
    left -= len(some)


@functools.partial(
  compiling.jit, cpu_options=compiling.ONCE, static_argnums=(0, 5)
)
def _personal_of_some(fed, state, data, key, ids, chunk):
  """Computes the personal models of clients `ids`, as in `_evaluate_some`."""
  num = len(ids)
  pad = 0, stacking.num_rows(num, chunk, fed.mesh) - num
  places = jnp.arange(num) if fed.client_state != 'device' else ids

  def one(shared, row):
    state, data, key = shared
    models, _ = fed.personalise(state, data, *row, key)
    del models['broadcast']
    return (), models

  rows = jax.tree.map(lambda a: jnp.pad(a, pad), (ids, places))
  _, models = stacking.over_clients(
    one, (state, data, key), rows, chunk, fed.mesh
  )
  return stacking.everywhere(jax.tree.map(lambda a: a[:num], models), fed.mesh)


@functools.partial(
  compiling.jit,
  cpu_options=compiling.OFTEN,
  static_argnums=0,
  static_argnames=('personalise', 'by_class', 'chunk', 'batch_size'),
)
def _evaluate_some(
  fed, state, data, test, key, ids, *, personalise, by_class, chunk, batch_size
):
  """Evaluates clients `ids`; slots on the host are in their order."""
  num = len(ids)
  pad = 0, stacking.num_rows(num, chunk, fed.mesh) - num
  places = jnp.arange(num) if fed.client_state != 'device' else ids

  def one(shared, row):
    state, data, flat, key = shared
    client_id, place, index, count = row
    models, trained = fed.personalise(state, data, client_id, place, key)
    if personalise:
      models = models | trained
    own = Data(*flat, index, count)
    scores = {}
    for name, model in models.items():
      scores[name] = _of_client(model, own, batch_size)
      if by_class:
        whole = _of_all(model.apply, model.variables, *flat, batch_size)
        scores[name]['per_class'] = whole['per_class']
      for i, (kind, _) in enumerate(model.kinds):
        scores[f'{name}_{kind}'] = jax.tree.map(
          lambda a: jnp.where(model.kind == i, a, jnp.nan), scores[name]
        )
    return (), scores

  rows = jax.tree.map(
    lambda a: jnp.pad(a, (pad, *[(0, 0)] * (a.ndim - 1))),
    (ids, places, test.index[ids], test.count[ids]),
  )
  _, scores = stacking.over_clients(
    one, (state, data, (test.x, test.y), key), rows, chunk, fed.mesh
  )
  return stacking.everywhere(jax.tree.map(lambda a: a[:num], scores), fed.mesh)


def fairness(
  values: np.ndarray, examples: np.ndarray | None = None
) -> dict[str, float]:
  """Measures how evenly accuracy is distributed over clients.

  Jain's index is (sum x)^2 / (n sum x^2): 1 if all values are equal, 1 / n if
  one client has everything (Jain, Chiu and Hawe, A Quantitative Measure of
  Fairness, DEC-TR-301, 1984). Mean, variance and tails are as in Li et al.,
  ICLR 2020, arXiv:1905.10497, but as fractions instead of percent.

  Args:
    values: [N], NaN for clients that do not count.
    examples: [N] number of examples behind each value; None for no weighted
      figures.

  Returns:
    'clients': the number of clients that count. If there are any: 'mean', with
    equal weights; 'worst' and 'best', the means over the worst and best tenth
    of the clients (at least one client); 'variance', around the mean over all
    of them; 'jain', 1 if all values are zero; 'weighted_mean' and
    'weighted_variance', with clients weighted by their examples.
  """
  finite = np.isfinite(values)
  weighted = {}
  if examples is not None and finite.any():
    weight = examples[finite] / np.sum(examples[finite])
    mean = np.sum(weight * values[finite])
    weighted = {
      'weighted_mean': float(mean),
      'weighted_variance': float(np.sum(weight * (values[finite] - mean) ** 2)),
    }
  values = np.sort(values[finite]).astype(float)
  num = len(values)
  if not num:
    return {'clients': 0}
  tail = -(-num // 10)
  square = num * np.sum(values**2)
  return {
    'clients': num,
    'mean': float(values.mean()),
    'worst': float(values[:tail].mean()),
    'best': float(values[-tail:].mean()),
    'variance': float(values.var()),
    'jain': float(np.sum(values) ** 2 / square) if square else 1.0,
    **weighted,
  }


def by_distribution(
  per_class: np.ndarray, counts: np.ndarray
) -> dict[str, np.ndarray]:
  """Computes the accuracy in and out of each client's own class distribution.

  As in FedNTD (arXiv:2106.03097), it is the accuracy on each class, weighted by
  the client's share p_c of that class in training, or by (1 - p_c) / (C - 1).
  Classes without test examples do not count.

  Args:
    per_class: [N, C] accuracy of each client's model on each class, NaN for a
      class without test examples.
    counts: [N, C] number of training examples of each class on each client.

  Returns:
    {'in', 'out'}: [N], NaN for a client without examples.
  """
  counts = np.asarray(counts, float)
  total = counts.sum(1, keepdims=True)
  share = np.divide(
    counts, total, out=np.full_like(counts, np.nan), where=total > 0
  )
  known = np.isfinite(per_class)
  found = {}
  for name, weight in (('in', share), ('out', 1 - share)):
    weight = np.where(known, weight, 0)
    mass = weight.sum(1)
    found[name] = np.divide(
      np.sum(weight * np.where(known, per_class, 0), axis=1),
      mass,
      out=np.full(len(mass), np.nan),
      where=mass > 0,
    )
  return found


def _of_client(model, data, batch_size):
  """Computes one client's scores; NaN if it has no examples."""
  means = clients.mean_over_examples(
    functools.partial(_scores, model.apply, model.variables, False),
    data,
    min(batch_size, len(data.index)),
  )
  return {
    name: jnp.where(data.count > 0, means[name], jnp.nan)
    for name in ('loss', 'accuracy')
  }


def _scores(apply, variables, batch_stats, batch, confusion=False):
  """Computes means over the valid examples of a batch.

  They are the loss, the accuracy, and by class the shares of all examples that
  are of the class and that are of it and classified correctly; with `confusion`
  also the shares by class and predicted class.
  """
  logits = apply(variables, batch.x, mask=batch.mask, train=batch_stats).logits
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.y)
  correct = jnp.argmax(logits, axis=-1) == batch.y
  classes = batch.mask[:, None] * jax.nn.one_hot(
    batch.y, logits.shape[-1]
  )  # [B, C]
  num = jnp.maximum(jnp.sum(batch.mask), 1)
  scores = {
    'loss': jnp.sum(batch.mask * loss) / num,
    'accuracy': jnp.sum(batch.mask * correct) / num,
    'present': jnp.sum(classes, axis=0) / num,
    'correct': jnp.sum(classes * correct[:, None], axis=0) / num,
  }
  if confusion and logits.shape[-1] <= _CONFUSED:
    given = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
    scores['confusion'] = classes.T @ given / num  # [C, C]
  return scores


def last_models() -> Method:
  """Makes a part of a method that keeps every client's last model.

  The official plots of many methods show the mean over ALL clients' last
  models, see `mean_of_last_models`. This costs the memory of N models; nothing
  is sent.

  Returns:
    The method.
  """
  return Method(
    init=lambda key, variables: ((), variables),
    upload=lambda view, local, objective, key: (local.variables, ()),
  )


def mean_of_last_models(own: Variables, weight: jax.Array) -> Variables:
  """Averages the models that `last_models` keeps.

  Args:
    own: the slots, every leaf [N, ...].
    weight: [N] the clients' weights, such as their numbers of examples
      (official FedAvg code) or ones (FedDyn, SCAFFOLD).

  Returns:
    One model.
  """
  return trees.weighted_sum(own, weight / jnp.sum(weight))
