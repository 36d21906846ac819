"""Partitions: the examples of each client, as index arrays.

Every example is used once. All draws come from NumPy's legacy generator, whose
stream is frozen. No scheme can draw forever: the number of redraws is bounded,
and requirements (such as a smallest size) are enforced instead of waited for.

`dirichlet` is the scheme of the official FedDyn and FedFTG code, draw by draw:
class proportions are drawn per CLIENT, and client sizes and class totals are
exact. `dirichlet_class` is the scheme of most other codes: proportions of
clients are drawn per CLASS.
"""

from collections.abc import Sequence
import heapq
import os

import numpy as np

from fedftg_jax.data import arrays, draws, skew
from fedftg_jax.data.parts import Parts

MAX_REDRAWS = 10_000


def iid(
  labels: np.ndarray, num_clients: int, *, seed: int = 0, sigma: float = 0.0
) -> Parts:
  """Splits a random permutation into contiguous slices.

  Args:
    labels: [M]; only its length is used.
    num_clients: N.
    seed: seed of the partition.
    sigma: spread of the sizes, see `client_sizes`.

  Returns:
    N index arrays.
  """
  rng = np.random.RandomState(seed)
  order = rng.permutation(len(labels))
  sizes = client_sizes(rng, len(labels), num_clients, sigma)
  return Parts(order, sizes)


def dirichlet(
  labels: np.ndarray,
  num_clients: int,
  alpha: float,
  *,
  seed: int = 0,
  sigma: float = 0.0,
  max_redraws: int = MAX_REDRAWS,
) -> Parts:
  """Draws the class proportions of every client from Dirichlet(alpha).

  Until all clients are full, a client that is not full is drawn uniformly, and
  a class from the client's proportions, which is redrawn while that class is
  used up. The official code can redraw forever. Here, after `max_redraws`, the
  class is drawn from the limit distribution of redrawing: the proportions
  renormalised over the classes that are left (uniform if they have less than
  1e-12 of the mass). Partitions that the official code can draw in reasonable
  time are the same.

  Args:
    labels: [M] integers in [0, C).
    num_clients: N.
    alpha: concentration; the smaller, the fewer classes a client has.
    seed: seed of the partition.
    sigma: spread of the sizes, see `client_sizes`.
    max_redraws: largest number of redraws of one class.

  Returns:
    N index arrays, with exact sizes and class totals.

  Raises:
    ValueError: for a value out of range.
  """
  if not alpha > 0:
    raise ValueError(f'alpha must be above 0, got {alpha}.')
  num_classes = int(labels.max()) + 1
  rng = np.random.RandomState(seed)
  order = rng.permutation(len(labels))
  sizes = client_sizes(rng, len(labels), num_clients, sigma)
  priors = rng.dirichlet([alpha] * num_classes, size=num_clients)
  priors[~np.isfinite(priors).all(axis=1)] = 1 / num_classes
  order_labels = labels[order]
  totals = np.bincount(labels, minlength=num_classes)
  clients, drawn = draws.clients_and_classes(
    rng, sizes, priors, totals, max_redraws
  )
  rows = np.empty(len(labels), int)
  for c in range(num_classes):
    rows[drawn == c] = order[order_labels == c][::-1]
  # The examples of a client and of a class are used from the last one on.
  return Parts.by_owner(clients[::-1], num_clients, rows[::-1])


def dirichlet_class(
  labels: np.ndarray,
  num_clients: int,
  alpha: float,
  *,
  seed: int = 0,
  min_size: int = 1,
  niid_bench: bool = False,
  max_redraws: int = MAX_REDRAWS // 10,
) -> Parts:
  """Divides each class among clients in proportions from Dirichlet(alpha).

  Yurochkin et al., Bayesian Nonparametric Federated Learning of Neural
  Networks, ICML 2019, arXiv:1905.12022; "distribution-based label imbalance" in
  Li et al., ICDE 2022, arXiv:2102.02079 (NIID-Bench). Both the classes and the
  sizes of clients are skewed.

  NIID-Bench's code, and codes that copy it (Flower's baseline, PFLlib), do
  three more things: a client that holds its even share of M / N examples gets
  none of the following classes; the positions of the cuts are rounded down; and
  everything is drawn again until each client has `min_size` examples. With
  `niid_bench` all three are done. Without it, positions are rounded to the
  nearest integer, and examples are moved to clients that have too few, see
  `_fill`, since with many clients redrawing may never end.

  With `niid_bench` numbers are also drawn in the order of PFLlib and Flower's
  baseline. So the same seed gives each client as many examples of each class as
  PFLlib, and as the baseline gave when its table was published (with
  `min_size=10`; its code has drawn from another generator since).

  Args:
    labels: [M] integers in [0, C).
    num_clients: N.
    alpha: concentration; the smaller, the fewer clients share a class.
    seed: seed of the partition.
    min_size: smallest number of examples of a client.
    niid_bench: whether to draw as NIID-Bench's code does.
    max_redraws: for `niid_bench`: after that many draws examples are moved.

  Returns:
    N index arrays.

  Raises:
    ValueError: for a value out of range.
  """
  if not alpha > 0:
    raise ValueError(f'alpha must be above 0, got {alpha}.')
  _check_min_size(len(labels), num_clients, min_size)
  rng = np.random.RandomState(seed)
  for _ in range(max_redraws if niid_bench else 1):
    parts = _class_shares(rng, labels, num_clients, alpha, niid_bench)
    if parts.sizes.min() >= min_size:
      break
  for part in parts:
    rng.shuffle(part)
  return _fill(parts, min_size)


def _class_shares(rng, labels, num_clients, alpha, niid_bench):
  """Draws once for `dirichlet_class`, before examples are moved."""
  rows, owners = [], []
  sizes = np.zeros(num_clients, int)
  for own in _shuffled_classes(rng, labels, niid_bench):
    rows.append(own)
    proportions = rng.dirichlet(np.full(num_clients, alpha))
    if not np.isfinite(proportions).all():  # all draws were 0: take the limit
      proportions = np.eye(num_clients)[rng.randint(num_clients)]
    if niid_bench:
      has_room = sizes < len(labels) / num_clients
      left = proportions * has_room
      left = left if left.sum() > 0 else has_room
      proportions = left / left.sum()
    places = np.cumsum(proportions)[:-1] * len(own)
    cuts = np.floor(places) if niid_bench else np.rint(places)
    pieces = np.diff(cuts.astype(int), prepend=0, append=len(own))
    owners.append(np.repeat(np.arange(num_clients), pieces))
    sizes += pieces
  return Parts.by_owner(
    np.concatenate(owners), num_clients, np.concatenate(rows)
  )


def _shuffled_classes(rng, labels, niid_bench):
  """Yields the rows of each class, in random order.

  They are shuffled at once, or, as NIID-Bench's code does, class by class.
  """
  order = np.arange(len(labels)) if niid_bench else rng.permutation(len(labels))
  order_labels = labels[order]
  for c in np.unique(labels):
    rows = order[order_labels == c]
    if niid_bench:
      rng.shuffle(rows)
    yield rows


def _fill(parts, min_size):
  """Moves examples from the largest clients until all have `min_size`.

  Each example is the last one of the client that is then the largest (the first
  of several), which is a random example if their order is random.
  """
  lacking = np.maximum(min_size - parts.sizes, 0)
  num = lacking.sum()
  if not num:
    return parts
  # A client of n examples can give its n-th, then its (n - 1)-th, and so on.
  # The n-th ones go before the (n - 1)-th ones of all clients.
  at_least = np.bincount(parts.sizes)[::-1].cumsum()[::-1]  # clients by size
  lowest = np.flatnonzero(at_least[::-1].cumsum()[::-1] >= num)[-1]
  given = np.maximum(parts.sizes - lowest + 1, 0)
  donors = np.repeat(np.arange(len(parts)), given)
  heights = Parts(donors, given).places() + lowest
  order = np.lexsort((donors, -heights))[:num]
  moved = parts.starts[donors[order]] + heights[order] - 1
  kept = np.ones(len(parts.rows), bool)
  kept[moved] = False
  return Parts.by_owner(
    np.concatenate(
      [parts.owners()[kept], np.repeat(np.arange(len(parts)), lacking)]
    ),
    len(parts),
    np.concatenate([parts.rows[kept], parts.rows[moved]]),
  )


def shards(
  labels: np.ndarray,
  num_clients: int,
  shards_per_client: int = 2,
  *,
  seed: int = 0,
) -> Parts:
  """Sorts examples by label, cuts them in equal shards, and deals these out.

  McMahan et al., Communication-Efficient Learning of Deep Networks from
  Decentralized Data, AISTATS 2017, arXiv:1602.05629, section 3 ("pathological
  non-IID": 200 shards of 300 MNIST images, 2 for each of 100 clients). A client
  has about as many classes as shards: more if a shard lies across two classes,
  fewer if two shards are of the same class. Shards differ in size by at most
  one.

  Args:
    labels: [M].
    num_clients: N.
    shards_per_client: number of shards of each client.
    seed: seed of the order within a class and of the assignment of shards.

  Returns:
    N index arrays.

  Raises:
    ValueError: for a value out of range.
  """
  check_num_clients(len(labels), num_clients)
  num = num_clients * shards_per_client
  if not num_clients <= num <= len(labels):
    raise ValueError(
      f'shards_per_client must be at least 1, and at most '
      f'{len(labels) // num_clients} for {len(labels)} examples on '
      f'{num_clients} clients, got {shards_per_client}.'
    )
  rng = np.random.RandomState(seed)
  order = rng.permutation(len(labels))
  order = order[np.argsort(labels[order], kind='stable')]
  cut = Parts(order, _even(len(labels), num))
  dealt = rng.permutation(num)
  sizes = cut.sizes[dealt].reshape(num_clients, shards_per_client)
  return Parts(cut.rows_of(dealt), sizes.sum(axis=1))


def classes(
  labels: np.ndarray,
  num_clients: int,
  classes_per_client: int = 2,
  *,
  seed: int = 0,
  niid_bench: bool = False,
) -> Parts:
  """Gives every client exactly `classes_per_client` classes.

  "Quantity-based label imbalance", #C = k, of Li et al., Federated Learning on
  Non-IID Data Silos, ICDE 2022, arXiv:2102.02079 (NIID-Bench): a class is
  divided as equally as possible among the clients that have it.

  In NIID-Bench's code client i has class i modulo C and draws k - 1 other
  classes independently. Some classes then have one client and others many, and
  with fewer clients than classes a class may have none. With `niid_bench` it is
  done in this way, and numbers are drawn as Flower's baseline niid_bench did
  when its table was published. Without it, classes get clients in proportion to
  their examples (at least one each), and the assignment is drawn from all
  assignments of this kind.

  Args:
    labels: [M].
    num_clients: N.
    classes_per_client: k.
    seed: seed of the partition.
    niid_bench: whether to draw as NIID-Bench's code does.

  Returns:
    N index arrays.

  Raises:
    ValueError: for a value out of range, or if a class would have no client or
      be too small for its clients.
  """
  check_num_clients(len(labels), num_clients)
  present, sizes = np.unique(labels, return_counts=True)
  if not 1 <= classes_per_client <= len(present):
    raise ValueError(
      f'classes_per_client must be between 1 and the number of classes '
      f'({len(present)}), got {classes_per_client}.'
    )
  rng = np.random.RandomState(seed)
  if niid_bench:
    if num_clients < len(present):
      raise ValueError(
        'num_clients must be at least the number of classes '
        f'({len(present)}) with niid_bench, so that each class has a client, '
        f'got {num_clients}.'
      )
    owned = _drawn_alone(rng, num_clients, len(present), classes_per_client)
    if (owned.sum(axis=0) > sizes).any():
      raise ValueError('a class has fewer examples than clients.')
  else:
    owners = _num_owners(sizes, num_clients, classes_per_client)
    owned = _mixed(rng, _dealt(owners, num_clients))
  rows, shares = [], []
  for own, has in zip(_shuffled_classes(rng, labels, niid_bench), owned.T):
    clients = np.flatnonzero(has)
    if not niid_bench:
      clients = rng.permutation(clients)
    rows.append(own)
    shares.append(np.repeat(clients, _even(len(own), len(clients))))
  return Parts.by_owner(
    np.concatenate(shares), num_clients, np.concatenate(rows)
  )


def _even(total, num):
  """Returns `num` sizes with sum `total` that differ by at most 1, [num]."""
  return total // num + (np.arange(num) < total % num)


def _drawn_alone(rng, num_clients, num_classes, per_client):
  """Assigns class i modulo C to client i, and others at random, [N, C]."""
  owned = np.zeros((num_clients, num_classes), bool)
  for client, has in enumerate(owned):
    has[client % num_classes] = True
    for _ in range(per_client - 1):
      while has[drawn := rng.randint(num_classes)]:
        pass
      has[drawn] = True
  return owned


def _num_owners(sizes, num_clients, per_client):
  """Computes how many clients each class gets, [C]; `per_client` N in all.

  Each class gets one. The rest is given one by one to the class with the most
  examples per client, among those that can have another client.
  """
  num = num_clients * per_client
  most = np.minimum(sizes, num_clients)
  if num < len(sizes):
    raise ValueError(
      'num_clients x classes_per_client must be at least the number of '
      f'classes ({len(sizes)}), so that each class has a client, got {num}.'
    )
  if num > most.sum():
    raise ValueError(
      f'classes_per_client must be at most {most.sum() // num_clients} for '
      f'{num_clients} clients, because some classes have few examples, got '
      f'{per_client}.'
    )
  sizes, most = sizes.tolist(), most.tolist()
  owners = [1] * len(sizes)
  fullest = [(-size, c) for c, size in enumerate(sizes) if most[c] > 1]
  heapq.heapify(fullest)
  for _ in range(num - len(sizes)):
    _, c = heapq.heappop(fullest)
    owners[c] += 1
    if owners[c] < most[c]:
      heapq.heappush(fullest, (-sizes[c] / owners[c], c))
  return np.array(owners)


def _dealt(owners, num_clients):
  """Assigns each class its number of clients by dealing them out, [N, C]."""
  owned = np.zeros((num_clients, len(owners)), bool)
  cards = np.repeat(np.arange(len(owners)), owners)
  owned[np.arange(len(cards)) % num_clients, cards] = True
  return owned


def _mixed(rng, owned, swaps_per_entry=10):
  """Draws a random table with the same sums of rows and of columns.

  Two clients exchange classes that the other one lacks, again and again: a
  Markov chain whose limit is uniform over such tables (Besag and Clifford,
  Biometrika 1989), here for a fixed number of tries. Tries of different clients
  are made at once.
  """
  owned = owned.copy()
  client, label = np.nonzero(owned)
  num, block = len(client), -(-len(owned) // 8)
  for begin in range(0, swaps_per_entry * num, block):
    size = min(block, swaps_per_entry * num - begin)
    i, j = rng.randint(num, size=(size, 2)).T
    while len(i):
      ready = _comes_first(client[i], client[j], len(owned))
      _exchange(owned, client, label, i[ready], j[ready])
      i, j = i[~ready], j[~ready]
  return owned


def _comes_first(a, b, num_clients):
  """Finds the pairs of clients of which no earlier pair has one, [pairs]."""
  turn = np.arange(len(a))
  first = np.full(num_clients, len(a))
  np.minimum.at(first, a, turn)
  np.minimum.at(first, b, turn)
  return (first[a] == turn) & (first[b] == turn)


def _exchange(owned, client, label, i, j):
  """Exchanges the classes of entries i and j where both clients lack them."""
  lacks = ~(owned[client[i], label[j]] | owned[client[j], label[i]])
  i, j = i[lacks], j[lacks]
  owned[client[i], label[i]] = owned[client[j], label[j]] = False
  label[i], label[j] = label[j], label[i]
  owned[client[i], label[i]] = owned[client[j], label[j]] = True


def quantity(
  labels: np.ndarray,
  num_clients: int,
  *,
  seed: int = 0,
  sigma: float = 0.0,
  power: float = 0.0,
  min_size: int = 1,
) -> Parts:
  """Gives clients random examples but unequal sizes: "quantity skew".

  Sizes are `min_size` plus a share of the rest in proportion to rank^-power
  exp(sigma z), with z standard normal: a power law (Li et al., Federated
  Optimization in Heterogeneous Networks, MLSys 2020, arXiv:1812.06127, has
  sizes that follow one), or lognormal, or both.

  Args:
    labels: [M]; only its length is used.
    num_clients: N.
    seed: seed of the partition.
    sigma: standard deviation of the logarithm of the sizes.
    power: exponent of the power law; ranks are assigned to clients at random.
    min_size: smallest number of examples of a client.

  Returns:
    N index arrays.

  Raises:
    ValueError: for a value out of range.
  """
  _check_min_size(len(labels), num_clients, min_size)
  for name, value in (('sigma', sigma), ('power', power)):
    if not value >= 0:
      raise ValueError(f'{name} must be at least 0, got {value}.')
  rng = np.random.RandomState(seed)
  order = rng.permutation(len(labels))
  log = sigma * rng.standard_normal(num_clients) - power * np.log1p(
    rng.permutation(num_clients)
  )
  weight = np.exp(log - log.max())
  exact = (len(labels) - min_size * num_clients) * weight / weight.sum()
  sizes = min_size + largest_remainders(exact)
  return Parts(order, sizes)


def natural(clients: np.ndarray | None, num_clients: int) -> Parts:
  """Gives every client its own examples, as the data name them.

  Args:
    clients: [M] the client of each example, in [0, N); None if unknown.
    num_clients: N.

  Returns:
    N index arrays.

  Raises:
    ValueError: if the clients are unknown.
  """
  if clients is None:
    raise ValueError(
      'the data do not name the client of each example: an .npz does so with '
      'the array train_client_id, a set of TensorFlow Datasets with a feature '
      'client_id, writer_id or user_id'
    )
  return Parts.by_owner(clients, num_clients)


def client_sizes(
  rng: np.random.RandomState, num_examples: int, num_clients: int, sigma: float
) -> np.ndarray:
  """Draws lognormal client sizes [N] that sum to `num_examples`.

  Args:
    rng: the generator; N lognormals are drawn even if sigma is 0.
    num_examples: M.
    num_clients: N, at most M.
    sigma: standard deviation of the logarithm of the sizes; 0 for equal ones.

  Returns:
    [N] integers.

  Raises:
    ValueError: for a value out of range.
  """
  check_num_clients(num_examples, num_clients)
  if not sigma >= 0:
    raise ValueError(f'sigma must be at least 0, got {sigma}.')
  draws = rng.lognormal(np.log(num_examples // num_clients), sigma, num_clients)
  sizes = (draws / draws.sum() * num_examples).astype(int)
  residue = sizes.sum() - num_examples
  if residue:
    sizes[np.argmax(sizes > residue)] -= residue
  return sizes


def check_num_clients(num_examples: int, num_clients: int) -> None:
  """Checks that every client can have an example.

  Raises:
    ValueError: if not.
  """
  if not 1 <= num_clients <= num_examples:
    raise ValueError(
      f'num_clients must be between 1 and the number of examples '
      f'({num_examples}), got {num_clients}.'
    )


def _check_min_size(num_examples, num_clients, min_size):
  check_num_clients(num_examples, num_clients)
  if not 0 <= min_size <= num_examples // num_clients:
    raise ValueError(
      f'min_size must be between 0 and {num_examples // num_clients}, the '
      f'largest possible for {num_examples} examples on {num_clients} clients, '
      f'got {min_size}.'
    )


def save(path: str | os.PathLike[str], parts: Sequence[np.ndarray]) -> None:
  """Writes a partition as .npz, for `load`: all `rows` [M] and `sizes` [N]."""
  parts = Parts.of(parts)
  small = parts.rows.max(initial=0) < 2**31
  with open(path, 'wb') as file:  # permutations hardly compress
    np.savez(
      file,
      rows=parts.rows.astype(np.int32 if small else np.int64),
      sizes=parts.sizes,
    )


def load(path: str, num_examples: int) -> Parts:
  """Reads a partition.

  The file holds the arrays of `save`, or one array of rows per client, in the
  order of the clients.

  Args:
    path: an .npz file.
    num_examples: M, all of which must be given to clients.

  Raises:
    ValueError: for an unreadable file, or an index that is out of range, or
      given to two clients or to none.
  """
  found = arrays.read(path)
  if not found or any(
    a.ndim != 1 or not np.issubdtype(a.dtype, np.integer)
    for a in found.values()
  ):
    raise ValueError(f'{path}: must hold one 1-D integer array per client')
  if found.keys() == {'rows', 'sizes'}:
    sizes = found['sizes']
    if not len(sizes) or sizes.min() < 0 or sizes.sum() != len(found['rows']):
      raise ValueError(
        f'{path}: sizes must be at least 0 and sum to the number of rows, '
        f'{len(found["rows"])}'
      )
    parts = Parts(found['rows'].astype(np.int64), sizes)
  else:
    parts = Parts.of(found.values())
  used = parts.rows
  if not len(used) or used.min() < 0 or used.max() >= num_examples:
    raise ValueError(
      f'{path}: indices must lie between 0 and {num_examples - 1}'
    )
  num = parts.num_different(num_examples)
  if num < len(used):
    raise ValueError(f'{path}: an example is given to more than one client')
  if num < num_examples:
    raise ValueError(
      f'{path}: gives {num} of the {num_examples} training examples to '
      'clients; must give all'
    )
  return parts


def like(
  labels: np.ndarray, train_labels: np.ndarray, parts: Sequence[np.ndarray]
) -> Parts:
  """Divides other examples among clients, with class shares as in `parts`.

  Client k gets floor(m_y n_k^y / n^y) of the m_y examples of class y, and the
  remainder goes to the largest fractions: every example of a class that some
  client has is given to one client.

  Args:
    labels: [m] labels of the examples to divide, such as a test set.
    train_labels: [M] labels of the examples that `parts` points into.
    parts: rows of each client.

  Returns:
    Rows into `labels` for each client; some may be empty.
  """
  num_clients = len(parts)
  num_classes = 1 + int(max(labels.max(), train_labels.max()))
  held = skew.class_counts(train_labels, parts, num_classes)  # [N, C]
  rows, owners = [], []
  for label in np.flatnonzero(np.bincount(labels) > 0):
    of_label = held[:, label]
    if not of_label.sum():
      continue
    rows.append(np.flatnonzero(labels == label))
    sizes = largest_remainders(len(rows[-1]) * of_label / of_label.sum())
    owners.append(np.repeat(np.arange(num_clients), sizes))
  if not rows:
    return Parts(np.zeros(0, int), np.zeros(num_clients, int))
  return Parts.by_owner(
    np.concatenate(owners), num_clients, np.concatenate(rows)
  )


def largest_remainders(exact: np.ndarray) -> np.ndarray:
  """Rounds to integers with the same sum, by the method of largest remainders.

  Each number is rounded down, and those with the largest fractions get one
  more.
  """
  sizes = np.floor(exact).astype(int)
  left = round(exact.sum()) - sizes.sum()
  sizes[np.argsort(sizes - exact, kind='stable')[:left]] += 1
  return sizes
