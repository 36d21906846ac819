"""Convolves with Pallas kernels: a candidate for GPUs.

The pixels of the padded images are rows [n, channels]. Under a window's tap in
row i and column j lies the pixel that is i * width + j rows after the first. So
an output is a sum over the taps of products of shifted rows. The kernels read
these rows where they are: no window is written to memory, as `windows.gather`
does. Under `vmap` the client is one more axis of the grid.

Rows, channels and blocks are padded to powers of two, as Triton wants them. The
kernels compile for a GPU (experiments/gpu_programs.py), but none has run them
so far. On a CPU they are interpreted, which is slow and serves tests.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
import jax.numpy as jnp

_ROWS = 128  # of a block
_CHANNELS = 16, 64  # of a block, at least and at most


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: jax.Array, kernel: jax.Array, padding) -> jax.Array:
  """Convolves at stride 1.

  Args:
    x: [B, H, W, I] images, B at least 1.
    kernel: [h, w, I, O]; cast to the type of `x`. Its gradient is added up in
      its own type.
    padding: zeros before and after, ((before, after), (before, after)), so many
      that the result has pixels.

  Returns:
    [B, H', W', O] images of the type of `x`.

  Raises:
    NotImplementedError: on a TPU.
  """
  return _multiply(x, kernel.astype(x.dtype), padding)


def _pull(padding, saved, cotangent):
  x, kernel = saved
  around = tuple(
    (size - 1 - before, size - 1 - after)
    for size, (before, after) in zip(kernel.shape, padding)
  )
  flipped = kernel[::-1, ::-1].swapaxes(2, 3).astype(x.dtype)
  by_kernel = _correlate(x, cotangent, padding, kernel.shape[:2])
  return _multiply(cotangent, flipped, around), by_kernel.astype(kernel.dtype)


convolve.defvjp(
  lambda x, kernel, padding: (
    _multiply(x, kernel.astype(x.dtype), padding),  # `jax.jvp` can pass it
    (x, kernel),
  ),
  _pull,
)


def _bilinear(function):
  """Gives a function of two arrays, linear in each, its derivative."""
  whole = jax.custom_jvp(function, nondiff_argnums=(2, 3))

  @whole.defjvp
  def along(padding, size, arrays, tangents):
    (a, b), (da, db) = arrays, tangents
    run = lambda *pair: whole(*pair, padding, size)
    return run(a, b), run(da, b) + run(a, db)

  return whole


def _multiply(x, kernel, padding):
  """Computes the convolution itself."""
  out = _product(x, kernel, padding, kernel.shape[:2])
  height, width = (
    n + sum(pad) - size + 1
    for n, pad, size in zip(x.shape[1:3], padding, kernel.shape)
  )
  return out[:, :height, :width, : kernel.shape[3]]


@_bilinear
def _product(x, kernel, padding, size):
  """Multiplies the rows under each tap by `kernel` and adds up."""
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  batch, height, width, num_in = x.shape
  rows, blocks = _rows(x, (size[0] - 1) * width + size[1] - 1)
  whole_in, each_in = _channels(num_in)
  whole_out, each_out = _channels(kernel.shape[3])
  kernel = jnp.pad(
    kernel,
    (*((0, 0),) * 2, (0, whole_in - num_in), (0, whole_out - kernel.shape[3])),
  )
  sums, num_taps = _sums(x.dtype), size[0] * size[1]

  def add_up(x_ref, kernel_ref, out_ref):
    first = pl.program_id(0) * _ROWS
    out = pl.ds(pl.program_id(1) * each_out, each_out)

    # One product in each pass: more would not fit the shared memory.
    def add(step, total):
      block, tap = _divided(step, num_taps)
      i, j = _divided(tap, size[1])
      here = pl.ds(block * each_in, each_in)
      return total + jnp.dot(
        x_ref[pl.ds(first + i * width + j, _ROWS), here],
        kernel_ref[i, j, here, out],
        preferred_element_type=sums,
      )

    total = jnp.zeros((_ROWS, each_out), sums)
    total = jax.lax.fori_loop(0, num_taps * (whole_in // each_in), add, total)
    out_ref[pl.ds(first, _ROWS), out] = total.astype(out_ref.dtype)

  out = _call(
    add_up,
    (blocks, whole_out // each_out),
    jax.ShapeDtypeStruct((blocks * _ROWS, whole_out), x.dtype),
  )(rows, kernel)
  num = batch * height * width
  return out[:num].reshape(batch, height, width, whole_out)


@_bilinear
def _correlate(x, cotangent, padding, size):
  """Computes the kernel's gradient, [h, w, I, O]."""
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  _, height, width, num_in = x.shape
  _, rows_out, columns_out, num_out = cotangent.shape
  rows, blocks = _rows(x, (size[0] - 1) * width + size[1] - 1)
  others, _ = _rows(
    jnp.pad(
      cotangent,
      ((0, 0), (0, height - rows_out), (0, width - columns_out), (0, 0)),
    )
  )
  whole_in, each_in = _channels(num_in)
  whole_out, each_out = _channels(num_out)
  sums = _sums(x.dtype)

  def add_up(x_ref, other_ref, out_ref):
    i, j = pl.program_id(0), pl.program_id(1)
    into = pl.ds(pl.program_id(2) * each_in, each_in)
    out = pl.ds(pl.program_id(3) * each_out, each_out)
    shift = i * width + j

    def add(block, total):
      return total + jnp.dot(
        x_ref[pl.ds(block * _ROWS + shift, _ROWS), into].T,
        other_ref[pl.ds(block * _ROWS, _ROWS), out],
        preferred_element_type=sums,
      )

    total = jnp.zeros((each_in, each_out), sums)
    out_ref[i, j, into, out] = jax.lax.fori_loop(0, blocks, add, total)

  out = _call(
    add_up,
    (*size, whole_in // each_in, whole_out // each_out),
    jax.ShapeDtypeStruct((*size, whole_in, whole_out), sums),
  )(rows, others)
  return out[:, :, :num_in, :num_out]


def _divided(number, by):
  """Returns quotient and remainder; Triton has no `//` of JAX's."""
  by = jnp.asarray(by, number.dtype)
  return jax.lax.div(number, by), jax.lax.rem(number, by)


def _rows(x, more=0):
  """Lays images out as rows of pixels, with padding.

  Args:
    x: [B, H, W, channels].
    more: rows of padding that are read after the last block.

  Returns:
    The rows, and the number of their blocks.
  """
  *sizes, channels = x.shape
  num = sizes[0] * sizes[1] * sizes[2]
  padding = (0, -num % _ROWS + more), (0, _channels(channels)[0] - channels)
  return jnp.pad(x.reshape(num, channels), padding), -(-num // _ROWS)


def _channels(num):
  """Returns the number of channels with their padding, and that of a block."""
  least, most = _CHANNELS
  whole = max(pl.next_power_of_2(num), least)
  return whole, min(whole, most)


def _sums(dtype):
  """Returns the type in which products are added up."""
  return jnp.promote_types(dtype, jnp.float32)


def _call(kernel, grid, out):
  """Runs `kernel` on whole arrays, of which it reads what it needs."""
  if jax.default_backend() == 'tpu':
    raise NotImplementedError("conv='pallas' has no kernels for a TPU.")
  run = functools.partial(pl.pallas_call, kernel, out, grid=grid)
  compiled = run(compiler_params=triton.CompilerParams())
  return functools.partial(
    jax.lax.platform_dependent,
    cpu=run(interpret=True),
    cuda=compiled,
    rocm=compiled,
  )
