"""Tests of partitions by their properties, and of skew measures by hand."""

import functools
import heapq
import os
import time

from absl.testing import absltest, parameterized
import hypothesis
from hypothesis import strategies as st
import numpy as np

from fedftg_jax.data import draws, partition, skew


def slow_dirichlet(labels, num, alpha, *, seed, sigma, max_redraws):
  """Draws as `partition.dirichlet`, one number at a time."""
  num_classes, rng = labels.max() + 1, np.random.RandomState(seed)
  order = rng.permutation(len(labels))
  room = partition.client_sizes(rng, len(labels), num, sigma)
  priors = rng.dirichlet([alpha] * num_classes, size=num)
  priors[~np.isfinite(priors).all(axis=1)] = 1 / num_classes
  pools = [[i for i in order if labels[i] == c] for c in range(num_classes)]
  parts, cumulative = [[] for _ in range(num)], np.cumsum(priors, axis=1)
  while room.any():
    client = rng.randint(num)
    if not room[client]:
      continue
    room[client] -= 1
    for _ in range(max_redraws + 1):
      label = np.argmax(rng.uniform() <= cumulative[client])
      if pools[label]:
        break
    else:
      mass = [m * bool(pool) for m, pool in zip(priors[client], pools)]
      mass = mass if sum(mass) >= 1e-12 else [float(bool(p)) for p in pools]
      below = np.cumsum(np.array(mass) / np.sum(mass)) <= rng.uniform()
      label = min(below.sum(), max(c for c, p in enumerate(pools) if p))
    parts[client].insert(0, pools[label].pop())
  return parts


def slow_dirichlet_class(labels, num, alpha, *, seed, min_size, niid_bench):
  """Draws as `partition.dirichlet_class`, client by client."""
  even = len(labels) / num
  rng = np.random.RandomState(seed)
  for _ in range(1000 if niid_bench else 1):
    order, parts = np.arange(len(labels)), [[] for _ in range(num)]
    if not niid_bench:
      order = rng.permutation(order)
    for c in np.unique(labels):
      rows = np.array([i for i in order if labels[i] == c])
      if niid_bench:
        rng.shuffle(rows)
      share = rng.dirichlet([alpha] * num)
      if niid_bench:
        share *= [len(part) < even for part in parts]
        share /= share.sum()
      cuts = np.cumsum(share)[:-1] * len(rows)
      cuts = np.floor(cuts) if niid_bench else np.rint(cuts)
      for part, piece in zip(parts, np.split(rows, cuts.astype(int))):
        part.extend(piece.tolist())
    if min(map(len, parts)) >= min_size:
      break
  parts = [rng.permutation(np.array(part, int)).tolist() for part in parts]
  largest = [(-len(part), k) for k, part in enumerate(parts)]
  heapq.heapify(largest)
  for part in parts:
    while len(part) < min_size:
      _, donor = heapq.heappop(largest)
      part.append(parts[donor].pop())
      heapq.heappush(largest, (-len(parts[donor]), donor))
  return parts


def slow_classes(labels, num, per_client, *, seed, niid_bench):
  """Draws as `partition.classes`, client by client."""
  present, sizes = np.unique(labels, return_counts=True)
  rng, num_classes = np.random.RandomState(seed), len(present)
  owned = np.zeros((num, num_classes), bool)
  if niid_bench:
    for client, row in enumerate(owned):
      own = {client % num_classes}
      while len(own) < per_client:
        own.add(rng.randint(0, num_classes))
      row[[*own]] = True
  else:
    owners = partition._num_owners(sizes, num, per_client)
    client = np.arange(num * per_client) % num
    label = np.repeat(np.arange(num_classes), owners)
    owned[client, label] = True
    client, label = np.nonzero(owned)
    for i, j in rng.randint(len(client), size=(10 * len(client), 2)):
      a, b, c, d = client[i], client[j], label[i], label[j]
      if not (owned[a, d] or owned[b, c]):
        owned[a, c] = owned[b, d] = False
        owned[a, d] = owned[b, c] = True
        label[i], label[j] = d, c
  order, parts = np.arange(len(labels)), [[] for _ in range(num)]
  if not niid_bench:
    order = rng.permutation(order)
  for c, has in zip(present, owned.T):
    clients = np.flatnonzero(has)
    rows = np.array([i for i in order if labels[i] == c])
    if niid_bench:
      rng.shuffle(rows)
    else:
      clients = rng.permutation(clients)
    for client, some in zip(clients, np.array_split(rows, len(clients))):
      parts[client].extend(some.tolist())
  return parts


# What Flower's baseline niid_bench (at commit d86024f, which published its
# table) gives for ten classes of 6,000 images, ten clients and seed 42.
_TWO_CLASSES = [
  [0, 6],
  [1, 3],
  [2, 7],
  [3, 4],
  [4, 6],
  [5, 9],
  [2, 6],
  [6, 7],
  [7, 8],
  [4, 9],
]
_DIRICHLET = [
  [322, 12, 2992, 20, 1370, 1461, 0, 0, 0, 0],
  [128, 27, 737, 572, 23, 553, 936, 2, 1942, 3164],
  [241, 2510, 13, 1095, 292, 1796, 282, 0, 0, 0],
  [2752, 793, 765, 187, 1743, 0, 0, 0, 0, 0],
  [1053, 264, 677, 225, 643, 88, 1074, 226, 469, 1748],
  [612, 203, 38, 1898, 275, 249, 441, 766, 1392, 6],
  [4, 1076, 311, 25, 8, 322, 1887, 1015, 1532, 0],
  [758, 436, 258, 1718, 15, 1495, 1259, 1187, 0, 0],
  [96, 578, 115, 108, 1578, 19, 1, 361, 53, 1001],
  [34, 101, 94, 152, 53, 17, 120, 2443, 612, 81],
]

# What PFLlib (at commit d832e76) gives for Fashion-MNIST with its test set, 20
# clients and Dirichlet(0.1); its script seeds NumPy by 1.
_PFLLIB = [
  [67, 1, 0, 0, 0, 0, 2, 0, 5, 7],
  [0, 157, 0, 19, 0, 0, 35, 15, 0, 94],
  [14, 0, 0, 0, 0, 29, 0, 318, 514, 0],
  [0, 0, 2498, 69, 3, 0, 3, 0, 0, 30],
  [1, 0, 680, 662, 0, 2, 8, 0, 0, 102],
  [5473, 0, 0, 0, 0, 0, 0, 0, 0, 0],
  [298, 0, 20, 0, 9, 4058, 0, 0, 0, 0],
  [285, 23, 7, 2024, 0, 170, 1952, 0, 0, 0],
  [5, 236, 429, 381, 0, 0, 4509, 0, 0, 0],
  [0, 0, 11, 2269, 5, 369, 0, 439, 463, 0],
  [44, 1324, 8, 0, 1, 0, 0, 940, 3853, 0],
  [268, 1, 0, 221, 6313, 0, 0, 0, 0, 0],
  [13, 1, 781, 135, 0, 66, 106, 684, 0, 6765],
  [0, 1, 148, 6, 0, 244, 220, 4, 2, 1],
  [10, 0, 215, 915, 0, 0, 0, 188, 0, 0],
  [46, 4, 5, 4, 0, 0, 120, 0, 16, 0],
  [1, 0, 322, 21, 191, 0, 6, 249, 2147, 0],
  [71, 4761, 0, 0, 0, 0, 0, 0, 0, 0],
  [403, 0, 0, 7, 477, 2, 38, 4163, 0, 0],
  [1, 491, 1876, 267, 1, 2060, 1, 0, 0, 1],
]


class PlainLoopTest(parameterized.TestCase):
  """Partitions are those of plain loops that draw one number at a time."""

  def assert_same(self, parts, loops):
    self.assertEqual([part.tolist() for part in parts], [*map(list, loops)])

  @parameterized.product(
    num_clients=(1, 2, 33), alpha=(0.003, 0.3, 50.0), window=(5, 4096)
  )
  def test_dirichlet(self, num_clients, alpha, window):
    """Also in short blocks, with unequal classes and sizes."""
    settings = (0.0, 900), (1.0, 60), (0.5, 7), (0.5, 2), (0.0, 0)
    for seed, (sigma, most) in enumerate(settings):
      labels = np.random.RandomState(seed).choice(4, 80, p=[0.7, 0.2, 0, 0.1])
      with (
        absltest.mock.patch.object(draws, '_WINDOW', window),
        absltest.mock.patch.object(draws, '_BLOCK', 10 * window),
      ):
        settings = dict(seed=seed, sigma=sigma, max_redraws=most)
        parts = partition.dirichlet(labels, num_clients, alpha, **settings)
      loops = slow_dirichlet(labels, num_clients, alpha, **settings)
      self.assert_same(parts, loops)

  @parameterized.product(
    num_clients=(1, 3, 20), min_size=(0, 1, 7), niid_bench=(False, True)
  )
  def test_dirichlet_class(self, num_clients, min_size, niid_bench):
    for seed, alpha in enumerate((0.2, 2.0)):
      labels = 2 * np.random.RandomState(seed).choice(4, 160)
      settings = dict(seed=seed, min_size=min_size, niid_bench=niid_bench)
      parts = partition.dirichlet_class(labels, num_clients, alpha, **settings)
      self.assert_same(
        parts, slow_dirichlet_class(labels, num_clients, alpha, **settings)
      )

  @parameterized.product(
    num_clients=(5, 21), per_client=(1, 2, 4), niid_bench=(False, True)
  )
  def test_classes(self, num_clients, per_client, niid_bench):
    for seed in range(2):
      labels = 2 * np.random.RandomState(seed).choice(4, 200)
      settings = dict(seed=seed, niid_bench=niid_bench)
      parts = partition.classes(labels, num_clients, per_client, **settings)
      loops = slow_classes(labels, num_clients, per_client, **settings)
      self.assert_same(parts, loops)

  @parameterized.parameters(1, 2, 5)
  def test_shards(self, per_client):
    labels, rng = np.arange(83) % 3, np.random.RandomState(4)
    parts = partition.shards(labels, 7, per_client, seed=4)
    order = rng.permutation(83)
    order = order[np.argsort(labels[order], kind='stable')]
    cut = np.array_split(order, 7 * per_client)
    dealt = rng.permutation(7 * per_client).reshape(7, per_client)
    self.assert_same(
      parts, [np.concatenate([cut[i] for i in own]) for own in dealt]
    )


class PartitionTest(parameterized.TestCase):
  @hypothesis.settings(deadline=None, max_examples=60)
  @hypothesis.given(
    st.floats(-2, 2).map(lambda e: 10**e),
    st.integers(1, 12),
    st.integers(1, 6),
    st.integers(0, 150),
    st.floats(0, 1),
    st.integers(0, 2**31 - 1),
  )
  def test_dirichlet(self, alpha, num_clients, num_classes, extra, sigma, seed):
    """Every example is used once, sizes and class totals are exact, for any
    alpha."""
    num = num_clients + extra
    labels = np.random.RandomState(seed).randint(num_classes, size=num)
    parts = partition.dirichlet(
      labels, num_clients, alpha, seed=seed, sigma=sigma
    )
    rng = np.random.RandomState(seed)
    rng.permutation(num)
    sizes = partition.client_sizes(rng, num, num_clients, sigma)
    np.testing.assert_array_equal([len(p) for p in parts], sizes)
    np.testing.assert_array_equal(
      np.sort(np.concatenate(parts)), np.arange(num)
    )

  def test_small_alpha_ends(self):
    """Uses a setting in which the official loop did not end."""
    labels = np.repeat(np.arange(10), 400)
    parts = partition.dirichlet(labels, 20, 0.05)
    self.assertEqual(sum(map(len, parts)), 4000)
    biggest = [np.bincount(labels[p]).max() / len(p) for p in parts]
    self.assertGreater(np.mean(biggest), 0.5)  # few classes a client

  def test_alpha_decides_the_skew(self):
    labels = np.repeat(np.arange(10), 400)
    skew = [
      np.mean(
        [
          np.bincount(labels[p]).max() / len(p)
          for p in partition.dirichlet(labels, 20, alpha)
        ]
      )
      for alpha in (0.05, 0.3, 100.0)
    ]
    self.assertGreater(skew[0], skew[1] + 0.1)
    self.assertGreater(skew[1], skew[2] + 0.1)
    self.assertLess(skew[2], 0.2)

  def test_iid(self):
    labels = np.arange(103) % 5
    parts = partition.iid(labels, 4, seed=1)
    np.testing.assert_array_equal(
      np.sort(np.concatenate(parts)), np.arange(103)
    )
    self.assertLessEqual(max(map(len, parts)) - min(map(len, parts)), 3)

  def test_like_another_partition(self):
    """Every test example is used once, and classes go where they are in
    training."""
    train = np.repeat(np.arange(4), 30)
    test = np.repeat(np.arange(5), 7)  # no client trains on class 4
    parts = partition.dirichlet(train, 6, 0.3)
    shares = partition.like(test, train, parts)
    np.testing.assert_array_equal(
      np.sort(np.concatenate(shares)), np.flatnonzero(test < 4)
    )
    for part, share in zip(parts, shares):
      held = np.bincount(train[part], minlength=4) / 30 * 7
      got = np.bincount(test[share], minlength=4)
      self.assertLess(np.abs(got - held).max(), 1)

  def test_saved_partition_is_replayed(self):
    path = os.path.join(self.create_tempdir().full_path, 'p.npz')
    parts = partition.dirichlet(np.arange(50) % 5, 12, 0.1)
    partition.save(path, parts)
    for a, b in zip(parts, partition.load(path, 50)):
      np.testing.assert_array_equal(a, b)

  @parameterized.parameters(
    (dict(a=np.arange(3), b=np.array([2])), 'more than one client'),
    (dict(a=np.arange(51)), 'between 0 and 49'),
    (dict(a=np.array([-1])), 'between 0 and 49'),
    (dict(a=np.zeros(3)), 'integer array per client'),
    ({}, 'integer array per client'),
  )
  def test_unfit_partition_files(self, arrays, message):
    path = os.path.join(self.create_tempdir().full_path, 'p.npz')
    np.savez(path, **arrays)
    with self.assertRaisesRegex(ValueError, message):
      partition.load(path, 50)

  @parameterized.parameters(
    (dict(alpha=0.0), 'alpha must be above 0, got 0'),
    (dict(num_clients=51), r'number of examples \(50\), got 51'),
    (dict(sigma=-1.0), 'sigma must be at least 0'),
  )
  def test_errors(self, changes, message):
    settings = {'num_clients': 5, 'alpha': 1.0, **changes}
    with self.assertRaisesRegex(ValueError, message):
      partition.dirichlet(np.arange(50) % 5, **settings)


class SchemesTest(parameterized.TestCase):
  """The schemes other than the official one."""

  def assert_whole(self, parts, labels, num_clients):
    """Checks that every example is used once, which implies class totals."""
    self.assertLen(parts, num_clients)
    np.testing.assert_array_equal(
      np.sort(np.concatenate(parts)), np.arange(len(labels))
    )

  @hypothesis.settings(deadline=None, max_examples=60)
  @hypothesis.given(
    st.floats(-4, 2).map(lambda e: 10**e),
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(0, 5),
    st.integers(0, 60),
    st.integers(0, 2**31 - 1),
  )
  def test_dirichlet_class(
    self, alpha, num_clients, num_classes, min_size, extra, seed
  ):
    labels = np.random.RandomState(seed).randint(
      num_classes, size=num_clients * max(min_size, 1) + extra
    )
    draw = functools.partial(
      partition.dirichlet_class, labels, num_clients, alpha, min_size=min_size
    )
    parts = draw(seed=seed)
    self.assert_whole(parts, labels, num_clients)
    self.assertGreaterEqual(min(map(len, parts)), min_size)
    for a, b in zip(parts, draw(seed=seed)):
      np.testing.assert_array_equal(a, b)

  def test_dirichlet_class_follows_its_draws(self):
    """Within a class, shares have mean 1 / N and variance (N - 1) / (N^2 (N a +
    1)).
    """
    labels, num = np.repeat(np.arange(200), 100), 5
    for alpha in (0.1, 0.5, 5.0):
      counts = skew.class_counts(
        labels, partition.dirichlet_class(labels, num, alpha, min_size=0), 200
      )
      exact = (num - 1) / num**2 / (num * alpha + 1)
      self.assertAlmostEqual(counts.var() / 100**2 / exact, 1, delta=0.08)
    # Cuts are rounded to the nearest integer, so no position is favoured.
    even = partition.dirichlet_class(labels, num, 1000.0)
    np.testing.assert_allclose([*map(len, even)], 4000, atol=60)

  def test_dirichlet_class_as_niid_bench_draws(self):
    """A client that held its even share before gets none of a class.

    The last client gets an example that rounding down leaves.
    """
    labels = np.random.RandomState(0).permutation(np.repeat(np.arange(10), 70))
    for seed in range(20):
      parts = partition.dirichlet_class(
        labels, 7, 0.3, min_size=10, niid_bench=True, seed=seed
      )
      self.assert_whole(parts, labels, 7)
      self.assertGreaterEqual(min(map(len, parts)), 10)
      counts = skew.class_counts(labels, parts, 10)
      self.assert_none_above(100, counts)

  def assert_none_above(self, share, counts):
    before = np.cumsum(counts, axis=1) - counts
    late = np.where(before >= share, counts, 0)
    self.assertEqual(late[:-1].sum(), 0)
    self.assertLessEqual(late[-1].max(), 1)

  def test_dirichlet_class_is_drawn_again_before_examples_move(self):
    labels = np.repeat(np.arange(10), 70)
    draw = functools.partial(
      partition.dirichlet_class, labels, 7, 0.1, niid_bench=True, seed=11
    )
    counts = skew.class_counts(labels, draw(min_size=40), 10)
    self.assert_none_above(100, counts)  # nothing was moved
    self.assertLess(min(map(len, draw(min_size=0))), 40)
    moved = draw(min_size=100, max_redraws=1)  # an even share: cannot be drawn
    self.assertEqual({len(part) for part in moved}, {100})

  def test_one_client_draws_alone(self):
    (part,) = partition.dirichlet_class(
      np.repeat([0, 1], 5), 1, 0.1, niid_bench=True
    )
    self.assertLen(part, 10)

  def test_classes_as_niid_bench_draws(self):
    labels = np.repeat(np.arange(5), 60)
    owners = []
    for seed in range(30):
      parts = partition.classes(labels, 12, 2, niid_bench=True, seed=seed)
      self.assert_whole(parts, labels, 12)
      has = skew.class_counts(labels, parts, 5) > 0
      np.testing.assert_array_equal(has.sum(axis=1), 2)
      self.assertTrue(has[np.arange(12), np.arange(12) % 5].all())
      owners.append(has.sum(axis=0))
    # Each of 12 clients has one class for sure, another with probability 1 / 4.
    want = np.bincount(np.arange(12) % 5)
    want = want + (12 - want) / 4
    np.testing.assert_allclose(np.mean(owners, axis=0), want, atol=0.7)
    self.assertGreater(np.max(owners), 6)

  def test_class_counts_of_flowers_baseline(self):
    """The class counts of its two partitions, which are of seed 42."""
    labels = np.repeat(np.arange(10), 6000)
    parts = partition.classes(labels, 10, 2, niid_bench=True, seed=42)
    counts = skew.class_counts(labels, parts, 10)
    self.assertEqual(
      [np.flatnonzero(row).tolist() for row in counts], _TWO_CLASSES
    )
    shares = np.where(counts > 0, 6000 // (counts > 0).sum(axis=0), 0)
    np.testing.assert_array_equal(counts, shares)
    parts = partition.dirichlet_class(
      labels, 10, 0.5, min_size=10, niid_bench=True, seed=42
    )
    np.testing.assert_array_equal(
      skew.class_counts(labels, parts, 10), _DIRICHLET
    )

  def test_class_counts_of_pfllib(self):
    labels = np.tile(np.arange(10), 7000)
    parts = partition.dirichlet_class(
      labels, 20, 0.1, min_size=40, niid_bench=True, seed=1
    )
    np.testing.assert_array_equal(skew.class_counts(labels, parts, 10), _PFLLIB)

  def test_only_who_lacks_examples_gets_some(self):
    """Apart from the moved examples, the partition is the one that was
    drawn."""
    labels = np.repeat(np.arange(10), 40)
    free, filled = (
      partition.dirichlet_class(labels, 50, 0.1, min_size=size)
      for size in (0, 4)
    )
    sizes = np.array([*map(len, free)])
    self.assertLess(sizes.min(), 4)
    moved = np.maximum(4 - sizes, 0).sum()
    kept = sum(len(np.intersect1d(a, b)) for a, b in zip(free, filled))
    self.assertEqual(kept, 400 - moved)
    grown = np.array([*map(len, filled)])
    np.testing.assert_array_equal(grown[sizes < 4], 4)
    # Examples come from the largest clients, whose final sizes differ by at
    # most one.
    gave = grown[grown < sizes]
    self.assertLessEqual(gave.max() - gave.min(), 1)
    self.assertLessEqual(sizes[(grown == sizes)].max(), gave.max())

  @hypothesis.settings(deadline=None, max_examples=60)
  @hypothesis.given(
    st.integers(1, 30),
    st.integers(1, 5),
    st.integers(0, 90),
    st.integers(1, 7),
    st.integers(0, 2**31 - 1),
  )
  def test_shards(self, num_clients, per_client, extra, num_classes, seed):
    num = num_clients * per_client + extra
    labels = np.random.RandomState(seed).randint(num_classes, size=num)
    parts = partition.shards(labels, num_clients, per_client, seed=seed)
    self.assert_whole(parts, labels, num_clients)
    size = num / (num_clients * per_client)
    for part in parts:
      self.assertBetween(
        len(part), per_client * (size // 1), per_client * -(-size // 1)
      )

  def test_shards_of_one_class_each(self):
    """McMahan's setting on a smaller scale: 100 clients, 2 shards of 30
    each."""
    labels = np.random.RandomState(0).permutation(np.repeat(np.arange(10), 600))
    counts = skew.class_counts(labels, partition.shards(labels, 100), 10)
    self.assertEqual(set(counts.ravel()), {0, 30, 60})
    has = (counts > 0).sum(1)
    self.assertEqual(set(has), {1, 2})
    self.assertGreater((has == 2).mean(), 0.75)  # 0.9 expected

  @hypothesis.settings(deadline=None, max_examples=60)
  @hypothesis.given(st.data())
  def test_classes(self, data):
    num_classes = data.draw(st.integers(1, 8))
    per_client = data.draw(st.integers(1, num_classes))
    num_clients = data.draw(st.integers(-(-num_classes // per_client), 25))
    sizes = data.draw(
      st.lists(
        st.integers(num_clients, 3 * num_clients),
        min_size=num_classes,
        max_size=num_classes,
      )
    )
    labels = 2 * np.repeat(np.arange(num_classes), sizes)  # odd ones are absent
    seed = data.draw(st.integers(0, 2**31 - 1))
    parts = partition.classes(labels, num_clients, per_client, seed=seed)
    self.assert_whole(parts, labels, num_clients)
    counts = skew.class_counts(labels, parts, 2 * num_classes)[:, ::2]
    np.testing.assert_array_equal((counts > 0).sum(1), per_client)
    for own in counts.T:  # equal shares
      self.assertLessEqual(own.max() - own[own > 0].min(), 1)
    owners = (counts > 0).sum(0)
    self.assertGreaterEqual(owners.min(), 1)
    # Moving a client to another class cannot reduce the largest share.
    fullest = np.argmax(sizes / owners)
    for c, size in enumerate(sizes):
      if owners[c] > 1 and owners[fullest] < num_clients:
        self.assertGreaterEqual(
          size / (owners[c] - 1) + 1e-9, sizes[fullest] / owners[fullest]
        )

  def test_classes_of_equal_size(self):
    labels = np.repeat(np.arange(10), 40)
    counts = skew.class_counts(labels, partition.classes(labels, 20, 2), 10)
    self.assertEqual(set(counts.ravel()), {0, 10})
    # The assignment of classes is random: all 45 pairs occur, about equally
    # often.
    pairs = np.zeros((10, 10))
    for seed in range(150):
      has = (
        skew.class_counts(
          labels, partition.classes(labels, 20, 2, seed=seed), 10
        )
        > 0
      )
      pairs += has.T.astype(int) @ has
    pairs = pairs[np.triu_indices(10, 1)]
    self.assertEqual(pairs.sum(), 150 * 20)
    self.assertGreater(pairs.min(), 35)  # 66.7 expected, 8 the deviation
    self.assertLess(pairs.max(), 105)

  @hypothesis.settings(deadline=None, max_examples=60)
  @hypothesis.given(
    st.integers(1, 40),
    st.integers(0, 4),
    st.integers(0, 200),
    st.floats(0, 3),
    st.floats(0, 5),
    st.integers(0, 2**31 - 1),
  )
  def test_quantity(self, num_clients, min_size, extra, sigma, power, seed):
    labels = np.zeros(num_clients * max(min_size, 1) + extra, int)
    parts = partition.quantity(
      labels,
      num_clients,
      sigma=sigma,
      power=power,
      min_size=min_size,
      seed=seed,
    )
    self.assert_whole(parts, labels, num_clients)
    self.assertGreaterEqual(min(map(len, parts)), min_size)

  def test_quantity_follows_its_law(self):
    labels = np.zeros(100_000, int)
    sizes = np.sort(
      [*map(len, partition.quantity(labels, 50, power=1.5, min_size=0))]
    )[::-1]
    exact = np.arange(1, 51) ** -1.5
    np.testing.assert_allclose(sizes, 100_000 * exact / exact.sum(), atol=1)
    log = np.log([*map(len, partition.quantity(labels, 2000, sigma=0.5))])
    self.assertAlmostEqual(log.std(), 0.5, delta=0.03)
    np.testing.assert_array_equal(
      [*map(len, partition.quantity(labels, 10))], 10_000
    )

  def test_natural(self):
    parts = partition.natural(np.array([2, 0, 2, 0, 4]), 5)
    self.assertEqual([list(p) for p in parts], [[1, 3], [], [0, 2], [], [4]])
    with self.assertRaisesRegex(ValueError, 'do not name.*train_client_id'):
      partition.natural(None, 5)

  @parameterized.parameters('dirichlet_class', 'shards', 'classes', 'quantity')
  def test_seeds(self, name):
    labels = np.repeat(np.arange(10), 40)
    options = {'dirichlet_class': {'alpha': 0.3}, 'quantity': {'power': 1}}
    draw = functools.partial(
      getattr(partition, name), labels, 20, **options.get(name, {})
    )
    for a, b in zip(draw(seed=3), draw(seed=3)):
      np.testing.assert_array_equal(a, b)
    self.assertNotEqual(
      [sorted(p) for p in draw(seed=3)], [sorted(p) for p in draw(seed=4)]
    )

  @parameterized.parameters(
    ('dirichlet', dict(alpha=0.01)),
    ('dirichlet_class', dict(alpha=0.01, min_size=10)),
    ('dirichlet_class', dict(alpha=1e-9, min_size=15)),
    ('shards', dict(shards_per_client=15)),
    ('classes', dict(classes_per_client=9)),
    ('classes', dict(niid_bench=True)),
    ('quantity', dict(power=3.0, min_size=1)),
  )
  def test_many_clients_end_soon(self, name, options):
    """Client 0 of `dirichlet` has all that is left over, 2,000 examples."""
    labels = np.random.RandomState(0).randint(10, size=62_000)
    start = time.process_time()
    parts = getattr(partition, name)(labels, 4000, **options)
    self.assertLess(time.process_time() - start, 10)
    self.assert_whole(parts, labels, 4000)
    self.assertGreaterEqual(min(map(len, parts)), options.get('min_size', 0))

  @parameterized.parameters(
    ('dirichlet_class', dict(alpha=0.0), 'alpha must be above 0, got 0'),
    (
      'dirichlet_class',
      dict(alpha=1.0, min_size=11),
      'min_size must be between 0 and 10, .* 50 .* 5 clients, got 11',
    ),
    ('quantity', dict(min_size=-1), 'min_size must be between 0 and 10'),
    ('quantity', dict(power=-1.0), 'power must be at least 0, got -1'),
    ('quantity', dict(num_clients=51), r'number of examples \(50\), got 51'),
    ('shards', dict(shards_per_client=0), 'at least 1, and at most 10 .*got 0'),
    ('shards', dict(shards_per_client=11), 'at most 10 for 50 examples on 5'),
    (
      'classes',
      dict(classes_per_client=6),
      r'between 1 and the number of classes \(5\), got 6',
    ),
    (
      'classes',
      dict(num_clients=4, niid_bench=True),
      'num_clients must be at least the number of classes .5. .* got 4',
    ),
    (
      'classes',
      dict(num_clients=2, classes_per_client=2),
      r'at least the number of classes \(5\), .*got 4',
    ),
    (
      'classes',
      dict(num_clients=20, classes_per_client=3),
      'classes_per_client must be at most 2 for 20 clients.*got 3',
    ),
  )
  def test_errors(self, name, changes, message):
    settings = {'num_clients': 5, **changes}
    with self.assertRaisesRegex(ValueError, message):
      getattr(partition, name)(np.arange(50) % 5, **settings)


class SkewTest(absltest.TestCase):
  def test_by_hand(self):
    counts = np.array([[4, 0], [1, 1], [0, 2], [0, 0]])
    # All clients together have shares of 5/8 and 3/8.
    np.testing.assert_allclose(
      skew.total_variation(counts), [3 / 8, 1 / 8, 5 / 8, np.nan]
    )
    np.testing.assert_allclose(
      skew.effective_classes(counts), [1, 2, 1, np.nan]
    )
    # Half of the mean absolute difference over the mean, of 4, 2, 2, 0.
    self.assertAlmostEqual(
      skew.gini(counts.sum(1)), (2 + 2 + 4 + 0 + 2 + 2) * 2 / 16 / 2 / 2
    )
    self.assertEqual(
      skew.measures(counts),
      {
        'num_clients': 4,
        'num_without_examples': 1,
        'num_examples': 8,
        'size_min': 0,
        'size_median': 2.0,
        'size_max': 4,
        'size_gini': skew.gini(counts.sum(1)),
        'total_variation_mean': 3 / 8,
        'effective_classes_mean': 4 / 3,
        'effective_classes_min': 1.0,
        'effective_classes_max': 2.0,
      },
    )

  def test_ends_of_the_scales(self):
    even, alone = np.full(5, 7), np.array([0, 0, 0, 0, 7])
    self.assertAlmostEqual(skew.gini(even), 0)
    self.assertAlmostEqual(skew.gini(alone), 4 / 5)
    same = np.tile([3, 1, 2], (4, 1))
    np.testing.assert_allclose(skew.total_variation(same), 0)
    apart = np.eye(50, dtype=int)
    np.testing.assert_allclose(skew.total_variation(apart), 0.98)
    np.testing.assert_allclose(skew.effective_classes(apart), 1)
    weights = np.array([[0.5, 0.25, 0.25]]) * 8  # entropy 1.5 bits
    np.testing.assert_allclose(skew.effective_classes(weights), 2**1.5)

  def test_class_counts(self):
    counts = skew.class_counts(
      np.array([0, 2, 2, 1]), [np.array([1, 2]), np.array([], int)], 4
    )
    np.testing.assert_array_equal(counts, [[0, 0, 2, 0], [0, 0, 0, 0]])


if __name__ == '__main__':
  absltest.main()
