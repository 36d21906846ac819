"""Draws clients and classes by turns, in blocks of a generator's words.

`partition.dirichlet` draws a client and then a class for each example. One call
of NumPy for each draw is slow, and near the end nearly all clients that are
drawn are full. Here the words of the generator come in blocks, operations on
whole arrays pass over the full clients, and a loop in Python meets the others.
The draws are those of single calls, since the stream of
`numpy.random.RandomState` is frozen.
"""

import array
import bisect

import numpy as np

_BLOCK = 2**18  # words that are drawn at once
_WINDOW = 2**12  # words that are searched at once for clients with room
_SINGLE = 8  # uniforms of an example that are looked at one by one


class Stream:
  """The 32-bit words that a legacy generator draws next.

  `randint(n)` uses words until the low bits of one are below n, and no word if
  n is 1. `uniform()` uses two words.
  """

  def __init__(self, rng: np.random.RandomState):
    """Takes over the generator, which must not be used any more."""
    self._rng = rng
    self._words = np.zeros(0, np.uint32)

  def words(self, first: int, num: int) -> np.ndarray:
    """Returns the next words from number `first` to `first + num`."""
    lacking = first + num - len(self._words)
    if lacking > 0:
      size = max(lacking, _BLOCK)
      drawn = self._rng.randint(2**32, size=size, dtype=np.uint32)
      self._words = np.append(self._words, drawn)
    return self._words[first : first + num]

  def uniforms(self, first: int, num: int) -> np.ndarray:
    """Returns what `num` calls of `uniform` make of the words from `first`."""
    words = self.words(first, 2 * num)
    return _uniform(words[::2], words[1::2])

  def skip(self, num: int) -> None:
    """Leaves out the next `num` words."""
    self.words(num, 0)  # draws them
    self._words = self._words[num:]


def _uniform(first, second):
  """Makes numbers in [0, 1) of two words each, as `uniform` does."""
  return ((first >> 5) * 2.0**26 + (second >> 6)) / 2.0**53


def clients_and_classes(
  rng: np.random.RandomState,
  sizes: np.ndarray,
  priors: np.ndarray,
  totals: np.ndarray,
  max_redraws: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Draws a client and a class for every example, see `partition.dirichlet`.

  Args:
    rng: the generator, which must not be used any more.
    sizes: [N] examples of each client, with sum M.
    priors: [N, C] class proportions of each client.
    totals: [C] examples of each class, with sum M.
    max_redraws: largest number of redraws of one class.

  Returns:
    The clients [M] and the classes [M], in the order of the draws.
  """
  num_clients, num_classes = priors.shape
  cumulative = np.cumsum(priors, axis=1)
  bounds = array.array('d', cumulative.tobytes())
  mask = 2 ** (num_clients - 1).bit_length() - 1
  first_uniform = 1 if num_clients > 1 else 0  # words after the client's place
  has_room = np.zeros(mask + 1, bool)
  has_room[:num_clients] = sizes > 0
  still_has_room = has_room.data  # numbers go in faster than by NumPy
  room, left, num_left = sizes.tolist(), totals.tolist(), int(sizes.sum())
  clients, labels = array.array('i'), array.array('i')
  single = min(_SINGLE, max_redraws + 1)
  stream = Stream(rng)
  while num_left:
    words = stream.words(0, _WINDOW + 1 + 2 * _SINGLE)
    drawn = words[:_WINDOW] & mask
    places = np.flatnonzero(has_room[drawn]).tolist()
    at = 0  # the first word that is not used yet
    if places:
      client_at = drawn.data
      uniform_at = _uniform(words[:-1], words[1:]).data
    for place in places:
      if place < at or not room[client := client_at[place]]:
        continue
      at = place + first_uniform
      begin = client * num_classes
      for _ in range(single):
        label = bisect.bisect_left(
          bounds, uniform_at[at], begin, begin + num_classes
        )
        label = (label - begin) % num_classes  # above all bounds: class 0
        at += 2
        if left[label]:
          break
      else:
        label, at = _redraw(
          stream,
          at,
          priors[client],
          cumulative[client],
          np.array(left),
          max_redraws + 1 - single,
        )
      clients.append(client)
      labels.append(label)
      left[label] -= 1
      room[client] -= 1
      num_left -= 1
      if not room[client]:
        still_has_room[client] = False
      if at >= _WINDOW:
        break
    stream.skip(max(at, _WINDOW))
  return np.frombuffer(clients, np.int32), np.frombuffer(labels, np.int32)


def _redraw(stream, at, prior, cumulative, left, num):
  """Draws classes until one has examples left, at most `num`.

  If none has, the class is drawn from `prior`, renormalised over the classes
  that are left, or uniformly if these have less than 1e-12 of the mass.

  Args:
    stream: the words.
    at: number of the word to begin with.
    prior: [C] proportions.
    cumulative: [C] their cumulative sums.
    left: [C] examples of each class.
    num: largest number of draws.

  Returns:
    The class, and the number of the first word that was not used.
  """
  # Class j is drawn by a uniform above edge j and up to edge j + 1. What is
  # above all sums draws class 0, as `argmax` has it.
  edges = np.concatenate([[-1.0], cumulative, [2.0]])
  open_ = (np.append(left, left[0]) > 0) & (edges[1:] > edges[:-1])
  wanted = np.flatnonzero(open_)
  end, size = at + 2 * num, 64
  while at < end and len(wanted):
    size = min(4 * size, (end - at) // 2)
    uniforms = stream.uniforms(at, size)
    hits = np.zeros(size, bool)
    for j in wanted:
      hits |= (uniforms > edges[j]) & (uniforms <= edges[j + 1])
    if hits.any():
      hit = int(hits.argmax())
      label = np.searchsorted(cumulative, uniforms[hit]) % len(left)
      return int(label), at + 2 * hit + 2
    at += 2 * size
  mass = np.where(left > 0, prior, 0.0)
  if mass.sum() < 1e-12:
    mass = (left > 0).astype(float)
  sums = np.cumsum(mass / mass.sum())
  label = np.searchsorted(sums, stream.uniforms(end, 1)[0], side='right')
  # `sums` may end just below 1; then it is the last class left.
  return int(min(label, np.flatnonzero(left)[-1])), end + 2
