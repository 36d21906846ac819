"""Who holds which examples: lists of index arrays, one per client.

`dirichlet` is the scheme of the official FedDyn and FedFTG code, draw by draw
(NumPy's legacy generator, whose stream is frozen): class proportions are drawn
per CLIENT, client sizes and class totals are exact, and every example is used
once.
"""

import numpy as np

from fedftg_jax.data import arrays

MAX_REDRAWS = 10_000


def iid(labels: np.ndarray, num_clients: int, *, seed: int = 0,
        sigma: float = 0.) -> list[np.ndarray]:
  """Contiguous slices of a random permutation.

  Args:
    labels: [M]; only its length is used.
    num_clients: N.
    seed: of the partition.
    sigma: spread of the sizes, see `client_sizes`.

  Returns:
    N index arrays.
  """
  rng = np.random.RandomState(seed)
  order = rng.permutation(len(labels))
  sizes = client_sizes(rng, len(labels), num_clients, sigma)
  return np.split(order, np.cumsum(sizes)[:-1])


def dirichlet(
    labels: np.ndarray, num_clients: int, alpha: float, *, seed: int = 0,
    sigma: float = 0., max_redraws: int = MAX_REDRAWS) -> list[np.ndarray]:
  """Class proportions of every client drawn from Dirichlet(alpha).

  Until all clients are full: a client with room left is drawn uniformly, a
  class from the client's proportions, redrawn while that class is used up. The
  official code can redraw forever; here, after `max_redraws`, the class comes
  from what the redrawing converges to: the proportions renormalised over the
  classes that are left (uniform where they hold less than 1e-12 of the mass).
  Partitions that the official code can draw in reasonable time are the same.

  Args:
    labels: [M] integers in [0, C).
    num_clients: N.
    alpha: concentration; the smaller, the fewer classes a client has.
    seed: of the partition.
    sigma: spread of the sizes, see `client_sizes`.
    max_redraws: of one class draw.

  Returns:
    N index arrays, with sizes and class totals exact.

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
  cumulative = np.cumsum(priors, axis=1)
  pools = [order[labels[order] == c] for c in range(num_classes)]
  left = np.array([len(pool) for pool in pools])
  room = sizes.copy()
  parts = [np.empty(size, int) for size in sizes]
  while room.any():
    client = rng.randint(num_clients)
    if room[client] <= 0:
      continue
    room[client] -= 1
    label = _draw_class(rng, cumulative[client], left, max_redraws)
    if label is None:
      label = _draw_left(rng, priors[client], left)
    left[label] -= 1
    parts[client][room[client]] = pools[label][left[label]]
  return parts


def client_sizes(rng: np.random.RandomState, num_examples: int,
                 num_clients: int, sigma: float) -> np.ndarray:
  """Lognormal client sizes [N] that sum to `num_examples`.

  Args:
    rng: the generator; N lognormals are drawn, also with sigma 0.
    num_examples: M.
    num_clients: N, at most M.
    sigma: standard deviation of the logarithm of the sizes; 0 for equal ones.

  Raises:
    ValueError: for a value out of range.
  """
  if not 1 <= num_clients <= num_examples:
    raise ValueError(
        f'num_clients must be between 1 and the number of examples '
        f'({num_examples}), got {num_clients}.')
  if not sigma >= 0:
    raise ValueError(f'sigma must be at least 0, got {sigma}.')
  draws = rng.lognormal(
      np.log(num_examples // num_clients), sigma, num_clients)
  sizes = (draws / draws.sum() * num_examples).astype(int)
  residue = sizes.sum() - num_examples
  if residue:
    sizes[np.argmax(sizes > residue)] -= residue
  return sizes


def _draw_class(rng, cumulative, left, max_redraws):
  """First drawn class with examples left, or None after `max_redraws` redraws.

  Uniforms are drawn one by one at first, then in blocks; the generator ends
  where single draws would have left it.
  """
  for _ in range(8):
    label = np.argmax(rng.uniform() <= cumulative)
    if left[label] > 0:
      return label
  done, block = 8, 64
  while done <= max_redraws:
    block = min(block * 4, max_redraws + 1 - done)
    state = rng.get_state(legacy=False)
    classes = np.argmax(rng.uniform(size=block)[:, None] <= cumulative, axis=1)
    hits = np.flatnonzero(left[classes] > 0)
    if len(hits):
      rng.set_state(state)
      rng.uniform(size=hits[0] + 1)
      return classes[hits[0]]
    done += block
  return None


def _draw_left(rng, prior, left):
  """A class with examples left, with its share of `prior` among those."""
  mass = np.where(left > 0, prior, 0.)
  if mass.sum() < 1e-12:
    mass = (left > 0).astype(float)
  cumulative = np.cumsum(mass / mass.sum())
  # `cumulative` may end just below 1; the last class left is then meant.
  label = np.searchsorted(cumulative, rng.uniform(), side='right')
  return min(label, np.flatnonzero(left)[-1])


def save(path: str, parts: list[np.ndarray]) -> None:
  """Writes a partition as .npz, one array per client, for `load`."""
  with open(path, 'wb') as file:
    np.savez_compressed(
        file, **{f'client_{k:06d}': part for k, part in enumerate(parts)})


def load(path: str, num_examples: int) -> list[np.ndarray]:
  """Reads a partition: one index array per client, in the file's order.

  Raises:
    ValueError: for an unreadable file, or an index that is out of range or
      given to two clients.
  """
  parts = list(arrays.read(path).values())
  if not parts or any(
      p.ndim != 1 or not np.issubdtype(p.dtype, np.integer) for p in parts):
    raise ValueError(f'{path}: must hold one 1-D integer array per client')
  used = np.concatenate(parts)
  if not len(used) or used.min() < 0 or used.max() >= num_examples:
    raise ValueError(
        f'{path}: indices must lie between 0 and {num_examples - 1}')
  if len(np.unique(used)) < len(used):
    raise ValueError(f'{path}: an example is given to more than one client')
  return parts


def like(
    labels: np.ndarray, train_labels: np.ndarray, parts: list[np.ndarray]
) -> list[np.ndarray]:
  """Shares out other examples so that classes fall to clients as in `parts`.

  Client k gets floor(m_y n_k^y / n^y) of the m_y examples of class y, and the
  remainder goes to the largest fractions: every example of a class that some
  client has is shared out once.

  Args:
    labels: [m] of the examples to share out, such as a test set.
    train_labels: [M] of those that `parts` points into.
    parts: rows of each client.

  Returns:
    Rows into `labels` for each client; some may be empty.
  """
  shares = [[] for _ in parts]
  for label in np.unique(labels):
    rows = np.flatnonzero(labels == label)
    held = np.array([np.sum(train_labels[p] == label) for p in parts])
    if not held.sum():
      continue
    exact = len(rows) * held / held.sum()
    sizes = np.floor(exact).astype(int)
    largest = np.argsort(sizes - exact, kind='stable')
    sizes[largest[:len(rows) - sizes.sum()]] += 1
    for share, some in zip(shares, np.split(rows, np.cumsum(sizes)[:-1])):
      share.append(some)
  return [np.concatenate(s) if s else np.zeros(0, int) for s in shares]
