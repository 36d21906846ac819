"""Augments training images on the device, inside the local step.

As in the official FedFTG code, images are augmented after normalisation, so
that padding has the mean colour. Each image is mirrored left to right with
probability 1/2. With probability 1/2 it is padded by 4 zeros on each side and
cropped to its size at an offset in {0 .. 8}^2. Evaluation does not augment.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

KINDS = ('none', 'flip_crop')
_PAD = 4


class Draws(NamedTuple):
  """The random transformation of each image of a batch."""

  flip: jax.Array  # [B] bool
  offset: jax.Array  # [B, 2] int32 in [0, 8], down and right; 4 is no shift


def draw(key: jax.Array, num: int) -> Draws:
  """Draws transformations for `num` images."""
  key_flip, key_crop, key_offset = jax.random.split(key, 3)
  flip = jax.random.bernoulli(key_flip, shape=(num,))
  crop = jax.random.bernoulli(key_crop, shape=(num, 1))
  offset = jax.random.randint(key_offset, (num, 2), 0, 2 * _PAD + 1)
  return Draws(flip, jnp.where(crop, offset, _PAD))


def apply(x: jax.Array, draws: Draws) -> jax.Array:
  """Applies transformations to images.

  Args:
    x: [B, H, W, channels] normalised images.
    draws: the transformation of each image.

  Returns:
    Images of the same shape.
  """
  x = jnp.where(draws.flip[:, None, None, None], x[:, :, ::-1], x)
  around = ((0, 0), (_PAD, _PAD), (_PAD, _PAD), (0, 0))

  def crop(image, offset):
    return jax.lax.dynamic_slice(image, (*offset, 0), x.shape[1:])

  return jax.vmap(crop)(jnp.pad(x, around), draws.offset)


def flip_crop(key: jax.Array, x: jax.Array) -> jax.Array:
  """Augments normalised images [B, H, W, channels], each independently."""
  return apply(x, draw(key, len(x)))
