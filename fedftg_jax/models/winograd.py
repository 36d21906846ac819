"""Winograd convolutions of stride 1, with several times fewer multiplications.

Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016,
arXiv:1509.09308: F(m x m, k x k) computes m x m outputs from a tile of a x a
inputs, a = m + k - 1, as

  Y = A^T ((G K G^T) . (B^T X B)) A

with a^2 products per pair of channels instead of m^2 k^2. Over channels the
products are a^2 matrix products. The matrices are those of Toom and Cook:
interpolation at a - 1 points and at infinity.

In float32 the error relative to the largest output is about 1e-5 (that of a
plain convolution is about 1e-6), see `models_test`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedftg_jax.models import windows

_POINTS = 0, 1, -1, 2, -0.5, -2, 0.5
_TILES = 4, 2  # m, the preferred first
_FEW_CHANNELS = 16  # with fewer, transforms cost more than they save
_SAVES = 0.6  # used if at most this share of the products remains
_BLOCK = 2**20  # numbers in the cache, see `windows.block_size`


class Tiling(NamedTuple):
  """The division of an image into tiles; hashable and known at trace time."""

  tile: int  # m
  size: int  # k
  num: tuple[int, int]  # number of tiles down and across
  image: tuple[int, int]  # height and width including padding
  block: int  # number of images computed at once

  @property
  def area(self) -> int:
    """The height and width a of a tile of inputs."""
    return self.tile + self.size - 1


def tiling(
  batch: int,
  outputs: tuple[int, int],
  size: tuple[int, int],
  channels: tuple[int, int],
) -> Tiling | None:
  """Chooses the tiling of a convolution; None if it does not pay.

  Args:
    batch: number of images.
    outputs: height and width of the result.
    size: height and width of the kernel.
    channels: number of channels in and out.
  """
  k = size[0]
  if size != (k, k) or k not in (3, 4, 5) or min(channels) < _FEW_CHANNELS:
    return None
  for m in _TILES:
    a = m + k - 1
    num = tuple(-(-n // m) for n in outputs)
    products = a**2 * num[0] * num[1]
    if products <= _SAVES * k**2 * outputs[0] * outputs[1]:
      return Tiling(
        m,
        k,
        num,  # type: ignore[arg-type]
        tuple((n - 1) * m + a for n in num),  # type: ignore[arg-type]
        windows.block_size(batch, products * sum(channels), _BLOCK),
      )
  return None


def convolve(
  x: jax.Array, kernel: jax.Array, padding, plan: Tiling
) -> jax.Array:
  """Computes the convolution for which `plan` was made.

  Args:
    x: [B, H, W, I] images.
    kernel: [k, k, I, O].
    padding: zeros before and after, along height and width.
    plan: from `tiling`.

  Returns:
    [B, H', W', O] images.
  """
  outputs = [
    n + sum(pad) - plan.size + 1 for n, pad in zip(x.shape[1:3], padding)
  ]
  fill = [
    (before, full - n - before)
    for (before, _), n, full in zip(padding, x.shape[1:3], plan.image)
  ]
  x = jnp.pad(x, ((0, 0), *fill, (0, 0)))
  y = _tiles(plan, x, kernel)
  return y[:, : outputs[0], : outputs[1]]


def _plain_tiles(plan, x, kernel):
  """Computes the outputs of all tiles, [B, tiles * m, tiles * m, O]."""
  kernel = _widen(plan, kernel)

  def some(x):
    return (), _collect(plan, _spread(plan, x) @ kernel)

  return windows.over_blocks(some, plan.block, x)[1]


def _tiles_backward(plan, saved, cotangent):
  x, kernel = saved
  back = _widen(plan, kernel).transpose(0, 2, 1)

  def some(x, cotangent):
    outer = _collect_back(plan, cotangent)
    return (
      jnp.einsum('tnc,tno->tco', _spread(plan, x), outer),
      _spread_back(plan, outer @ back),
    )

  kernel, images = windows.over_blocks(some, plan.block, x, cotangent)
  return images, _widen_back(plan, kernel)


# Its gradient rules are plain operations, which `jax.jvp` can pass through.
_tiles = jax.custom_vjp(_plain_tiles, nondiff_argnums=(0,))
_tiles.defvjp(
  lambda plan, x, kernel: (_plain_tiles(plan, x, kernel), (x, kernel)),
  _tiles_backward,
)


def _spread(plan, x):
  """Computes B^T X B of every tile: [a * a, B * tiles, I]."""
  _, _, rows = _matrices(plan.tile, plan.size)
  x = _combine(rows, windows.taps(x, 1, plan.area, plan.tile))
  x = _combine(rows, windows.taps(x, 3, plan.area, plan.tile))
  return x.reshape(plan.area**2, -1, x.shape[-1])


def _collect(plan, y):
  """Computes A^T Y A of every tile: [B, tiles * m, tiles * m, O]."""
  rows, _, _ = _matrices(plan.tile, plan.size)
  y = y.reshape(plan.area, plan.area, -1, *plan.num, y.shape[-1])
  y = _combine(rows, y)
  y = _combine(rows, y.swapaxes(0, 1)).transpose(2, 3, 0, 4, 1, 5)
  b, down, m, across, _, channels = y.shape
  return y.reshape(b, down * m, across * m, channels)


def _widen(plan, kernel):
  """Computes G K G^T for every pair of channels: [a * a, I, O]."""
  _, rows, _ = _matrices(plan.tile, plan.size)
  kernel = _combine(rows, _combine(rows, kernel).swapaxes(0, 1))
  return kernel.reshape(-1, *kernel.shape[2:])


# The transposes of these three are written out, because those that JAX derives
# take several times longer.


def _widen_back(plan, kernel):
  _, rows, _ = _matrices(plan.tile, plan.size)
  kernel = kernel.reshape(plan.area, plan.area, *kernel.shape[1:])
  return _combine(rows.T, _combine(rows.T, kernel).swapaxes(0, 1))


def _spread_back(plan, x):
  _, _, rows = _matrices(plan.tile, plan.size)
  x = x.reshape(plan.area, plan.area, -1, *plan.num, x.shape[-1])
  x = windows.add_taps(_combine(rows.T, x), 3, plan.image[1], plan.tile)
  return windows.add_taps(_combine(rows.T, x), 1, plan.image[0], plan.tile)


def _collect_back(plan, y):
  rows, _, _ = _matrices(plan.tile, plan.size)
  b, _, _, channels = y.shape
  y = y.reshape(b, plan.num[0], plan.tile, plan.num[1], plan.tile, channels)
  y = _combine(rows.T, y.transpose(2, 0, 1, 3, 4, 5))
  y = _combine(rows.T, y.transpose(4, 0, 1, 2, 3, 5))
  return y.reshape(plan.area**2, -1, channels)


def _combine(matrix, arrays):
  """Computes sums of arrays: matrix [n, len(arrays)], result [n, ...]."""

  def combined(row):
    terms = [a if c == 1 else float(c) * a for c, a in zip(row, arrays) if c]
    return functools.reduce(jnp.add, terms)

  return jnp.stack([combined(row) for row in matrix])


@functools.lru_cache
def _matrices(tile, size):
  """Computes A^T [m, a], G [a, k] and B^T [a, a]."""
  area = tile + size - 1

  def powers(n):  # at the points, and at infinity the highest
    finite = np.vander(_POINTS[: area - 1], n, increasing=True)
    return np.concatenate([finite, np.eye(n)[-1:]])

  spread = np.linalg.inv(powers(area)).T
  spread[abs(spread) < 1e-12] = 0
  scale = abs(spread).max(axis=1, keepdims=True)
  return powers(tile).T, powers(size) * scale, spread / scale
