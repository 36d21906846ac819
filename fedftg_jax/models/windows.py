"""Gathers the pixels under sliding windows, and scatters them back."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Windows(NamedTuple):
  """Windows of h x w pixels that slide over an image."""

  image: tuple[int, int]  # height and width
  size: tuple[int, int]  # h, w
  padding: tuple[tuple[int, int], tuple[int, int]]  # zeros before and after
  stride: tuple[int, int] = (1, 1)  # down and across

  @property
  def num(self) -> tuple[int, int]:
    """The number of windows along height and width."""
    return tuple(  # type: ignore[return-value]
      (n + sum(pad) - k) // stride + 1
      for n, pad, k, stride in zip(
        self.image, self.padding, self.size, self.stride
      )
    )

  def gather(self, x: jax.Array) -> jax.Array:
    """Gathers the windows' pixels.

    Returns [B, windows down, windows across, h * w * I].

    Columns are gathered first, so that the second copy moves w * I channels at
    a time.
    """
    x = jnp.pad(x, ((0, 0), *self.padding, (0, 0)))
    rows = taps(self._gather_columns(x), 1, self.size[0], self.stride[0])
    return jnp.concatenate(rows, axis=-1)

  def _gather_columns(self, x):
    """Gathers the columns of the windows, [B, H, windows across, w * I].

    As many columns as the stride lie side by side, and are copied at once.
    """
    stride, width, num = self.stride[1], self.size[1], self.num[1]
    batch, height, columns, channels = x.shape
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -columns % stride), (0, 0)))
    x = x.reshape(batch, height, -(-columns // stride), stride * channels)
    return jnp.concatenate(
      [
        x[:, :, j // stride : j // stride + num, : (width - j) * channels]
        for j in range(0, width, stride)
      ],
      axis=-1,
    )

  def scatter(self, x: jax.Array) -> jax.Array:
    """Adds up windows' pixels to images [B, *image, I]: `gather` transposed."""
    num_channels = x.shape[-1] // (self.size[0] * self.size[1])
    image = jax.ShapeDtypeStruct((len(x), *self.image, num_channels), x.dtype)
    return jax.linear_transpose(self.gather, image)(x)[0]


def taps(x, axis, size, stride):
  """Returns the first, second, ... pixel of each window along `axis`.

  Each window has `size` pixels.
  """
  num = (x.shape[axis] - size) // stride + 1
  if stride == 1:
    phases = [x]
  else:  # unlike with strided slices, the gradient is one concatenation
    padding = [(0, 0)] * x.ndim
    padding[axis] = 0, -x.shape[axis] % stride
    shape = (*x.shape[:axis], -1, stride, *x.shape[axis + 1 :])
    phases = [
      phase.squeeze(axis + 1)
      for phase in jnp.split(
        jnp.pad(x, padding).reshape(shape), stride, axis=axis + 1
      )
    ]
  return [
    jax.lax.slice_in_dim(
      phases[i % stride], i // stride, i // stride + num, axis=axis
    )
    for i in range(size)
  ]


def add_taps(arrays, axis: int, length: int, stride: int) -> jax.Array:
  """Adds one array per tap up to [..., length, ...]: `taps` transposed.

  It is written out because the transpose that JAX derives adds padded arrays of
  the whole length for each tap.
  """
  num = arrays[0].shape[axis]
  each = num + (len(arrays) - 1) // stride

  def placed(i):
    padding = [(0, 0)] * arrays[i].ndim
    padding[axis] = i // stride, each - num - i // stride
    return jnp.pad(arrays[i], padding)

  phases = jnp.stack(
    [sum(map(placed, range(j, len(arrays), stride))) for j in range(stride)],
    axis + 1,
  )
  shape = phases.shape
  whole = phases.reshape(*shape[:axis], -1, *shape[axis + 2 :])
  return jax.lax.slice_in_dim(whole, 0, length, axis=axis)


def block_size(batch: int, each: int, most: int, at_once: int = 0) -> int:
  """Returns how many images to work on at a time so that they fit the cache.

  Args:
    batch: number of images.
    each: numbers that one image needs in between.
    most: largest number of numbers in a block; a block has at least one image.
    at_once: up to so many numbers are not divided into blocks.

  Returns:
    A divisor of `batch`.
  """
  if batch * each <= max(most, at_once):
    return batch
  return max(
    n
    for n in range(1, batch + 1)
    if batch % n == 0 and (n == 1 or n * each <= most)
  )


def over_blocks(function: Callable, size: int, *images: jax.Array):
  """Applies `function(*images) -> (summed, mapped)` to `size` images at a time.

  Returns:
    The sum of `summed` over the blocks, and `mapped` for all images.
  """
  if size == len(images[0]):
    return function(*images)
  blocks = [a.reshape(-1, size, *a.shape[1:]) for a in images]
  zero = jax.tree.map(
    lambda a: jnp.zeros(a.shape, a.dtype),
    jax.eval_shape(function, *(a[0] for a in blocks))[0],
  )

  def step(total, block):
    summed, mapped = function(*block)
    return jax.tree.map(jnp.add, total, summed), mapped

  summed, mapped = jax.lax.scan(step, zero, blocks)
  return summed, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), mapped)
