"""Layers that handle padding and stacked clients.

A layer computes in the type of its input: weights are cast to that type for the
computation, and are stored in their own. The input of a model therefore chooses
its precision. Norms and `head` compute at least in float32.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from fedftg_jax.models import convolution, windows

NORMS = ('none', 'batch', 'group', 'instance')
BATCH_NORM_MOMENTUM = 0.1  # as in PyTorch: weight of the new moments

# PyTorch's default initialisation, U(-1, 1) / sqrt(fan_in), which the official
# codes of this field rely on.
kernel_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')

# Kaiming normal with fan_out, which torchvision uses for convolutions.
kaiming_init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


class Variant(NamedTuple):
  """The options that apply to a classifier as a whole."""

  norm: str = 'none'  # one of `NORMS`, see `Norm`
  conv: str = 'matmul'  # one of `convolution.IMPLEMENTATIONS`
  projection_dim: int = 0  # width of the projection, 0 for none, see `head`
  torch_bn: bool = True  # see `BatchNorm.unbiased`


def bias_init(fan_in: int) -> Callable:
  """Makes PyTorch's initialisation of biases, U(-1, 1) / sqrt(fan_in)."""

  def init(key, shape, dtype=None):
    bound = fan_in**-0.5
    dtype = dtype or jnp.result_type(float)
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


class Conv(nn.Module):
  """A convolution with zero padding, see `convolution.convolve`.

  Attributes:
    features: output channels.
    size: height and width of the kernel.
    use_bias: whether to add a bias.
    implementation: see `convolution.convolve`.
    enlarge: whether the image is first enlarged by 2 (nearest neighbour).
    stride: stride in both directions; must be 1 with `enlarge`.
    valid: see `convolution.convolve`; must be False with `enlarge`.
    pool: whether to max-pool over 2 x 2. The bias is added afterwards, which
      gives the same values and is less work.
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
  pool: bool = False
  kernel_init: Callable = kernel_init
  bias_init: Callable | None = None

  @nn.compact
  def __call__(self, x):
    if self.enlarge and (self.stride != 1 or self.valid):
      raise ValueError(
        'enlarge needs stride 1 and valid=False, got '
        f'stride={self.stride}, valid={self.valid}.'
      )
    num_in, dtype = x.shape[-1], x.dtype
    kernel = self.param(
      'kernel', self.kernel_init, (self.size, self.size, num_in, self.features)
    )
    if self.enlarge:
      x = convolution.convolve_enlarged(x, kernel, self.implementation)
    else:
      x = convolution.convolve(
        x, kernel, self.implementation, self.stride, self.valid
      )
    if self.pool:
      x = max_pool(x)
    if self.use_bias:
      init = self.bias_init or bias_init(self.size**2 * num_in)
      x += self.param('bias', init, (self.features,)).astype(dtype)
    return x


class Dense(nn.Module):
  """A linear layer with PyTorch's default initialisation."""

  features: int

  @nn.compact
  def __call__(self, x):
    return nn.Dense(
      self.features,
      dtype=x.dtype,
      param_dtype=jnp.result_type(float),
      name='linear',
      kernel_init=kernel_init,
      bias_init=bias_init(x.shape[-1]),
    )(x)


class BatchNorm(nn.Module):
  """Batch normalisation over all axes but the last, for padded batches.

  Only valid examples enter the mean and the variance; a batch without a valid
  example leaves the running statistics unchanged. In training, padding becomes
  zero before scale and bias are applied.

  The mean and the biased variance of a batch are sown into 'moments', also when
  the running statistics normalise.

  Attributes:
    affine: whether to learn a scale and a bias.
    momentum: weight of the new moments in the running ones.
    epsilon: added to the variance.
    unbiased: whether the running variance uses the unbiased estimate, as in
      PyTorch; the normalisation itself always uses the biased one.
  """

  affine: bool = True
  momentum: float = BATCH_NORM_MOMENTUM
  epsilon: float = 1e-5
  unbiased: bool = True

  @nn.compact
  def __call__(self, x, mask=None, train=False):
    channels, dtype = x.shape[-1], x.dtype
    x = at_least_float32(x)
    mean = self.variable('batch_stats', 'mean', jnp.zeros, (channels,))
    var = self.variable('batch_stats', 'var', jnp.ones, (channels,))
    if train or self.is_mutable_collection('moments'):
      batch_mean, batch_var, count = _moments(x, mask)
      sow(self, 'moments', mean=batch_mean, var=batch_var)
    if train:
      if not self.is_initializing():
        scale = count / jnp.maximum(count - 1, 1) if self.unbiased else 1.0
        step = self.momentum * (count > 0)
        mean.value += step * (batch_mean - mean.value)
        var.value += step * (scale * batch_var - var.value)
    else:
      batch_mean, batch_var = mean.value, var.value
    x -= batch_mean
    if train and mask is not None:
      # With at most one valid example the variance may be 0. Padding would
      # then grow by 1 / sqrt(epsilon) in each norm, and finally give 0 * inf in
      # the gradient.
      x = jnp.where(_along(mask, x), x, 0)
    x *= jax.lax.rsqrt(batch_var + self.epsilon)
    if self.affine:
      x *= self.param('scale', nn.initializers.ones, (channels,))
      x += self.param('bias', nn.initializers.zeros, (channels,))
    return x.astype(dtype)


def sow(module: nn.Module, collection: str, **values: jax.Array) -> None:
  """Stores values in `collection`, for callers that make it mutable."""
  if not module.is_initializing():
    for name, value in values.items():
      module.sow(
        collection,
        name,
        value,
        reduce_fn=lambda _, new: new,
        init_fn=lambda: None,
      )


def at_least_float32(x: jax.Array) -> jax.Array:
  """Casts `x` to float32 if its type is shorter."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _moments(x, mask):
  """Computes mean and biased variance per channel, and the number of values."""
  if mask is None:
    mask = jnp.ones(len(x), bool)
  weight = _along(mask, x).astype(x.dtype)
  count = jnp.sum(weight) * (x[0].size // x.shape[-1])
  axes = tuple(range(x.ndim - 1))
  mean = jnp.sum(weight * x, axes) / jnp.maximum(count, 1)
  var = jnp.sum(weight * (x - mean) ** 2, axes) / jnp.maximum(count, 1)
  return mean, var, count


def _along(mask, x):
  """Reshapes a mask of examples to the rank of x."""
  return mask.reshape((-1,) + (1,) * (x.ndim - 1))


class Norm(nn.Module):
  """A normalisation layer: none, batch, group or instance.

  Instance normalisation normalises each channel of an image by itself.
  """

  kind: str = 'none'
  num_groups: int = 2
  unbiased: bool = True  # see `BatchNorm`

  @nn.compact
  def __call__(self, x, mask=None, train=False):
    if self.kind == 'batch':
      return BatchNorm(unbiased=self.unbiased, name='batch')(x, mask, train)
    if self.kind == 'group':
      norm = nn.GroupNorm(
        self.num_groups,
        epsilon=1e-5,
        name='group',
        param_dtype=jnp.result_type(float),
      )
      return norm(at_least_float32(x)).astype(x.dtype)
    if self.kind == 'instance':
      norm = nn.InstanceNorm(
        epsilon=1e-5,
        use_fast_variance=False,
        name='instance',
        param_dtype=jnp.result_type(float),
      )
      return norm(at_least_float32(x)).astype(x.dtype)
    return x


class ConvNorm(nn.Module):
  """A convolution followed by a norm, initialised as in torchvision.

  Attributes:
    features: output channels.
    size: height and width of the kernel.
    options: the norm and the implementation.
    stride: stride of the convolution.
    bias_before_norm: whether the convolution has a bias even if a norm follows;
      without a norm it always has one.
    kernel_init: initialisation of the kernel; biases start at zero.
  """

  features: int
  size: int
  options: Variant
  stride: int = 1
  bias_before_norm: bool = False
  kernel_init: Callable = kaiming_init

  @nn.compact
  def __call__(self, x, mask=None, train=False):
    options = self.options
    use_bias = self.bias_before_norm or options.norm == 'none'
    x = Conv(
      self.features,
      self.size,
      use_bias,
      options.conv,
      stride=self.stride,
      kernel_init=self.kernel_init,
      bias_init=nn.initializers.zeros,
      name='conv',
    )(x)
    norm = Norm(options.norm, unbiased=options.torch_bn, name='norm')
    return norm(x, mask, train)


def head(
  x: jax.Array, num_classes: int, projection_dim: int = 0
) -> tuple[jax.Array, jax.Array]:
  """Applies the end of a classifier: optional projection, then output layer.

  With `projection_dim` it starts with the projection head of MOON (Li, He,
  Song, Model-Contrastive Federated Learning, CVPR 2021, arXiv:2103.16257):
  linear F -> F, ReLU, linear F -> `projection_dim`. MOON compares its outputs,
  which are also the only input of the output layer.

  The parameters belong to the calling module. This is a function because a
  module of its own would put the output layer one level deeper into the
  parameter tree.

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
  x = at_least_float32(x)
  return Dense(num_classes, name='head')(x), x


@jax.custom_jvp
def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
  """Computes the elementwise maximum; NaN where either value is NaN.

  Its derivative compares the two values with each other, and is that of the
  first where they are equal. That of `jnp.max` searches the stored maximum
  among arguments that XLA may have computed again with other rounding. It can
  then find none and give 0 / 0.
  """
  return jnp.maximum(a, b)


@_larger.defjvp
def _larger_jvp(values, tangents):
  a, b = values
  return _larger(a, b), jnp.where(a >= b, *tangents)


def mean_pool(x: jax.Array) -> jax.Array:
  """Averages over windows of 2 x 2; an odd last row or column is dropped.

  Args:
    x: [B, H, W, channels].

  Returns:
    [B, H // 2, W // 2, channels].
  """
  for axis in (1, 2):
    x = sum(windows.taps(x, axis, 2, 2)) / 2
  return x


def max_pool(
  x: jax.Array, size: int = 2, stride: int = 2, padding: int = 0
) -> jax.Array:
  """Takes maxima over windows of size x size; incomplete windows are dropped.

  It computes maxima of shifted slices, first down and then across: on a CPU
  this is faster than `lax.reduce_window` and than `jnp.max` over a reshaped
  image. Of several equal values one gets the whole gradient: the uppermost of
  the leftmost column that has one.

  Args:
    x: [B, H, W, channels].
    size: height and width of the windows.
    stride: stride of the windows.
    padding: number of -inf before and after, in both directions; at most size
      // 2.

  Returns:
    [B, (H + 2 padding - size) // stride + 1, likewise W, channels].
  """
  pad = padding, padding
  if padding:
    x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)), constant_values=-jnp.inf)
  batch, height, width, channels = x.shape
  rows = x.reshape(batch, height, width * channels)  # long rows to compare
  x = functools.reduce(_larger, windows.taps(rows, 1, size, stride))
  x = x.reshape(batch, x.shape[1], width, channels)
  return functools.reduce(_larger, windows.taps(x, 2, size, stride))
