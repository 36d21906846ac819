"""Augmentation of training images, on the device, inside the step.

As the official FedFTG code does it, on normalised images, so that what is
padded is the mean colour: each image is mirrored left to right with probability
1/2; with probability 1/2 it is padded by 4 zeros on each side and cropped to
its size at an offset in {0 .. 8}^2. Evaluation sees the images as they are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

KINDS = ('none', 'flip_crop')
_PAD = 4


class Draws(NamedTuple):
  """What becomes of each image of a batch."""

  flip: jax.Array  # [B] bool
  offset: jax.Array  # [B, 2] int32 in [0, 8], down and right; 4 is no shift


def draw(key: jax.Array, num: int) -> Draws:
  """Draws for `num` images."""
  key_flip, key_crop, key_offset = jax.random.split(key, 3)
  flip = jax.random.bernoulli(key_flip, shape=(num,))
  crop = jax.random.bernoulli(key_crop, shape=(num, 1))
  offset = jax.random.randint(key_offset, (num, 2), 0, 2 * _PAD + 1)
  return Draws(flip, jnp.where(crop, offset, _PAD))


def apply(x: jax.Array, draws: Draws) -> jax.Array:
  """The augmented images.

  Args:
    x: [B, H, W, channels] normalised images.
    draws: of each.

  Returns:
    Images of the same shape.
  """
  x = jnp.where(draws.flip[:, None, None, None], x[:, :, ::-1], x)
  around = ((0, 0), (_PAD, _PAD), (_PAD, _PAD), (0, 0))

  def crop(image, offset):
    return jax.lax.dynamic_slice(image, (*offset, 0), x.shape[1:])

  return jax.vmap(crop)(jnp.pad(x, around), draws.offset)


def flip_crop(key: jax.Array, x: jax.Array) -> jax.Array:
  """Normalised images [B, H, W, channels], each augmented by draws of its
  own."""
  return apply(x, draw(key, len(x)))
