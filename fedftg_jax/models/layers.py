"""Layers that know about padding, stacked clients and CPU convolutions."""

import functools
import math
from typing import Callable, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

CONV_IMPLEMENTATIONS = ('blocked', 'matmul', 'im2col', 'slices', 'lax')
NORMS = ('none', 'batch', 'group')
# Sizes in numbers: gathered images of one convolution up to _CACHE are made at
# once, more in blocks of at most _BLOCK.
_CACHE, _BLOCK = 2**22, 2**19
BATCH_NORM_MOMENTUM = .1  # PyTorch's: weight of the new moments

# PyTorch's default initialisation, U(-1, 1) / sqrt(fan_in), which the official
# codes of this field rely on.
kernel_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')

# Kaiming normal with fan_out, which torchvision gives its convolutions.
kaiming_init = nn.initializers.variance_scaling(2., 'fan_out', 'normal')


def default_conv() -> str:
  """The convolution for this device, as far as measured (BUILD.md)."""
  return 'blocked' if jax.default_backend() == 'cpu' else 'matmul'


class Options(NamedTuple):
  """What is chosen for a classifier as a whole."""
  norm: str = 'none'       # one of `NORMS`, see `Norm`
  conv: str = 'matmul'     # one of `CONV_IMPLEMENTATIONS`, see `convolve`
  projection_dim: int = 0  # width of the projection, 0 for none, see `head`
  torch_bn: bool = True    # see `BatchNorm.unbiased`


def bias_init(fan_in: int) -> Callable:
  """PyTorch's default bias initialisation, U(-1, 1) / sqrt(fan_in)."""
  def init(key, shape, dtype=None):
    bound = fan_in ** -.5
    dtype = dtype or jnp.result_type(float)
    return jax.random.uniform(key, shape, dtype, -bound, bound)
  return init


def convolve(
    x: jax.Array, kernel: jax.Array, implementation: str, stride: int = 1,
    valid: bool = False) -> jax.Array:
  """Convolution with zero padding; at stride 1 it keeps the image size.

  A convolution with a kernel per client turns into a grouped convolution under
  `vmap`, and inside a loop the CPU backend runs any `lax.conv` on one slow
  path. As slices and a matrix product it stays a (batched) matrix product. A
  1 x 1 kernel is one matrix product whatever the implementation.

  The padding is (k - 1) // 2 before and k // 2 after, for every stride, as in
  PyTorch ('SAME' pads less in front of strides).

  Args:
    x: [B, H, W, I] images.
    kernel: [h, w, I, O].
    implementation: 'matmul' gathers the h * w shifted images and multiplies
      once, or, where outputs are fewer than inputs, multiplies once and adds up
      the h * w shifted products; 'blocked' does so for a few images at a time,
      so that what is gathered stays in the CPU's cache; 'im2col' gathers always
      and leaves the gradient to JAX (those of the first two are written by hand
      and have no forward mode); 'slices' multiplies each shifted image and
      adds; 'lax' is `jax.lax.conv_general_dilated`.
    stride: in both directions.
    valid: no padding; the result is smaller by the kernel less one pixel.

  Returns:
    [B, ceil(H / stride), ceil(W / stride), O] images.
  """
  h, w, num_in, num_out = kernel.shape
  padding = ((0, 0), (0, 0)) if valid else (
      ((h - 1) // 2, h // 2), ((w - 1) // 2, w // 2))
  if h == w == 1:
    implementation = 'matmul'
  if implementation == 'lax':
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  if implementation == 'slices':
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    return sum(_taps(_taps(x, 1, h, stride)[i], 2, w, stride)[j] @ kernel[i, j]
               for i in range(h) for j in range(w))
  windows = _Windows(x.shape[1:3], (h, w), padding, stride)
  if implementation == 'im2col':
    return windows.gather(x) @ kernel.reshape(-1, num_out)
  blocked = implementation == 'blocked'
  if num_in <= num_out or stride > 1:
    return _gather_multiply(
        windows, blocked, x, kernel.reshape(-1, num_out).T)
  # Each input gives to the outputs around it: the windows seen from them.
  around = tuple((size - 1 - before, size - 1 - after)
                 for size, (before, after) in zip((h, w), padding))
  windows = _Windows(windows.num, (h, w), around)
  flipped = kernel[::-1, ::-1].transpose(2, 0, 1, 3).reshape(num_in, -1)
  return _multiply_scatter(windows, blocked, x, flipped)


def convolve_enlarged(
    x: jax.Array, kernel: jax.Array, implementation: str) -> jax.Array:
  """`convolve` of x enlarged by 2 (nearest neighbour), computed on x itself.

  A pixel of x adds to 4 x 4 pixels of the result, each time with a sum of the
  kernel's elements: the result is a transposed convolution of stride 2, with 16
  products where the enlarged image needs 36.

  Args:
    x: [B, H, W, I] images.
    kernel: [3, 3, I, O].
    implementation: see `convolve`; 'im2col' and 'slices' are 'matmul' here.

  Returns:
    [B, 2 H, 2 W, O] images.
  """
  _, height, width, num_in = x.shape
  # Rows of the result 2 i - 1 ... 2 i + 2, by rows of the kernel.
  fold = jnp.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], kernel.dtype)
  folded = jnp.einsum('su,tv,uvio->stio', fold, fold, kernel)
  if implementation == 'lax':
    return jax.lax.conv_general_dilated(
        x, folded[::-1, ::-1], (1, 1), ((2, 2), (2, 2)), lhs_dilation=(2, 2),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  windows = _Windows((2 * height, 2 * width), (4, 4), ((1, 1), (1, 1)), 2)
  return _multiply_scatter(
      windows, implementation == 'blocked', x,
      folded.transpose(2, 0, 1, 3).reshape(num_in, -1))


class _Windows(NamedTuple):
  """Windows of h x w pixels that slide over an image."""
  image: tuple[int, int]  # height and width
  size: tuple[int, int]   # h, w
  padding: tuple[tuple[int, int], tuple[int, int]]  # zeros before and after
  stride: int = 1

  @property
  def num(self) -> tuple[int, int]:
    """Windows along height and width."""
    return tuple((n + sum(pad) - k) // self.stride + 1 for n, pad, k in zip(
        self.image, self.padding, self.size))

  def gather(self, x: jax.Array) -> jax.Array:
    """[B, windows down, windows across, h * w * I] their pixels.

    Sideways first: the second copy moves w * I channels at a time.
    """
    x = jnp.pad(x, ((0, 0), *self.padding, (0, 0)))
    for axis in (2, 1):
      x = jnp.concatenate(
          _taps(x, axis, self.size[axis - 1], self.stride), axis=-1)
    return x

  def scatter(self, x: jax.Array) -> jax.Array:
    """[B, *image, I], the transpose of `gather`."""
    num_channels = x.shape[-1] // (self.size[0] * self.size[1])
    image = jax.ShapeDtypeStruct(
        (len(x), *self.image, num_channels), x.dtype)
    return jax.linear_transpose(self.gather, image)(x)[0]

  def block(self, batch: int, num_channels: int) -> int:
    """How many images to gather at once, a divisor of `batch`."""
    each = self.num[0] * self.num[1] * self.size[0] * self.size[1] * num_channels
    if batch * each <= _CACHE:
      return batch
    return max(n for n in range(1, batch + 1)
               if batch % n == 0 and (n == 1 or n * each <= _BLOCK))


def _taps(x, axis, size, stride):
  """The first, second ... pixel of each window of `size` pixels along `axis`."""
  num = (x.shape[axis] - size) // stride + 1
  if stride == 1:
    phases = [x]
  else:  # split, not strided slices: the gradient is one concatenation
    padding = [(0, 0)] * x.ndim
    padding[axis] = 0, -x.shape[axis] % stride
    shape = (*x.shape[:axis], -1, stride, *x.shape[axis + 1:])
    phases = [phase.squeeze(axis + 1) for phase in jnp.split(
        jnp.pad(x, padding).reshape(shape), stride, axis=axis + 1)]
  return [jax.lax.slice_in_dim(
      phases[i % stride], i // stride, i // stride + num, axis=axis)
          for i in range(size)]


# Two convolutions that are each other's transpose in the images, and share
# their gradient in the kernel. The latter contracts the long axes of both
# factors; with the wide factor second it is twice as fast on the CPU.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather_multiply(windows, blocked, x, kernel):
  """windows.gather(x) [..., n] times kernel [O, n]."""
  return _map_blocks(lambda x: windows.gather(x) @ kernel.T,
                     windows, blocked, x.shape[-1], x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _multiply_scatter(windows, blocked, x, kernel):
  """windows.scatter(x times kernel) where kernel is [I, n]."""
  return _map_blocks(lambda x: windows.scatter(x @ kernel), windows, blocked,
                     kernel.shape[1] // math.prod(windows.size), x)


def _correlate(windows, blocked, wide, narrow):
  """[narrow's channels, n], the kernel's gradient."""
  def correlate(wide, narrow):
    rows = windows.gather(wide)
    return narrow.reshape(-1, narrow.shape[-1]).T @ rows.reshape(
        -1, rows.shape[-1])

  return _sum_blocks(
      correlate, windows, blocked, wide.shape[-1], wide, narrow)


_gather_multiply.defvjp(
    lambda windows, blocked, x, kernel: (
        _gather_multiply(windows, blocked, x, kernel), (x, kernel)),
    lambda windows, blocked, saved, cotangent: (
        _multiply_scatter(windows, blocked, cotangent, saved[1]),
        _correlate(windows, blocked, saved[0], cotangent)))

_multiply_scatter.defvjp(
    lambda windows, blocked, x, kernel: (
        _multiply_scatter(windows, blocked, x, kernel), (x, kernel)),
    lambda windows, blocked, saved, cotangent: (
        _gather_multiply(windows, blocked, cotangent, saved[1]),
        _correlate(windows, blocked, cotangent, saved[0])))


def _blocks(windows, blocked, num_channels, arrays):
  """The arrays in blocks of images, [blocks, images, ...]; None for one."""
  batch = len(arrays[0])
  size = windows.block(batch, num_channels) if blocked else batch
  if size == batch:
    return None
  return [a.reshape(-1, size, *a.shape[1:]) for a in arrays]


def _map_blocks(function, windows, blocked, num_channels, x):
  blocks = _blocks(windows, blocked, num_channels, [x])
  if blocks is None:
    return function(x)
  out = jax.lax.map(function, *blocks)
  return out.reshape(len(x), *out.shape[2:])


def _sum_blocks(function, windows, blocked, num_channels, *arrays):
  blocks = _blocks(windows, blocked, num_channels, arrays)
  if blocks is None:
    return function(*arrays)
  zero = jax.eval_shape(function, *(a[0] for a in blocks))
  return jax.lax.scan(
      lambda total, block: (total + function(*block), None),
      jnp.zeros(zero.shape, zero.dtype), blocks)[0]


class Conv(nn.Module):
  """Convolution with zero padding, see `convolve`.

  Attributes:
    features: output channels.
    size: of the kernel, in both directions.
    use_bias: whether to add a bias.
    implementation: see `convolve`.
    enlarge: whether the image is first enlarged by 2 (nearest neighbour).
    stride: in both directions, 1 with `enlarge`.
    valid: see `convolve`; False with `enlarge`.
    kernel_init: initialisation of the kernel.
    bias_init: initialisation of the bias, None for PyTorch's default.
  """
  features: int
  size: int
  use_bias: bool = True
  implementation: str = 'matmul'
  enlarge: bool = False
  stride: int = 1
  valid: bool = False
  kernel_init: Callable = kernel_init
  bias_init: Callable | None = None

  @nn.compact
  def __call__(self, x):
    if self.enlarge and (self.stride != 1 or self.valid):
      raise ValueError('enlarge needs stride 1 and valid=False, got '
                       f'stride={self.stride}, valid={self.valid}.')
    num_in = x.shape[-1]
    kernel = self.param('kernel', self.kernel_init,
                        (self.size, self.size, num_in, self.features))
    if self.enlarge:
      x = convolve_enlarged(x, kernel, self.implementation)
    else:
      x = convolve(x, kernel, self.implementation, self.stride, self.valid)
    if self.use_bias:
      init = self.bias_init or bias_init(self.size**2 * num_in)
      x += self.param('bias', init, (self.features,))
    return x


class Dense(nn.Module):
  """Linear layer with PyTorch's default initialisation."""
  features: int

  @nn.compact
  def __call__(self, x):
    return nn.Dense(
        self.features, param_dtype=jnp.result_type(float), name='linear',
        kernel_init=kernel_init, bias_init=bias_init(x.shape[-1]))(x)


class BatchNorm(nn.Module):
  """Batch normalisation over all axes but the last, for padded batches.

  Moments are those of the valid examples alone; a batch without a valid example
  leaves the running statistics as they were. In training padding becomes zero,
  before scale and bias.

  Attributes:
    affine: whether to learn a scale and a bias.
    momentum: weight of the new moments in the running ones.
    epsilon: added to the variance.
    unbiased: whether the running variance takes the unbiased estimate, as
      PyTorch's does; the normalisation itself always takes the biased one.
  """
  affine: bool = True
  momentum: float = BATCH_NORM_MOMENTUM
  epsilon: float = 1e-5
  unbiased: bool = True

  @nn.compact
  def __call__(self, x, mask=None, train=False):
    channels = x.shape[-1]
    mean = self.variable('batch_stats', 'mean', jnp.zeros, (channels,))
    var = self.variable('batch_stats', 'var', jnp.ones, (channels,))
    if train:
      batch_mean, batch_var, count = _moments(x, mask)
      if not self.is_initializing():
        scale = count / jnp.maximum(count - 1, 1) if self.unbiased else 1.
        step = self.momentum * (count > 0)
        mean.value += step * (batch_mean - mean.value)
        var.value += step * (scale * batch_var - var.value)
    else:
      batch_mean, batch_var = mean.value, var.value
    x -= batch_mean
    if train and mask is not None:
      # Where one example or none is valid the variance may be 0, and padding
      # grow by 1 / sqrt(epsilon) in each norm, up to 0 * inf in the gradient.
      x = jnp.where(_along(mask, x), x, 0)
    x *= jax.lax.rsqrt(batch_var + self.epsilon)
    if self.affine:
      x *= self.param('scale', nn.initializers.ones, (channels,))
      x += self.param('bias', nn.initializers.zeros, (channels,))
    return x


def _moments(x, mask):
  """Mean and biased variance per channel, and the number of values in them."""
  if mask is None:
    mask = jnp.ones(len(x), bool)
  weight = _along(mask, x).astype(x.dtype)
  count = jnp.sum(weight) * (x[0].size // x.shape[-1])
  axes = tuple(range(x.ndim - 1))
  mean = jnp.sum(weight * x, axes) / jnp.maximum(count, 1)
  var = jnp.sum(weight * (x - mean) ** 2, axes) / jnp.maximum(count, 1)
  return mean, var, count


def _along(mask, x):
  """The mask of examples in the rank of x."""
  return mask.reshape((-1,) + (1,) * (x.ndim - 1))


class Norm(nn.Module):
  """The normalisation that a model was asked for: none, batch or group."""
  kind: str = 'none'
  num_groups: int = 2
  unbiased: bool = True  # see `BatchNorm`

  @nn.compact
  def __call__(self, x, mask=None, train=False):
    if self.kind == 'batch':
      return BatchNorm(unbiased=self.unbiased, name='batch')(x, mask, train)
    if self.kind == 'group':
      return nn.GroupNorm(self.num_groups, epsilon=1e-5, name='group',
                          param_dtype=jnp.result_type(float))(x)
    return x


class ConvNorm(nn.Module):
  """A convolution and the norm behind it, initialised as torchvision's.

  Attributes:
    features: output channels.
    size: of the kernel.
    options: norm and implementation.
    stride: of the convolution.
    bias_before_norm: whether the convolution has a bias even if a norm follows;
      without a norm it always has one.
    kernel_init: initialisation of the kernel; biases start at zero.
  """
  features: int
  size: int
  options: Options
  stride: int = 1
  bias_before_norm: bool = False
  kernel_init: Callable = kaiming_init

  @nn.compact
  def __call__(self, x, mask=None, train=False):
    options = self.options
    use_bias = self.bias_before_norm or options.norm == 'none'
    x = Conv(self.features, self.size, use_bias, options.conv,
             stride=self.stride, kernel_init=self.kernel_init,
             bias_init=nn.initializers.zeros, name='conv')(x)
    norm = Norm(options.norm, unbiased=options.torch_bn, name='norm')
    return norm(x, mask, train)


def head(
    x: jax.Array, num_classes: int, projection_dim: int = 0,
) -> tuple[jax.Array, jax.Array]:
  """The end of a classifier; its parameters belong to the calling module.

  With `projection_dim` it begins with the projection head of MOON (Li, He,
  Song, Model-Contrastive Federated Learning, CVPR 2021, arXiv:2103.16257):
  linear F -> F, ReLU, linear F -> `projection_dim`. MOON compares what comes
  out of it, and the output layer sees nothing else.

  A function, as a module of its own would put the output layer one level deeper
  into the parameters' tree.

  Args:
    x: [B, F].
    num_classes: C.
    projection_dim: P, 0 for no projection head.

  Returns:
    Logits [B, C], and the input of the output layer, [B, F] or [B, P].
  """
  if projection_dim:
    x = nn.relu(Dense(x.shape[-1], name='projection0')(x))
    x = Dense(projection_dim, name='projection1')(x)
  return Dense(num_classes, name='head')(x), x


def max_pool(
    x: jax.Array, size: int = 2, stride: int = 2, padding: int = 0,
) -> jax.Array:
  """Maximum over windows of size x size; what is left over is dropped.

  As maxima of shifted slices, first down and then across: on CPU the gradient
  takes less than half the time of that of `lax.reduce_window`.

  Args:
    x: [B, H, W, channels].
    size: of the windows.
    stride: of the windows.
    padding: -inf before and after, in both directions; at most size // 2.

  Returns:
    [B, (H + 2 padding - size) // stride + 1, likewise W, channels].
  """
  if (size, stride, padding) == (2, 2, 0):  # windows that do not overlap
    b, h, w, c = x.shape
    x = x[:, :h // 2 * 2, :w // 2 * 2]
    return jnp.max(x.reshape(b, h // 2, 2, w // 2, 2, c), axis=(2, 4))
  pad = padding, padding
  x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)), constant_values=-jnp.inf)
  for axis in (1, 2):
    x = functools.reduce(jnp.maximum, _taps(x, axis, size, stride))
  return x
