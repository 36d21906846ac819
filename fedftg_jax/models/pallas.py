"""Convolves with Pallas kernels: a candidate for GPUs.

The pixels of the padded images are rows [n, channels]. Under a window's tap in
row i and column j lies the pixel that is i * width + j rows after the first. So
an output is a sum over the taps of products of shifted rows. The kernels read
these rows where they are: no window is written to memory, as `windows.gather`
does. Under `vmap` the client is one more axis of the grid.

Rows, channels and blocks are padded to powers of two, as Triton wants them. Not
run on a GPU so far; elsewhere the kernels are interpreted, which is slow and
serves tests.
"""

import functools
import itertools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
import jax.numpy as jnp

LEAST = 16  # channels; fewer would be mostly padding
_ROWS = 128  # of a block
_CHANNELS = 64  # most of a block


def convolve(x: jax.Array, kernel: jax.Array, padding) -> jax.Array:
  """Convolves at stride 1.

  Args:
    x: [B, H, W, I] images.
    kernel: [h, w, I, O]; cast to the type of `x`.
    padding: zeros before and after, ((before, after), (before, after)).

  Returns:
    [B, H', W', O] images of the type of `x`.
  """
  return _convolve(x, kernel, padding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(x, kernel, padding):
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


_convolve.defvjp(
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


@_bilinear
def _product(x, kernel, padding, size):
  """Multiplies the rows under each tap by `kernel` and adds up."""
  rows, height, width, batch = _rows(x, padding, size)
  num, taps = len(rows), size[0] * size[1]
  last = (size[0] - 1) * width + size[1] - 1
  rows = jnp.pad(rows, ((0, -num % _ROWS + last), (0, 0)))
  num_in, num_out = rows.shape[1], _power(kernel.shape[3])
  kernel = kernel.reshape(taps, *kernel.shape[2:])
  kernel = jnp.pad(
    kernel,
    ((0, 0), (0, num_in - kernel.shape[1]), (0, num_out - kernel.shape[2])),
  )
  each_in, each_out = min(num_in, _CHANNELS), min(num_out, _CHANNELS)
  sums = _sums(x.dtype)

  def add_up(x_ref, kernel_ref, out_ref):
    first = pl.program_id(0) * _ROWS
    out = pl.ds(pl.program_id(1) * each_out, each_out)

    def add(block, total):
      here = pl.ds(block * each_in, each_in)
      for i, j in itertools.product(*map(range, size)):
        total += jnp.dot(
          x_ref[pl.ds(first + i * width + j, _ROWS), here],
          kernel_ref[i * size[1] + j, here, out],
          preferred_element_type=sums,
        )
      return total

    total = jnp.zeros((_ROWS, each_out), sums)
    total = jax.lax.fori_loop(0, num_in // each_in, add, total)
    out_ref[pl.ds(first, _ROWS), out] = total.astype(out_ref.dtype)

  out = _call(
    add_up,
    (-(-num // _ROWS), num_out // each_out),
    jax.ShapeDtypeStruct((num + -num % _ROWS, num_out), x.dtype),
  )(rows, kernel)
  return out[:num].reshape(batch, height, width, num_out)


def _multiply(x, kernel, padding):
  """Computes the convolution itself."""
  out = _product(x, kernel, padding, kernel.shape[:2])
  height, width = (
    n + sum(pad) - size + 1
    for n, pad, size in zip(x.shape[1:3], padding, kernel.shape)
  )
  return out[:, :height, :width, : kernel.shape[3]]


@_bilinear
def _correlate(x, cotangent, padding, size):
  """Computes the kernel's gradient, [h, w, I, O]."""
  rows, height, width, _ = _rows(x, padding, size)
  others = jnp.pad(
    cotangent,
    (
      (0, 0),
      (0, height - cotangent.shape[1]),
      (0, width - cotangent.shape[2]),
      (0, _power(cotangent.shape[3]) - cotangent.shape[3]),
    ),
  ).reshape(len(rows), -1)
  num = len(rows)
  last = (size[0] - 1) * width + size[1] - 1
  rows = jnp.pad(rows, ((0, -num % _ROWS + last), (0, 0)))
  others = jnp.pad(others, ((0, -num % _ROWS), (0, 0)))
  num_in, num_out = rows.shape[1], others.shape[1]
  each_in, each_out = min(num_in, _CHANNELS), min(num_out, _CHANNELS)
  sums = _sums(x.dtype)

  def add_up(x_ref, other_ref, out_ref):
    row, column = pl.program_id(0), pl.program_id(1)
    into = pl.ds(pl.program_id(2) * each_in, each_in)
    out = pl.ds(pl.program_id(3) * each_out, each_out)
    shift = row * width + column

    def add(i, total):
      return total + jnp.dot(
        x_ref[pl.ds(i * _ROWS + shift, _ROWS), into].T,
        other_ref[pl.ds(i * _ROWS, _ROWS), out],
        preferred_element_type=sums,
      )

    total = jnp.zeros((each_in, each_out), sums)
    out_ref[row, column, into, out] = jax.lax.fori_loop(
      0, -(-num // _ROWS), add, total
    )

  out = _call(
    add_up,
    (*size, num_in // each_in, num_out // each_out),
    jax.ShapeDtypeStruct((*size, num_in, num_out), sums),
  )(rows, others)
  return out[:, :, : x.shape[3], : cotangent.shape[3]]


def _rows(x, padding, size):
  """Lays padded images out as rows of pixels.

  Returns:
    [B * height * width, channels], height, width and B.
  """
  x = jnp.pad(x, ((0, 0), *padding, (0, _power(x.shape[3]) - x.shape[3])))
  batch, height, width, channels = x.shape
  return x.reshape(-1, channels), height, width, batch


def _call(kernel, grid, out):
  """Runs `kernel` on whole arrays, of which it reads what it needs."""
  return pl.pallas_call(
    kernel,
    out,
    grid=grid,
    compiler_params=triton.CompilerParams(),
    interpret=jax.default_backend() != 'gpu',
  )


def _power(num):
  """Returns the number of channels with their padding."""
  return max(pl.next_power_of_2(num), LEAST)


def _sums(dtype):
  """Returns the type in which products are added up."""
  return jnp.promote_types(dtype, jnp.float32)
