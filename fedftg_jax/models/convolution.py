"""Convolutions that are fast for stacked clients and on CPUs.

A convolution with one kernel per client becomes a grouped convolution under
`vmap`, and inside a loop the CPU backend runs any `lax.conv` on one slow path.
Written as slices and matrix products, a convolution stays a (batched) matrix
product.
"""

import functools
import math

import jax
import jax.numpy as jnp

from fedftg_jax.models import windows as windows_
from fedftg_jax.models import winograd
from fedftg_jax.models.windows import taps

# Gathered images of one convolution with up to _CACHE numbers are made at once,
# larger ones in blocks of at most _BLOCK numbers.
_CACHE, _BLOCK = 2**22, 2**19
_CHANNELS = 16  # fewer would be mostly padding in the kernels of `pallas`
_WIDE = 64, 128  # most columns of a product, of narrow and wide kernels
_PLAIN = ('im2col', 'slices', 'lax')  # JAX derives their gradients
IMPLEMENTATIONS = (
  'winograd',
  'blocked',
  'matmul',
  'pallas',
  'im2col',
  'slices',
  'mixed',
  'lax',
)
# By backend. The choice for CPUs is measured, that for GPUs in part
# (docs/speed.md), that for TPUs is not. Within an implementation the method
# depends on the layer's shape: see `winograd.tiling` and `convolve`.
DEFAULTS = {'cpu': 'winograd', 'gpu': 'matmul', 'tpu': 'matmul'}


def default() -> str:
  """Returns the default implementation for this device."""
  return DEFAULTS.get(jax.default_backend(), 'matmul')


def convolve(
  x: jax.Array,
  kernel: jax.Array,
  implementation: str,
  stride: int = 1,
  valid: bool = False,
) -> jax.Array:
  """Convolves with zero padding; at stride 1 it keeps the image size.

  A 1 x 1 kernel is one matrix product in every implementation. The padding of a
  kernel of size k is (k - 1) // 2 before and k // 2 after, for every stride, as
  in PyTorch ('SAME' pads less in front of strides). The kernel is cast to the
  type of `x`; its gradient is accumulated in the kernel's own type.

  Args:
    x: [B, H, W, I] images.
    kernel: [h, w, I, O].
    implementation: 'matmul' gathers the h * w shifted images and multiplies
      once, or, if there are fewer outputs than inputs, multiplies once and adds
      up the h * w shifted products; 'blocked' does so for a few images at a
      time, so that what is gathered stays in the CPU's cache, and with few
      input channels for several outputs at a time; 'winograd'
      multiplies transformed tiles where that saves products, see `winograd`,
      and elsewhere, and in bfloat16, which is too short for the transforms, is
      'blocked'; 'im2col' always gathers and leaves the gradient to JAX;
      'slices' multiplies each shifted image and adds up; 'lax' is
      `jax.lax.conv_general_dilated`; 'mixed' is 'lax' where all that is mapped
      shares the kernel, and 'matmul' where each has its own; 'pallas' is
      `pallas.convolve` where stride and channels suit it, else 'matmul'. JAX
      derives all gradients of 'im2col', 'slices' and 'lax'. Through the others
      `jax.jvp` passes where it follows a gradient, but through a call without a
      gradient only within `losses.frozen`; and 'mixed' and 'pallas' have no
      gradient of a gradient in reverse mode.
    stride: stride in both directions.
    valid: whether to use no padding; the result is smaller by the kernel less
      one pixel.

  Returns:
    [B, ceil(H / stride), ceil(W / stride), O] images.

  Raises:
    ValueError: if the kernel is larger than the images with their padding.
  """
  h, w, num_in, num_out = kernel.shape
  if x.dtype == jnp.bfloat16 and implementation == 'winograd':
    implementation = 'blocked'
  padding = (
    ((0, 0), (0, 0))
    if valid
    else (((h - 1) // 2, h // 2), ((w - 1) // 2, w // 2))
  )
  for n, pad, k in zip(x.shape[1:3], padding, (h, w)):
    if n + sum(pad) < k:
      raise ValueError(
        f'a kernel of {h} x {w} pixels does not fit images of {x.shape[1]} x '
        f'{x.shape[2]}.'
      )
  if h == w == 1:
    implementation = 'im2col' if implementation in _PLAIN else 'matmul'
  if implementation == 'mixed':
    shared, own = (
      functools.partial(
        convolve, implementation=chosen, stride=stride, valid=valid
      )
      for chosen in ('lax', 'matmul')
    )
    return _mixed(shared, own, x, kernel)
  if implementation == 'lax':
    return jax.lax.conv_general_dilated(
      x,
      kernel.astype(x.dtype),
      (stride, stride),
      padding,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
  if implementation == 'pallas':
    if stride == 1 and min(num_in, num_out) >= _CHANNELS and len(x):
      from fedftg_jax.models import pallas  # half a second

      return pallas.convolve(x, kernel, padding)
    implementation = 'matmul'
  if implementation == 'slices':
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    kernel = kernel.astype(x.dtype)
    return sum(
      taps(taps(x, 1, h, stride)[i], 2, w, stride)[j] @ kernel[i, j]
      for i in range(h)
      for j in range(w)
    )
  windows = windows_.Windows(
    x.shape[1:3],  # type: ignore[arg-type]
    (h, w),
    padding,
    (stride, stride),
  )
  if implementation == 'im2col':
    return windows.gather(x) @ kernel.reshape(-1, num_out).astype(x.dtype)
  if implementation == 'winograd' and stride == 1:
    plan = winograd.tiling(len(x), windows.num, (h, w), (num_in, num_out))
    if plan:
      return winograd.convolve(x, kernel, padding, plan)
  blocked = implementation in ('blocked', 'winograd')
  tile = _tile(windows, num_in, num_out) if blocked and stride == 1 else 1
  if tile > 1:
    return _multiply_tiles(windows, tile, x, kernel)
  if num_in <= num_out or stride > 1:
    return _gather_multiply(windows, blocked, x, kernel.reshape(-1, num_out).T)
  # Each input contributes to the outputs around it: these are the windows of
  # the outputs.
  around = tuple(
    (size - 1 - before, size - 1 - after)
    for size, (before, after) in zip((h, w), padding)
  )
  windows = windows_.Windows(windows.num, (h, w), around)  # type: ignore[arg-type]
  flipped = kernel[::-1, ::-1].transpose(2, 0, 1, 3).reshape(num_in, -1)
  return _multiply_scatter(windows, blocked, x, flipped)


def _tile(windows, num_in, num_out):
  """Chooses how many outputs side by side to compute from one longer window.

  With few channels, copying and narrow products take longer than arithmetic:
  then a longer window is worth its products with zeros, of which a wider kernel
  has a smaller share.
  """
  if num_in >= min(_CHANNELS, num_out):
    return 1
  most = min(_WIDE[windows.size[1] >= 5] // num_out, windows.num[1])
  return next((t for t in (8, 4, 2) if t <= most), 1)


def _multiply_tiles(windows, tile, x, kernel):
  """Multiplies the windows of `tile` outputs by as many shifted kernels."""
  (height, width), (down, (before, after)) = windows.size, windows.padding
  rows, columns = windows.num
  num = -(-columns // tile)
  wide = windows._replace(
    size=(height, width + tile - 1),
    padding=(down, (before, after + num * tile - columns)),
    stride=(1, tile),
  )
  shifted = [
    jnp.pad(kernel, ((0, 0), (i, tile - 1 - i), (0, 0), (0, 0)))
    for i in range(tile)
  ]
  kernels = jnp.stack(shifted, axis=-2).reshape(-1, tile * kernel.shape[3])
  y = _gather_multiply(wide, True, x, kernels.T)
  y = y.reshape(len(x), rows, num * tile, kernel.shape[3])
  return y[:, :, :columns]


def convolve_enlarged(
  x: jax.Array, kernel: jax.Array, implementation: str
) -> jax.Array:
  """Computes `convolve` of x enlarged by 2 (nearest neighbour) from x itself.

  A pixel of x contributes to 4 x 4 pixels of the result, each time with a sum
  of the kernel's elements: the result is a transposed convolution of stride 2,
  with 16 products where the enlarged image needs 36.

  Args:
    x: [B, H, W, I] images.
    kernel: [3, 3, I, O].
    implementation: see `convolve`; here 'slices' is 'im2col', 'im2col' is
      'matmul' with its gradient left to JAX, 'winograd' is 'blocked', and
      'pallas' is 'matmul'.

  Returns:
    [B, 2 H, 2 W, O] images.
  """
  if implementation == 'mixed':
    shared, own = (
      functools.partial(convolve_enlarged, implementation=chosen)
      for chosen in ('lax', 'matmul')
    )
    return _mixed(shared, own, x, kernel)
  _, height, width, num_in = x.shape
  # Rows of the result 2 i - 1 ... 2 i + 2, by rows of the kernel.
  fold = jnp.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], kernel.dtype)
  folded = jnp.einsum('su,tv,uvio->stio', fold, fold, kernel)
  if implementation == 'lax':
    return jax.lax.conv_general_dilated(
      x,
      folded[::-1, ::-1].astype(x.dtype),
      (1, 1),
      ((2, 2), (2, 2)),
      lhs_dilation=(2, 2),
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
  windows = windows_.Windows(
    (2 * height, 2 * width), (4, 4), ((1, 1), (1, 1)), (2, 2)
  )
  multiply_scatter = (
    _plain_multiply_scatter if implementation in _PLAIN else _multiply_scatter
  )
  return multiply_scatter(
    windows,
    implementation in ('blocked', 'winograd'),
    x,
    folded.transpose(2, 0, 1, 3).reshape(num_in, -1),
  )


# The next two convolutions are each other's transpose in the images and share
# their gradient in the kernel. That gradient contracts the long axes of both
# factors; with the wide factor second it is twice as fast on a CPU. Their
# gradient rules call the plain functions, which `jax.jvp` can pass through.


def _plain_gather_multiply(windows, blocked, x, kernel):
  """Multiplies windows.gather(x) [..., n] by kernel [O, n]."""
  kernel = kernel.astype(x.dtype)
  return _over_blocks(
    lambda x: ((), windows.gather(x) @ kernel.T), windows, blocked, x
  )[1]


def _plain_multiply_scatter(windows, blocked, x, kernel):
  """Computes windows.scatter(x times kernel), where kernel is [I, n]."""
  wide = kernel.shape[1] // math.prod(windows.size)
  kernel = kernel.astype(x.dtype)
  return _over_blocks(
    lambda x: ((), windows.scatter(x @ kernel)), windows, blocked, x, wide=wide
  )[1]


def _correlate(windows, blocked, wide, narrow, dtype):
  """Computes the kernel's gradient, [narrow's channels, n], in its `dtype`."""

  def correlate(wide, narrow):
    rows = windows.gather(wide)
    return jnp.matmul(
      narrow.reshape(-1, narrow.shape[-1]).T,
      rows.reshape(-1, rows.shape[-1]),
      preferred_element_type=dtype,
    ), ()

  return _over_blocks(correlate, windows, blocked, wide, narrow)[0]


def _over_blocks(function, windows, blocked, *images, wide=None):
  """Calls `windows_.over_blocks`, where `wide` channels are gathered."""
  batch = len(images[0])
  each = math.prod(windows.num + windows.size) * (wide or images[0].shape[-1])
  size = windows_.block_size(batch, each, _BLOCK, _CACHE) if blocked else batch
  return windows_.over_blocks(function, size, *images)


_gather_multiply = jax.custom_vjp(
  _plain_gather_multiply, nondiff_argnums=(0, 1)
)
_gather_multiply.defvjp(
  lambda windows, blocked, x, kernel: (
    _plain_gather_multiply(windows, blocked, x, kernel),
    (x, kernel),
  ),
  lambda windows, blocked, saved, cotangent: (
    _plain_multiply_scatter(windows, blocked, cotangent, saved[1]),
    _correlate(windows, blocked, saved[0], cotangent, saved[1].dtype),
  ),
)

_multiply_scatter = jax.custom_vjp(
  _plain_multiply_scatter, nondiff_argnums=(0, 1)
)
_multiply_scatter.defvjp(
  lambda windows, blocked, x, kernel: (
    _plain_multiply_scatter(windows, blocked, x, kernel),
    (x, kernel),
  ),
  lambda windows, blocked, saved, cotangent: (
    _plain_gather_multiply(windows, blocked, cotangent, saved[1]),
    _correlate(windows, blocked, cotangent, saved[0], saved[1].dtype),
  ),
)


def _mixed(shared, own, x, kernel):
  """Computes `shared(x, kernel)`, or `own` where kernels are mapped over."""

  def pull(function):
    return lambda x, kernel, cotangent: jax.vjp(function, x, kernel)[1](
      cotangent
    )

  forward, backward = _either(shared, own), _either(pull(shared), pull(own))
  run = jax.custom_vjp(forward)
  run.defvjp(
    lambda *saved: (forward(*saved), saved),
    lambda saved, cotangent: backward(*saved, cotangent),
  )
  return run(x, kernel)


def _either(shared, own):
  """Makes a function that is `shared`; mapped over its second argument, `own`.

  Both compute the same.
  """
  run = jax.custom_batching.custom_vmap(shared)

  @run.def_vmap
  def mapped(size, is_mapped, *args):
    if not any(is_mapped):  # as where a derivative alone is mapped
      out = shared(*args)
      return out, jax.tree.map(lambda _: False, out)
    axes = [0 if one else None for one in is_mapped]
    over = functools.partial(jax.vmap, in_axes=axes, axis_size=size)
    if is_mapped[1]:
      out = over(own)(*args)
    else:  # an outer map may still be over kernels
      out = _either(over(shared), over(own))(*args)
    return out, jax.tree.map(lambda _: True, out)

  return run
