"""VGG with 11 layers, for small images.

Karen Simonyan, Andrew Zisserman, Very Deep Convolutional Networks for
Large-Scale Image Recognition, ICLR 2015, arXiv:1409.1556, configuration A.

Deviations that are usual for CIFAR: norms after the convolutions (which keep
their biases, as in torchvision's `vgg11_bn`), and one linear layer instead of
three. Our own deviation: pooling stops once the image is one pixel high or
wide, and the mean over the remaining pixels is the input of the linear layer.
"""

from collections.abc import Sequence

from flax import linen as nn
import jax.numpy as jnp

from fedftg_jax.models import layers


class VGG(nn.Module):
  """Stages of 3 x 3 convolutions with norm and ReLU, each ended by max pooling.

  Attributes:
    num_classes: C.
    stages: for each stage, the output channels of its convolutions.
    options: see `layers.Variant`.
  """

  num_classes: int
  stages: Sequence[Sequence[int]]
  options: layers.Variant

  @nn.compact
  def __call__(self, x, mask=None, train=False):
    for i, widths in enumerate(self.stages):
      for j, width in enumerate(widths):
        x = layers.ConvNorm(
          width, 3, self.options, bias_before_norm=True, name=f'conv{i}_{j}'
        )(x, mask, train)
        x = nn.relu(x)
      if min(x.shape[1:3]) >= 2:
        x = layers.max_pool(x)
    x = jnp.mean(x, (1, 2))
    return layers.head(x, self.num_classes, self.options.projection_dim)


def vgg11(num_classes: int, options=layers.Variant('batch')) -> nn.Module:
  """Builds 64, pool, 128, pool, 256, 256, pool, 2 x (512, 512, pool), fc.

  The numbers are the channels of 3 x 3 convolutions.
  """
  stages = (64,), (128,), (256, 256), (512, 512), (512, 512)
  return VGG(num_classes, stages, options)
