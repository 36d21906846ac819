"""Small classifiers, each giving logits and the input of its last layer.

`fedavg_cnn` is the CIFAR network of FedDyn's code and TensorFlow's tutorial
that FedAvg (McMahan et al., AISTATS 2017, arXiv:1602.05629) used, with SAME
padding.
"""

from collections.abc import Sequence

from flax import linen as nn

from fedftg_jax.models import layers


class MLP(nn.Module):
  """Fully connected layers with ReLU."""

  num_classes: int
  widths: Sequence[int] = (200, 200)
  projection_dim: int = 0

  @nn.compact
  def __call__(self, x, mask=None, train=False):
    x = x.reshape(len(x), -1)
    for i, width in enumerate(self.widths):
      x = nn.relu(layers.Dense(width, name=f'dense{i}')(x))
    return layers.head(x, self.num_classes, self.projection_dim)


class CNN(nn.Module):
  """Blocks of convolution, norm, 2 x 2 max pooling, ReLU; then a MLP.

  ReLU comes after the pooling: the result is the same, on a quarter of the
  values. A convolution in front of a BatchNorm has no bias.
  """

  num_classes: int
  conv_widths: Sequence[int]
  dense_widths: Sequence[int]
  options: layers.Variant
  size: int = 5

  @nn.compact
  def __call__(self, x, mask=None, train=False):
    options = self.options
    for i, width in enumerate(self.conv_widths):
      x = layers.Conv(
        width, self.size, options.norm != 'batch', options.conv, name=f'conv{i}'
      )(x)
      x = layers.Norm(options.norm, unbiased=options.torch_bn, name=f'norm{i}')(
        x, mask, train
      )
      x = nn.relu(layers.max_pool(x))
    return MLP(
      self.num_classes, self.dense_widths, options.projection_dim, name='mlp'
    )(x)


def mlp(num_classes: int, options=layers.Variant()) -> nn.Module:
  """Two hidden layers of 200."""
  return MLP(num_classes, projection_dim=options.projection_dim)


def lenet(num_classes: int, options=layers.Variant()) -> nn.Module:
  """conv5x5x32, pool, conv5x5x64, pool, fc128, fc."""
  return CNN(num_classes, (32, 64), (128,), options)


def fedavg_cnn(num_classes: int, options=layers.Variant()) -> nn.Module:
  """conv5x5x64, pool, conv5x5x64, pool, fc384, fc192, fc."""
  return CNN(num_classes, (64, 64), (384, 192), options)
