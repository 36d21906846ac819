"""Residual networks for ImageNet (as in torchvision) and for CIFAR.

Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun, Deep Residual Learning for
Image Recognition, CVPR 2016, arXiv:1512.03385. Blocks, projections and
initialisation follow torchvision.

Deviation: without norms, the last convolution of every residual branch starts
at zero, so every block starts as its shortcut. Signals then keep their size
through a deep network instead of growing with every block, and it trains.
"""

from collections.abc import Callable, Sequence
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

from fedftg_jax import base
from fedftg_jax.models import layers


class BasicBlock(nn.Module):
  """ReLU(shortcut + branch) with a branch of two 3 x 3 convolutions with norms.

  Attributes:
    features: channels of the 3 x 3 convolutions.
    stride: stride of the first 3 x 3 convolution and of the shortcut.
    project: whether a shortcut that changes shape is a 1 x 1 convolution with a
      norm, or else `subsample` (options B and A of the paper).
    options: see `layers.Variant`.
    width: share of the channels, see `slim`.
  """

  features: int
  stride: int
  project: bool
  options: layers.Variant
  width: float = 1.0

  @nn.compact
  def __call__(self, x, mask=None, train=False):
    features = slim(self.features, self.width)
    convs = (features, 3, self.stride), (features, 3, 1)
    return _residual(self, convs, x, mask, train)


class Bottleneck(BasicBlock):
  """ReLU(shortcut + branch) with a branch of 1 x 1, 3 x 3, 1 x 1 convolutions.

  The convolutions have norms, and the last has four times as many channels. The
  attributes are those of `BasicBlock`.
  """

  @nn.compact
  def __call__(self, x, mask=None, train=False):
    inner, outer = (slim(n * self.features, self.width) for n in (1, 4))
    convs = (inner, 1, 1), (inner, 3, self.stride), (outer, 1, 1)
    return _residual(self, convs, x, mask, train)


def _residual(block, convs, x, mask, train):
  """Computes ReLU(shortcut + branch) for a branch of `convs`.

  Each of `convs` is (features, size, stride). The parameters belong to the
  calling module.
  """
  options, (features, _, _) = block.options, convs[-1]
  inits = [layers.kaiming_init] * len(convs)
  if options.norm == 'none':
    inits[-1] = nn.initializers.zeros
  branch = x
  for i, (num_out, size, stride) in enumerate(convs):
    branch = layers.ConvNorm(
      num_out, size, options, stride, kernel_init=inits[i], name=f'conv{i}'
    )(nn.relu(branch) if i else branch, mask, train)
  if block.stride == 1 and x.shape[-1] == features:
    shortcut = x
  elif block.project:
    shortcut = layers.ConvNorm(
      features, 1, options, block.stride, name='shortcut'
    )(x, mask, train)
  else:
    shortcut = subsample(x, features, block.stride)
  return nn.relu(shortcut + branch)


def subsample(x: jax.Array, num_channels: int, stride: int) -> jax.Array:
  """Takes every `stride`-th pixel and pads with zeros to `num_channels`."""
  more = num_channels - x.shape[-1]
  return jnp.pad(x[:, ::stride, ::stride], ((0, 0),) * 3 + ((0, more),))


def slim(num_channels: int, width: float) -> int:
  """Returns how many channels a layer keeps at a share `width` of them.

  It is a multiple of 8, as in FedAlign's official code, but never more than
  there are.
  """
  if width == 1:
    return num_channels
  return min(num_channels, make_divisible(width * num_channels))


def make_divisible(value: float, divisor: int = 8) -> int:
  """Rounds to a multiple of `divisor` that is at least .9 of the value.

  The result is also at least 1.
  """
  nearest = max(1, int(value + divisor / 2) // divisor * divisor)
  return nearest if nearest >= 0.9 * value else nearest + divisor


class ResNet(nn.Module):
  """A stem, stages of blocks, the mean over the image, and a linear layer.

  Attributes:
    num_classes: C.
    widths: `features` of each stage's blocks; all stages but the first start
      with a stride of 2.
    num_blocks: number of blocks in each stage.
    imagenet_stem: whether the stem divides the image's height and width by 4,
      with a strided 7 x 7 convolution and max pooling; else it is a 3 x 3
      convolution.
    project: see `BasicBlock`.
    options: see `layers.Variant`.
    block: `BasicBlock` or `Bottleneck`.
  """

  num_classes: int
  widths: Sequence[int]
  num_blocks: int
  imagenet_stem: bool
  project: bool
  options: layers.Variant
  block: type[BasicBlock] = BasicBlock

  @nn.compact
  def __call__(self, x, mask=None, train=False):
    size, stride = (7, 2) if self.imagenet_stem else (3, 1)
    x = layers.ConvNorm(
      self.widths[0], size, self.options, stride, name='stem'
    )(x, mask, train)
    if self.imagenet_stem:
      x = layers.max_pool(x, 3, 2, 1)
    x = nn.relu(x)  # same result as before pooling, on a quarter of the values
    for i in range(len(self.widths)):
      before, x = x, _stage(self, i, 1.0, x, mask, train)
    layers.sow(self, 'stages', input=before, output=x)
    x = jnp.mean(x, (1, 2))
    return layers.head(x, self.num_classes, self.options.projection_dim)

  @nn.nowrap
  def last_stage(
    self,
    variables: base.Variables,
    x: jax.Array,
    mask: jax.Array | None,
    width: float,
  ) -> jax.Array:
    """Runs the slimmed last stage, see `base.LastStage`.

    The module need not be bound.

    Raises:
      ValueError: for a width that is not above 0 and at most 1.
    """
    if not 0 < width <= 1:
      raise ValueError(f'width must be above 0 and at most 1, got {width}.')
    x = x[..., : slim(x.shape[-1], width)]
    alone = _Alone(functools.partial(_stage, self, len(self.widths) - 1, width))
    shapes = jax.eval_shape(alone.init, jax.random.key(0), x)['params']
    params = jax.tree.map(
      lambda small, full: full[tuple(map(slice, small.shape))],
      shapes,
      {name: variables.params[name] for name in shapes},
    )
    return alone.apply(
      {'params': params}, x, mask, True, mutable=['batch_stats']
    )[0]


def _stage(net, index, width, x, mask=None, train=False):
  """Runs a stage at a share `width` of its channels.

  The parameters belong to the calling module.
  """
  for j in range(net.num_blocks):
    x = net.block(
      net.widths[index],
      2 if index and not j else 1,
      net.project,
      net.options,
      width,
      name=f'block{index}_{j}',
    )(x, mask, train)
  return x


class _Alone(nn.Module):
  """A part of a network by itself; its layers keep their names."""

  run: Callable

  @nn.compact
  def __call__(self, x, mask=None, train=False):
    return self.run(x, mask, train)


def resnet18(num_classes: int, options=layers.Variant('batch')) -> nn.Module:
  """Builds torchvision's ResNet-18.

  FedFTG's official code uses it with 32 x 32 images.
  """
  return ResNet(num_classes, (64, 128, 256, 512), 2, True, True, options)


def resnet18_cifar(
  num_classes: int, options=layers.Variant('batch')
) -> nn.Module:
  """Builds `resnet18` with a stem that keeps the image size."""
  return ResNet(num_classes, (64, 128, 256, 512), 2, False, True, options)


def resnet20(num_classes: int, options=layers.Variant('batch')) -> nn.Module:
  """Builds the paper's network for CIFAR; its shortcuts have no parameters."""
  return ResNet(num_classes, (16, 32, 64), 3, False, False, options)


def resnet56(num_classes: int, options=layers.Variant('batch')) -> nn.Module:
  """Builds FedAlign's network (arXiv:2111.14213).

  It has bottlenecks and projected shortcuts.
  """
  return ResNet(num_classes, (16, 32, 64), 6, False, True, options, Bottleneck)
