"""Generated images for a page: in rows, in a grid, and round after round."""

import base64
from collections.abc import Mapping, Sequence
import io
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fedftg_jax.data import images as images_lib

_STRIP_ROUNDS = 6  # rounds whose images stand below each other, at most
_GRID_CLASSES = 10  # of which all images are shown, at most
_ACROSS = 5  # images in a row of a moving picture
_PIXELS = 48  # at least so many across an image of a moving picture
_BAR = 22  # pixels, height of the line with the round
_STEP, _REST = 600, 2400  # milliseconds of a frame, and of the last one


class Animation(NamedTuple):
  """A picture that moves, and its last frame for those who want none that do.

  Attributes:
    file: bytes of a PNG file with several frames (APNG).
    still: bytes of a PNG file.
  """

  file: bytes
  still: bytes

  @property
  def moving_uri(self) -> str:
    return data_uri(self.file)

  @property
  def still_uri(self) -> str:
    return data_uri(self.still)


def animation(images: Mapping[int, np.ndarray]) -> Animation | None:
  """Shows the images of each class round after round, again and again.

  Args:
    images: [C, H, W, channels] uint8 by round.

  Returns:
    The moving picture; None of fewer than two rounds.
  """
  rounds = sorted(images)
  if len(rounds) < 2:
    return None
  frames = [_frame(images[t], t, rounds[-1]) for t in rounds]
  file = io.BytesIO()
  frames[0].save(
    file,
    'PNG',
    save_all=True,
    append_images=frames[1:],
    duration=[_STEP] * (len(frames) - 1) + [_REST],
    loop=0,
    optimize=True,
  )
  return Animation(file.getvalue(), _png(frames[-1]))


def _frame(images, round_, last) -> Image.Image:
  """Draws the images in rows, and below them the round."""
  num, height, width, _ = images.shape
  images = _colours(images)
  times = -(-_PIXELS // width)
  images = images.repeat(times, 1).repeat(times, 2)
  height, width = height * times, width * times
  across = min(num, _ACROSS)
  rows = -(-num // across)
  mode = 'L' if images.ndim == 3 else 'RGB'  # grey takes a third of the room
  frame = Image.new(mode, (across * width, rows * height + _BAR), '#202225')
  for i, image in enumerate(images):
    place = i % across * width, i // across * height
    frame.paste(Image.fromarray(image), place)
  draw = ImageDraw.Draw(frame)
  below = rows * height
  done = frame.width * round_ / max(last, 1)
  draw.rectangle((0, below, done, below + 2), '#578dff')
  draw.text(
    (6, below + 4),
    f'round {round_}',
    fill='white',
    font=ImageFont.load_default(14),
  )
  return frame


def strip(images: Mapping[int, np.ndarray]) -> list[tuple[int, str]]:
  """Chooses some of the rounds, evenly spread.

  Args:
    images: [C, H, W, channels] uint8 by round.

  Returns:
    (round, data URI of the images of all classes side by side), at most 6.
  """
  rounds = sorted(images)
  places = np.linspace(0, len(rounds) - 1, min(len(rounds), _STRIP_ROUNDS))
  return [
    (rounds[i], _side_by_side(images[rounds[i]]))
    for i in np.round(places).astype(int)
  ]


def nearest(
  found: Mapping[str, np.ndarray], names: Sequence[str]
) -> dict[str, str] | None:
  """Shows generated images with the nearest real ones.

  Args:
    found: from `scoring.nearest_real`; {} where there is nothing.
    names: [C] of the classes.

  Returns:
    'generated' and 'real', data URIs, and 'note', a sentence; None where there
    is nothing.
  """
  if not found:
    return None
  return {
    'generated': _side_by_side(found['generated']),
    'real': _side_by_side(found['real']),
    'note': 'Classes of the real ones: '
    + ', '.join(names[int(label)] for label in found['label'])
    + (
      f'. Distances: {found["distance"].min():.2f} to '
      f'{found["distance"].max():.2f}; the median distance of a real image '
      f'from the nearest other one is {float(found["between_real"]):.2f} '
      '(root mean square over pixels, normalised as for the model).'
    ),
  }


def grid(images: np.ndarray | None) -> str | None:
  """Shows several images of each of the first classes, a class to a row.

  Args:
    images: [C, n, H, W, channels] of any range; None where there are none.

  Returns:
    A data URI; None where there are none.
  """
  if images is None:
    return None
  images = np.nan_to_num(images[:_GRID_CLASSES], posinf=0, neginf=0)
  num_classes, per_class, height, width, channels = images.shape
  scaled = images_lib.scaled(images.reshape(-1, height, width, channels))
  rows = np.round(255 * scaled).astype(np.uint8).reshape(images.shape)
  return _side_by_side(
    rows.transpose(1, 0, 2, 3, 4).reshape(
      per_class, num_classes * height, width, channels
    )
  )


def _side_by_side(images) -> str:
  """Makes a data URI of images in a row; browsers enlarge it sharply."""
  images = np.concatenate(list(_colours(images)), axis=1)
  return data_uri(_png(Image.fromarray(images)))


def _colours(images: np.ndarray) -> np.ndarray:
  """Returns [..., H, W] for grey images, or else [..., H, W, 3]."""
  if images.shape[-1] == 3:
    return images
  return images.mean(-1).round().astype(np.uint8)


def _png(image: Image.Image) -> bytes:
  file = io.BytesIO()
  image.save(file, 'PNG', optimize=True)
  return file.getvalue()


def data_uri(png: bytes) -> str:
  return 'data:image/png;base64,' + base64.b64encode(png).decode()
