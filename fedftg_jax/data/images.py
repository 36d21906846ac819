"""Decodes and encodes single images."""

from collections.abc import Sequence
import io
import pathlib

import numpy as np
from PIL import Image, UnidentifiedImageError

# Only these: some other formats start programs, such as PostScript.
_FORMATS = ('PNG', 'JPEG', 'BMP', 'GIF', 'TIFF', 'WEBP', 'PPM')
_GREY = ('1', 'L', 'LA')
_COLOUR = ('RGB', 'RGBA', 'P', 'PA', 'CMYK', 'YCbCr', 'LAB', 'HSV')


def encode(image: np.ndarray) -> bytes:
  """Encodes an image [H, W, 1 or 3] of bytes as a PNG file."""
  file = io.BytesIO()
  Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(
    file, format='PNG'
  )
  return file.getvalue()


def decode(source: bytes | pathlib.Path) -> np.ndarray:
  """Decodes an image to [H, W, 1] if it is grey, else to [H, W, 3].

  Args:
    source: a file, or its bytes.

  Returns:
    Bytes.

  Raises:
    ValueError: if it is not an image of a known format, is suspiciously large,
      or has more than 8 bits per channel.
  """
  file = io.BytesIO(source) if isinstance(source, bytes) else source
  name = '' if isinstance(source, bytes) else f'{source}: '
  try:
    with Image.open(file, formats=_FORMATS) as image:
      if image.mode not in _GREY + _COLOUR:
        raise ValueError(
          f'{name}images of mode {image.mode} are not supported, '
          'only those with 8 bits per channel'
        )
      mode = 'L' if image.mode in _GREY else 'RGB'
      pixels = np.asarray(image if image.mode == mode else image.convert(mode))
  except Image.DecompressionBombError as error:
    raise ValueError(f'{name}{error}') from error
  except (UnidentifiedImageError, OSError, SyntaxError) as error:
    raise ValueError(
      f'{name}is not a readable image; must be one of {", ".join(_FORMATS)}'
    ) from error
  return pixels[..., None] if mode == 'L' else pixels


def stack(images: Sequence[np.ndarray]) -> np.ndarray:
  """Stacks images of the same size as [M, H, W, channels].

  If some images have colours, grey ones get 3 channels.

  Raises:
    ValueError: if sizes differ.
  """
  sizes = {image.shape[:2] for image in images}
  if len(sizes) > 1:
    some = ', '.join(f'{h} x {w}' for h, w in sorted(sizes)[:3])
    raise ValueError(f'all images must have the same size, got {some}')
  channels = max(image.shape[2] for image in images)
  shape = *images[0].shape[:2], channels
  return np.stack([np.broadcast_to(image, shape) for image in images])


def scaled(images: np.ndarray) -> np.ndarray:
  """Scales each of the images [B, H, W, channels] to its own range, 0 to 1."""
  low = images.min((1, 2, 3), keepdims=True)
  high = images.max((1, 2, 3), keepdims=True)
  return (images - low) / np.maximum(high - low, 1e-6)
