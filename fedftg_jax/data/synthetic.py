"""Synthetic images with clients of their own: offline, quick, of any number.

  --dataset=synthetic
  --dataset=synthetic:clients=1000000 --partition=natural
  --dataset=synthetic:clients=3500,examples=100-300,classes=62,size=28

Each class has a pattern of 4 x 4 squares, each of them dark or bright. An image
is the pattern of its class plus uniform noise, so all images are different and
a linear classifier can learn the classes. The contrast falls with the size of
the images, so that the classes are about equally hard to tell apart at any
size.

Every training example belongs to a client. Half of a client's labels are one
class of its own; the others, and those of the test set, are drawn uniformly.
`--partition=natural` gives the clients these examples; any other partition
divides all examples again. The same name always gives the same bytes.
"""

from typing import NamedTuple

import numpy as np

_SQUARES = 4  # squares along each side of a pattern
_CONTRAST = 560  # contrast of a pattern: grey levels times pixels of a side
_BLOCK = 2**20  # number of bytes of images that are drawn at once
_MOST_CLASSES = 1000
_MOST_BYTES = 2**36


class Spec(NamedTuple):
  """The settings in `--dataset=synthetic:NAME=VALUE,...`, by name.

  Attributes:
    clients: number of clients.
    examples: smallest and largest number of training examples of a client,
      drawn uniformly; 'LEAST-MOST' or one number.
    classes: number of classes.
    size: height and width of the images, in pixels; they have one channel.
    test: number of test examples.
  """

  clients: int = 100
  examples: tuple[int, int] = (10, 30)
  classes: int = 10
  size: int = 8
  test: int = 2000


_BOUNDS = {
  'clients': (1, 2**31 - 1),
  'examples': (1, 2**31 - 1),
  'classes': (2, _MOST_CLASSES),
  'size': (_SQUARES, 1024),
  'test': (1, 2**31 - 1),
}


def parse(text: str) -> Spec:
  """Reads 'NAME=VALUE,NAME=VALUE' into a `Spec`; '' is the default.

  Raises:
    ValueError: for an unknown name, or a value out of range.
  """
  values: dict[str, int | tuple[int, int]] = {}
  for word in filter(None, text.split(',')):
    name, _, value = word.partition('=')
    if name not in Spec._fields:
      raise ValueError(
        f'synthetic has no setting {name!r}; must be of '
        f'{", ".join(Spec._fields)}, each followed by = and a number'
      )
    parts = value.split('-') if name == 'examples' else [value]
    least, most = _BOUNDS[name]
    if (
      len(parts) > 2
      or not all(part.isdecimal() for part in parts)
      or not least <= int(parts[0]) <= int(parts[-1]) <= most
    ):
      form = 'a number or LEAST-MOST,' if name == 'examples' else 'a number'
      raise ValueError(
        f'synthetic: {name} must be {form} from {least} to {most}, got '
        f'{value!r}'
      )
    numbers = [int(part) for part in parts]
    values[name] = (
      (numbers[0], numbers[-1]) if name == 'examples' else numbers[0]
    )
  spec = Spec(**values)  # type: ignore[arg-type]
  size = (spec.clients * spec.examples[1] + spec.test) * spec.size**2
  if size > _MOST_BYTES:
    raise ValueError(
      f'synthetic would have up to {size / 2**30:.0f} GiB of images; must be '
      f'at most {_MOST_BYTES // 2**30} GiB'
    )
  return spec


def make(spec: Spec) -> dict[str, np.ndarray]:
  """Draws the data set.

  Args:
    spec: from `parse`.

  Returns:
    train_x and test_x [M, size, size, 1] uint8, train_y and test_y [M] int32,
    and train_client_id [M] int32, ascending.
  """
  least, most = spec.examples
  sizes = _random(0).randint(least, most + 1, spec.clients)
  owners = np.repeat(np.arange(spec.clients, dtype=np.int32), sizes)
  own_class = _random(1).randint(spec.classes, size=spec.clients)
  random = _random(2)
  train_y = _labels(random, len(owners), spec.classes)
  is_own = random.randint(2, size=len(owners), dtype=np.uint8) == 1
  train_y[is_own] = own_class[owners[is_own]]
  test_y = _labels(_random(3), spec.test, spec.classes)
  patterns = _patterns(spec)
  return {
    'train_x': _images(_random(4), train_y, patterns),
    'train_y': train_y,
    'test_x': _images(_random(5), test_y, patterns),
    'test_y': test_y,
    'train_client_id': owners,
  }


def _random(purpose: int) -> np.random.RandomState:
  return np.random.RandomState([2022, purpose])


def _labels(random, num, num_classes):
  return random.randint(num_classes, size=num, dtype=np.int32)


def _patterns(spec) -> np.ndarray:
  """Draws different patterns, [C, size, size, 1] of 0 and the contrast."""
  drawn = _random(6).choice(2**_SQUARES**2, spec.classes, replace=False)
  bits = drawn[:, None] >> np.arange(_SQUARES**2) & 1
  place = np.arange(spec.size) * _SQUARES // spec.size
  squares = bits.reshape(-1, _SQUARES, _SQUARES)[:, place][:, :, place]
  contrast = max(_CONTRAST // spec.size, 1)
  return (contrast * squares[..., None]).astype(np.uint8)


def _images(random, labels, patterns) -> np.ndarray:
  """Draws an image for each label, [M, size, size, 1] uint8."""
  shape = patterns.shape[1:]
  images = np.empty((len(labels), *shape), np.uint8)
  levels = 256 - int(patterns.max())  # levels of noise; sums fit into a byte
  num = max(_BLOCK // int(np.prod(shape)), 1)
  for first in range(0, len(labels), num):
    some = slice(first, first + num)
    block = images[some]
    noise = np.frombuffer(random.bytes(block.size), np.uint8)
    noise = np.multiply(noise, levels, dtype=np.uint16) >> 8
    np.add(
      patterns[labels[some]], noise.astype(np.uint8).reshape(block.shape), block
    )
  return images
