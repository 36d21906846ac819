"""Small classifiers that return logits and the input of their last layer.

`fedavg_cnn` is the CIFAR network of FedDyn's code and of the TensorFlow
tutorial that FedAvg (McMahan et al., AISTATS 2017, arXiv:1602.05629) used, with
SAME padding.

`convnet` is the network of a public re-implementation of FedDM (Xiong et al.,
CVPR 2023, arXiv:2207.09653), which took it from dataset distillation.
`fedgen_cnn` is that of FedGen's official code (Zhu, Hong and Zhou, ICML 2021,
arXiv:2105.10056), whose generator makes the input of the last layer: there is
no ReLU in front of it.
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
  """Blocks of convolution, norm, 2 x 2 max pooling and ReLU, then an MLP.

  ReLU comes after the pooling: the result is the same, on a quarter of the
  values. A convolution in front of a BatchNorm has no bias.
  """

  num_classes: int
  conv_widths: Sequence[int]
  dense_widths: Sequence[int]
  options: layers.Variant
  size: int = 5
  valid: bool = False  # whether convolutions have no padding

  @nn.compact
  def __call__(self, x, mask=None, train=False):
    options = self.options
    for i, width in enumerate(self.conv_widths):
      x = layers.Conv(
        width,
        self.size,
        options.norm != 'batch',
        options.conv,
        valid=self.valid,
        pool=options.norm == 'none',
        name=f'conv{i}',
      )(x)
      if options.norm != 'none':
        norm = layers.Norm(
          options.norm, unbiased=options.torch_bn, name=f'norm{i}'
        )
        x = layers.max_pool(norm(x, mask, train))
      x = nn.relu(x)
    return MLP(
      self.num_classes, self.dense_widths, options.projection_dim, name='mlp'
    )(x)


class ConvNet(nn.Module):
  """Blocks of 3 x 3 convolution, norm, ReLU, mean pooling; then a linear layer.

  The pooling is 2 x 2. Convolutions have biases, whatever the norm.
  """

  num_classes: int
  widths: Sequence[int]
  options: layers.Variant

  @nn.compact
  def __call__(self, x, mask=None, train=False):
    options = self.options
    for i, width in enumerate(self.widths):
      x = layers.Conv(width, 3, True, options.conv, name=f'conv{i}')(x)
      x = layers.Norm(options.norm, unbiased=options.torch_bn, name=f'norm{i}')(
        x, mask, train
      )
      x = layers.mean_pool(nn.relu(x))
    x = x.reshape(len(x), -1)
    return layers.head(x, self.num_classes, options.projection_dim)


class FedGenCNN(nn.Module):
  """Blocks of strided 3 x 3 convolution, norm and ReLU, then two linear layers.

  The stride is 2. There is nothing between the two linear layers. Convolutions
  have biases, whatever the norm.

  Attributes:
    num_classes: C.
    conv_widths: output channels of the convolutions.
    num_features: outputs of the first linear layer.
    options: see `layers.Variant`.
    pool: whether each block ends with 2 x 2 max pooling.
  """

  num_classes: int
  conv_widths: Sequence[int] = (6, 16)
  num_features: int = 32
  options: layers.Variant = layers.Variant('batch')
  pool: bool = False

  @nn.compact
  def __call__(self, x, mask=None, train=False):
    options = self.options
    for i, width in enumerate(self.conv_widths):
      x = layers.Conv(width, 3, True, options.conv, stride=2, name=f'conv{i}')(
        x
      )
      x = layers.Norm(options.norm, unbiased=options.torch_bn, name=f'norm{i}')(
        x, mask, train
      )
      x = nn.relu(layers.max_pool(x) if self.pool else x)
    x = layers.Dense(self.num_features, name='dense0')(x.reshape(len(x), -1))
    return layers.head(x, self.num_classes, options.projection_dim)


def softmax(num_classes: int, options=layers.Variant()) -> nn.Module:
  """Builds softmax regression: one linear layer."""
  return MLP(num_classes, (), options.projection_dim)


def mlp(num_classes: int, options=layers.Variant()) -> nn.Module:
  """Builds an MLP with two hidden layers of width 200."""
  return MLP(num_classes, projection_dim=options.projection_dim)


def lenet(num_classes: int, options=layers.Variant()) -> nn.Module:
  """Builds conv5x5x32, pool, conv5x5x64, pool, fc128, fc."""
  return CNN(num_classes, (32, 64), (128,), options)


def fedavg_cnn(num_classes: int, options=layers.Variant()) -> nn.Module:
  """Builds conv5x5x64, pool, conv5x5x64, pool, fc384, fc192, fc."""
  return CNN(num_classes, (64, 64), (384, 192), options)


def convnet(num_classes: int, options=layers.Variant('instance')) -> nn.Module:
  """Builds 3 x (conv3x3x128, norm, ReLU, mean pooling), fc."""
  return ConvNet(num_classes, (128, 128, 128), options)


def fedgen_cnn(num_classes: int, options=layers.Variant('batch')) -> nn.Module:
  """Builds 2 x (conv3x3 of stride 2, norm, ReLU), fc32, fc.

  The convolutions have 6 and 16 channels.
  """
  return FedGenCNN(num_classes, options=options)


def pfllib_cnn(num_classes: int, options=layers.Variant()) -> nn.Module:
  """Builds conv5x5x32, pool, conv5x5x64, pool, fc512, fc, without padding.

  It is FedAvgCNN of PFLlib (Zhang et al., arXiv:2312.04992).
  """
  return CNN(num_classes, (32, 64), (512,), options, valid=True)


def niid_cnn(num_classes: int, options=layers.Variant()) -> nn.Module:
  """Builds conv5x5x6, pool, conv5x5x16, pool, fc120, fc84, fc, without padding.

  It is SimpleCNN of NIID-Bench (Li et al., ICDE 2022, arXiv:2102.02079).
  """
  return CNN(num_classes, (6, 16), (120, 84), options, valid=True)
