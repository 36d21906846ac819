"""Writes and reads, on the host, the messages whose bits codecs only count.

A run does not need these coders: codecs count bits and decode without a stream.
The counts are tested against them. Elias' messages are arrays of bits; those of
the range coder, from the package `constriction` (pip install
"fedftg_jax[codecs]"), are arrays of 32-bit words.
"""

from collections.abc import Iterator

from etils import epy
import numpy as np

from fedftg_jax.uplinks import entropy
from fedftg_jax.uplinks.lattices import Lattice

with epy.lazy_imports():
  import constriction

_LAST = entropy.LAST


def gamma_encode(values: np.ndarray) -> np.ndarray:
  """Writes integers (at least 1) in Elias' gamma code, as bits [B] uint8.

  Each is written as a number of zeros, one fewer than the binary number has
  digits, and then the binary number.
  """
  lengths = np.array([int(v).bit_length() for v in values])
  ends = np.cumsum(2 * lengths - 1)
  bits = np.zeros(ends[-1] if len(ends) else 0, np.uint8)
  for place in range(lengths.max(initial=0)):
    long = lengths > place
    bits[ends[long] - 1 - place] = (values[long] >> place) & 1
  return bits


def gamma_decode(bits: Iterator[int], num: int) -> np.ndarray:
  """Reads `num` integers in Elias' gamma code from `bits`."""
  values = np.empty(num, np.int64)
  for i in range(num):
    zeros = 0
    while not next(bits):
      zeros += 1
    value = 1
    for _ in range(zeros):
      value = 2 * value + next(bits)
    values[i] = value
  return values


def elias_encode(codes: np.ndarray, step: float, lattice: Lattice):
  """Writes a message without a table, as bits: the step, then the codes."""
  values = entropy.zigzag(entropy.reduced(codes, lattice))
  return np.concatenate(
    [_float_bits(step), gamma_encode(np.asarray(values).ravel())]
  )


def elias_decode(bits: np.ndarray, num_blocks: int, lattice: Lattice):
  """Reads the codes [num_blocks, n] and the step from `elias_encode`."""
  stream = iter(bits.tolist())
  step = _float_of(np.array([next(stream) for _ in range(32)], np.uint8))
  values = gamma_decode(stream, num_blocks * lattice.dim)
  units = _unzigzag(values).reshape(num_blocks, lattice.dim)
  codes = np.zeros(units.shape, np.int32)
  for j, modulus in enumerate(lattice.modulus):
    residue = np.asarray(lattice.residue(codes, j))
    codes[:, j] = modulus * units[:, j] + residue
  return codes, step


def range_encode(codes: np.ndarray, step: float, lattice: Lattice):
  """Writes a message of a range coder, as 32-bit words.

  It has the step, the tables, and the codes [M, n], axis by axis.
  """
  coder = constriction.stream.queue.RangeEncoder()
  counts = np.asarray(entropy.counts(codes, lattice))
  _put(coder, _float_bits(step), 2)
  _put(coder, np.concatenate([*map(_table_encode, counts)]), 2)
  entries, spare = map(np.asarray, entropy.bins(codes))
  for j, (modulus, table) in enumerate(zip(lattice.modulus, lattice.table)):
    known = np.asarray(lattice.residue(codes, j))
    for residue in range(modulus):
      rows = known == residue
      names, model = _model(counts[table], modulus, residue)
      if model is not None:
        symbols = np.searchsorted(names, entries[rows, j])
        coder.encode(symbols.astype(np.int32), model)
      within = np.abs(codes[rows, j]) % (1 << spare[rows, j]) // modulus
      for bits in np.unique(spare[rows, j]):
        some = within[spare[rows, j] == bits]
        _put(coder, some, (1 << bits) // modulus)
  return coder.get_compressed()


def range_decode(words: np.ndarray, num_blocks: int, lattice: Lattice):
  """Reads the codes [num_blocks, n] and the step from `range_encode`."""
  coder = constriction.stream.queue.RangeDecoder(words)
  step = _float_of(_take(coder, 32, 2).astype(np.uint8))
  bits = iter(lambda: int(_take(coder, 1, 2)[0]), None)
  counts = [_table_decode(bits) for _ in range(max(lattice.table) + 1)]
  codes = np.zeros((num_blocks, lattice.dim), np.int32)
  for j, (modulus, table) in enumerate(zip(lattice.modulus, lattice.table)):
    known = np.asarray(lattice.residue(codes, j))
    for residue in range(modulus):
      rows = np.flatnonzero(known == residue)
      names, model = _model(counts[table], modulus, residue)
      entries = np.full(len(rows), names[0] if len(names) else 0)
      if model is not None:
        entries = names[coder.decode(model, len(rows))]
      sign, first, spare = _codes_of(entries)
      for bits_ in np.unique(spare):
        some = spare == bits_
        size = (1 << bits_) // modulus
        within = modulus * _take(coder, some.sum(), size)
        if bits_:
          first[some] += within + sign[some] * residue % modulus
      codes[rows, j] = sign * first
  return codes, step


def sparse_encode(vector: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Writes a message of `top_k`, as 32-bit words.

  It has the mask of the entries that are sent, and their values in float32.
  """
  coder = constriction.stream.queue.RangeEncoder()
  frequency = constriction.stream.model.Bernoulli(mask.mean())
  coder.encode(mask.astype(np.int32), frequency)
  _put_words(coder, vector[mask].astype(np.float32).view(np.uint32))
  return coder.get_compressed()


def sparse_decode(words: np.ndarray, size: int, num: int) -> np.ndarray:
  """Reads the vector [size] with `num` entries from `sparse_encode`."""
  coder = constriction.stream.queue.RangeDecoder(words)
  frequency = constriction.stream.model.Bernoulli(num / size)
  mask = coder.decode(frequency, size).astype(bool)
  vector = np.zeros(size, np.float32)
  vector[mask] = _take_words(coder, num).view(np.float32)
  return vector


def levels_encode(codes: np.ndarray, ranges: np.ndarray, levels: int):
  """Writes a message of `rotated`, as 32-bit words.

  It has the ranges of the blocks [M, 2] and the codes [M, n], each below
  `levels`.
  """
  coder = constriction.stream.queue.RangeEncoder()
  _put_words(coder, ranges.astype(np.float32).ravel().view(np.uint32))
  _put(coder, codes.ravel(), levels)
  return coder.get_compressed()


def levels_decode(words: np.ndarray, shape: tuple[int, int], levels: int):
  """Reads codes of the given shape and ranges [M, 2] from `levels_encode`."""
  coder = constriction.stream.queue.RangeDecoder(words)
  ranges = _take_words(coder, 2 * shape[0]).view(np.float32)
  codes = _take(coder, shape[0] * shape[1], levels)
  return codes.reshape(shape), ranges.reshape(-1, 2)


def _table_encode(counts):
  """Writes a table's first entry, its length and its counts, as bits."""
  used = np.flatnonzero(counts)
  first, last = used[0], used[-1]
  start = int(entropy.zigzag(np.int32(first - _LAST)))
  return gamma_encode(
    np.array([start, last - first + 1, *(counts[first : last + 1] + 1)])
  )


def _table_decode(bits):
  start, num = gamma_decode(bits, 1), gamma_decode(bits, 1)[0]
  first = int(_unzigzag(start)[0]) + _LAST
  counts = np.zeros(2 * _LAST + 1, np.int64)
  counts[first : first + num] = gamma_decode(bits, num) - 1
  return counts


def _model(counts, modulus, residue):
  """Returns the entries that are possible given a residue, and their model.

  The model is None if there is only one possible entry.
  """
  weights = counts * entropy.allowed(modulus)[residue]
  places = np.flatnonzero(weights)
  if len(places) < 2:
    return places - _LAST, None
  model = constriction.stream.model.Categorical(
    weights[places].astype(np.float64), perfect=False
  )
  return places - _LAST, model


def _codes_of(entries):
  """Returns each entry's sign, the size of its first code, and its spare bits.

  The spare bits tell which of the entry's codes is meant.
  """
  size = np.abs(entries)
  wide = np.maximum(size - entropy.EXACT, 0)
  spare = wide // entropy.WITHIN + entropy.EXACT_BITS - entropy.WITHIN_BITS
  first = (entropy.WITHIN + wide % entropy.WITHIN) << spare
  alone = size < entropy.EXACT
  return (
    np.sign(entries),
    np.where(alone, size, first),
    np.where(alone, 0, spare),
  )


def _unzigzag(values):
  return np.where(values % 2, values // 2, -(values // 2))


def _float_bits(value):
  return np.unpackbits(np.array([value], '>f4').view(np.uint8))


def _float_of(bits):
  return np.packbits(bits).view('>f4')[0]


def _put(coder, values, size):
  """Writes integers below `size`, each in log2(size) bits."""
  if size > 1 and len(values):
    model = constriction.stream.model.Uniform(int(size))
    coder.encode(np.asarray(values, np.int32), model)


def _take(coder, num, size):
  if size < 2 or not num:
    return np.zeros(num, np.int32)
  return coder.decode(constriction.stream.model.Uniform(int(size)), int(num))


def _put_words(coder, words):
  for half in (words >> 16, words & 0xFFFF):
    _put(coder, half, 2**16)


def _take_words(coder, num):
  high, low = (_take(coder, num, 2**16).astype(np.uint32) for _ in range(2))
  return (high << 16) | low
