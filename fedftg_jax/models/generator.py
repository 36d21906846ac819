"""Conditional generators of images and of a classifier's features.

The generator of images is that of FedFTG's official code ("CGeneratorA"), the
generator of features that of FedGen.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fedftg_jax import base
from fedftg_jax.models import convolution, layers


class ImageGenerator(nn.Module):
  """Maps noise and label to an image with normalised channels.

  One linear layer for the noise and one for the one-hot label each give a
  feature map of a quarter of the image's height and width. Two blocks of
  enlargement by 2, convolution, BatchNorm and LeakyReLU follow. The image is
  the tanh of a last convolution, normalised per channel to zero mean and unit
  variance, without scale and bias.

  Attributes:
    image_shape: (height, width, channels), height and width divisible by 4.
    num_classes: C.
    width: channels of the last block (the code's `ngf`, 64 there).
    bias_before_norm: whether the two convolutions in front of a BatchNorm have
      a bias, as in the official code. The bias has no effect except on Adam's
      rounding errors.
    conv: see `convolution.convolve`.
  """

  image_shape: tuple[int, int, int]
  num_classes: int
  width: int = 64
  bias_before_norm: bool = True
  conv: str = 'matmul'

  @nn.compact
  def __call__(self, z, labels, train=False):
    height, width, channels = self.image_shape
    small = height // 4, width // 4, self.width
    one_hot = jax.nn.one_hot(labels, self.num_classes, dtype=z.dtype)
    maps = [
      layers.Dense(small[0] * small[1] * small[2], name=name)(v).reshape(
        -1, *small
      )
      for name, v in (('from_noise', z), ('from_label', one_hot))
    ]
    x = jnp.concatenate(maps, axis=-1)  # [B, H / 4, W / 4, 2 width]
    x = layers.BatchNorm(name='norm0')(x, train=train)
    for i, features in ((1, 2 * self.width), (2, self.width)):
      x = layers.Conv(
        features,
        3,
        self.bias_before_norm,
        self.conv,
        enlarge=True,
        name=f'conv{i}',
      )(x)
      x = layers.BatchNorm(name=f'norm{i}')(x, train=train)
      x = nn.leaky_relu(x, 0.2)
    x = nn.tanh(layers.Conv(channels, 3, True, self.conv, name='conv3')(x))
    return layers.BatchNorm(affine=False, name='norm3')(x, train=train)


def image_generator(
  image_shape: tuple[int, int, int],
  num_classes: int,
  *,
  noise_dim: int = 100,
  width: int = 64,
  bias_before_norm: bool = True,
  conv: str | None = None,
  dtype: DTypeLike | None = None,
) -> base.Generator:
  """Builds an image generator as a pair of functions, see `ImageGenerator`.

  Args:
    image_shape: (height, width, channels), height and width divisible by 4.
    num_classes: C.
    noise_dim: length of one noise vector.
    width: channels of the last block.
    bias_before_norm: see `ImageGenerator`.
    conv: see `convolution.convolve`; None for `convolution.default`.
    dtype: the type in which layers compute, None for the type of the weights.
      Images are at least float32.

  Returns:
    The generator.

  Raises:
    ValueError: if the image's height or width is not divisible by 4.
  """
  if image_shape[0] % 4 or image_shape[1] % 4:
    raise ValueError(
      'the generator makes images whose height and width are divisible by 4, '
      f'got image_shape={tuple(image_shape)}.'
    )
  module = ImageGenerator(
    tuple(image_shape),  # type: ignore[arg-type]
    num_classes,
    width,
    bias_before_norm,
    conv or convolution.default(),
  )

  return _functions(module, noise_dim, dtype)


def _functions(module, noise_dim, dtype=None) -> base.Generator:
  """Wraps a module as a pair of functions."""
  wide = layers.at_least_float32

  def init(key):
    tree = module.init(key, jnp.zeros((1, noise_dim)), jnp.zeros(1, jnp.int32))
    return base.Variables(tree['params'], tree['batch_stats'])

  def apply(variables, z, labels, train=False):
    tree = {'params': variables.params, 'batch_stats': variables.stats}
    z = z if dtype is None else z.astype(dtype)
    if not train:
      return wide(module.apply(tree, z, labels)), variables.stats
    made, new = module.apply(
      tree, z, labels, train=True, mutable=['batch_stats']
    )
    return wide(made), new['batch_stats']

  return base.Generator(init, apply, noise_dim)


class FeatureGenerator(nn.Module):
  """Maps noise and label to features: linear, BatchNorm, ReLU, linear.

  This is FedGen's generator (arXiv:2105.10056); its output has no activation.

  Attributes:
    num_features: F.
    num_classes: C.
    hidden: width between the two layers.
  """

  num_features: int
  num_classes: int
  hidden: int = 256

  @nn.compact
  def __call__(self, z, labels, train=False):
    one_hot = jax.nn.one_hot(labels, self.num_classes, dtype=z.dtype)
    x = jnp.concatenate([z, one_hot], axis=-1)
    x = layers.Dense(self.hidden, name='dense0')(x)
    x = nn.relu(layers.BatchNorm(name='norm0')(x, train=train))
    return layers.Dense(self.num_features, name='dense1')(x)


def feature_generator(
  num_features: int, num_classes: int, *, hidden: int = 256, noise_dim: int = 32
) -> base.Generator:
  """Builds a generator of features [B, F], see `FeatureGenerator`.

  Args:
    num_features: F.
    num_classes: C.
    hidden: width between the two layers.
    noise_dim: length of one noise vector.

  Returns:
    The generator.
  """
  module = FeatureGenerator(num_features, num_classes, hidden)
  return _functions(module, noise_dim)
