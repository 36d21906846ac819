"""Layers that know about padding, stacked clients and CPU convolutions."""

from typing import Callable

from flax import linen as nn
import jax
import jax.numpy as jnp

CONV_IMPLEMENTATIONS = ('im2col', 'rows', 'slices', 'lax')
NORMS = ('none', 'batch', 'group')

# PyTorch's default initialisation, U(-1, 1) / sqrt(fan_in), which the official
# codes of this field rely on.
kernel_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def bias_init(fan_in: int) -> Callable:
  """PyTorch's default bias initialisation, U(-1, 1) / sqrt(fan_in)."""
  def init(key, shape, dtype=None):
    bound = fan_in ** -.5
    dtype = dtype or jnp.result_type(float)
    return jax.random.uniform(key, shape, dtype, -bound, bound)
  return init


def convolve(x: jax.Array, kernel: jax.Array, implementation: str) -> jax.Array:
  """Convolution of stride 1 with zero padding that keeps the image size.

  A convolution with a kernel per client turns into a grouped convolution under
  `vmap`, and inside a loop the CPU backend runs any `lax.conv` on one slow
  path. As slices and a matrix product it stays a (batched) matrix product.

  Args:
    x: [B, H, W, I] images.
    kernel: [h, w, I, O].
    implementation: 'im2col' gathers the h * w shifted images and multiplies
      once; 'rows' gathers the w images shifted sideways, multiplies once for
      each row of the kernel, and adds; 'slices' multiplies each shifted image
      and adds; 'lax' is `jax.lax.conv_general_dilated`.

  Returns:
    [B, H, W, O] images.
  """
  if implementation == 'lax':
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  (h, w, num_in, num_out), (height, width) = kernel.shape, x.shape[1:3]
  padded = jnp.pad(x, ((0, 0), ((h - 1) // 2, h // 2),
                       ((w - 1) // 2, w // 2), (0, 0)))
  if implementation == 'slices':
    return sum(padded[:, i:i + height, j:j + width] @ kernel[i, j]
               for i in range(h) for j in range(w))
  if implementation == 'rows':
    sideways = jnp.concatenate(
        [padded[:, :, j:j + width] for j in range(w)], axis=-1)
    kernel = kernel.reshape(h, w * num_in, num_out)
    return sum(sideways[:, i:i + height] @ kernel[i] for i in range(h))
  patches = jnp.concatenate(
      [padded[:, i:i + height, j:j + width]
       for i in range(h) for j in range(w)], axis=-1)
  return patches @ kernel.reshape(-1, num_out)


def convolve_enlarged(
    x: jax.Array, kernel: jax.Array, implementation: str) -> jax.Array:
  """`convolve` of x enlarged by 2 (nearest neighbour), computed on x itself.

  Of the pixels that a 3 x 3 kernel covers in the enlarged image, those that
  stem from one pixel of x share a weight: the sum of theirs. One convolution of
  x with 4 O outputs, one for each position in a 2 x 2 block, gives the same
  result from patches a quarter of the size.

  Args:
    x: [B, H, W, I] images.
    kernel: [3, 3, I, O].
    implementation: see `convolve`.

  Returns:
    [B, 2 H, 2 W, O] images.
  """
  b, h, w, _ = x.shape
  tap = jnp.arange(3)
  source = (jnp.arange(2)[:, None] + tap - 1) // 2 + 1  # [position, tap]
  fold = (source[:, None] == tap[:, None]).astype(kernel.dtype)  # [a, p, u]
  folded = jnp.einsum('apu,bqv,uvio->pqiabo', fold, fold, kernel)
  out = convolve(x, folded.reshape(3, 3, x.shape[-1], -1), implementation)
  out = out.reshape(b, h, w, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)
  return out.reshape(b, 2 * h, 2 * w, -1)


class Conv(nn.Module):
  """Convolution of stride 1 that keeps the image size, see `convolve`.

  With `enlarge` the image is first enlarged by 2 (nearest neighbour).
  """
  features: int
  size: int
  use_bias: bool = True
  implementation: str = 'im2col'
  enlarge: bool = False

  @nn.compact
  def __call__(self, x):
    num_in = x.shape[-1]
    kernel = self.param('kernel', kernel_init,
                        (self.size, self.size, num_in, self.features))
    compute = convolve_enlarged if self.enlarge else convolve
    x = compute(x, kernel, self.implementation)
    if self.use_bias:
      x += self.param('bias', bias_init(self.size**2 * num_in),
                      (self.features,))
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
  leaves the running statistics as they were.

  Attributes:
    affine: whether to learn a scale and a bias.
    momentum: weight of the new moments in the running ones (PyTorch's 0.1).
    epsilon: added to the variance.
    unbiased: whether the running variance takes the unbiased estimate, as
      PyTorch's does; the normalisation itself always takes the biased one.
  """
  affine: bool = True
  momentum: float = .1
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
    x = (x - batch_mean) * jax.lax.rsqrt(batch_var + self.epsilon)
    if self.affine:
      x *= self.param('scale', nn.initializers.ones, (channels,))
      x += self.param('bias', nn.initializers.zeros, (channels,))
    return x


def _moments(x, mask):
  """Mean and biased variance per channel, and the number of values in them."""
  if mask is None:
    mask = jnp.ones(len(x), bool)
  weight = mask.reshape((-1,) + (1,) * (x.ndim - 1)).astype(x.dtype)
  count = jnp.sum(weight) * (x[0].size // x.shape[-1])
  axes = tuple(range(x.ndim - 1))
  mean = jnp.sum(weight * x, axes) / jnp.maximum(count, 1)
  var = jnp.sum(weight * (x - mean) ** 2, axes) / jnp.maximum(count, 1)
  return mean, var, count


class Norm(nn.Module):
  """The normalisation that a model was asked for: none, batch or group."""
  kind: str = 'none'
  num_groups: int = 2

  @nn.compact
  def __call__(self, x, mask=None, train=False):
    if self.kind == 'batch':
      return BatchNorm(name='batch')(x, mask, train)
    if self.kind == 'group':
      return nn.GroupNorm(self.num_groups, epsilon=1e-5, name='group',
                          param_dtype=jnp.result_type(float))(x)
    return x


def max_pool(x: jax.Array) -> jax.Array:
  """Maximum over windows of 2 x 2; an odd last row or column is dropped."""
  b, h, w, c = x.shape
  x = x[:, :h // 2 * 2, :w // 2 * 2]
  return jnp.max(x.reshape(b, h // 2, 2, w // 2, 2, c), axis=(2, 4))

