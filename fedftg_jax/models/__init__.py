"""Classifiers and the generator, as pairs of pure functions."""

from typing import Sequence

from flax import linen as nn
import jax.numpy as jnp

from fedftg_jax import base
from fedftg_jax.models import classifiers
from fedftg_jax.models.generator import image_generator

CLASSIFIERS = {
    'mlp': classifiers.mlp,
    'lenet': classifiers.lenet,
    'fedavg_cnn': classifiers.fedavg_cnn,
}


def build(
    name: str,
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    mean: Sequence[float] = (0.,),
    std: Sequence[float] = (1.,),
    norm: str = 'none',
    conv: str = 'im2col',
) -> base.Model:
  """A classifier by name.

  Args:
    name: a key of `CLASSIFIERS`.
    image_shape: (height, width, channels).
    num_classes: C.
    mean: per channel, of pixels scaled to [0, 1]; applied to uint8 images.
    std: likewise.
    norm: 'none', 'batch' or 'group' (2 groups), where the model has norms.
    conv: how convolutions are computed, see `layers.convolve`.

  Returns:
    The model.

  Raises:
    ValueError: for an unknown name, or images too small to be pooled.
  """
  if name not in CLASSIFIERS:
    raise ValueError(f'model must be one of {sorted(CLASSIFIERS)}, got {name!r}.')
  if name != 'mlp' and min(image_shape[:2]) < 4:
    raise ValueError(
        f'{name} needs images of at least 4 x 4, got {image_shape[0]} x '
        f'{image_shape[1]}.')
  module = CLASSIFIERS[name](num_classes, norm=norm, conv=conv)
  return from_flax(module, image_shape, mean, std)


def from_flax(
    module: nn.Module,
    image_shape: Sequence[int],
    mean: Sequence[float] = (0.,),
    std: Sequence[float] = (1.,),
) -> base.Model:
  """Wraps a linen module `(x, mask, train) -> (logits, features)`.

  Images of type uint8 are raw pixels and are scaled to [0, 1] and normalised
  here, inside the step; floats are taken as they are.
  """

  def normalise(x):
    if x.dtype != jnp.uint8:
      return x
    dtype = jnp.result_type(float)
    return (x.astype(dtype) / 255 - jnp.asarray(mean, dtype)) / jnp.asarray(
        std, dtype)

  def init(key):
    tree = module.init(key, jnp.zeros((1, *image_shape)))
    return base.Variables(tree['params'], tree.get('batch_stats', {}))

  def apply(variables, x, mask=None, train=False):
    tree = {'params': variables.params, 'batch_stats': variables.stats}
    x = normalise(x)
    if not train:
      logits, features = module.apply(tree, x, mask)
      return base.Output(logits, features, variables.stats)
    (logits, features), new = module.apply(
        tree, x, mask, True, mutable=['batch_stats'])
    return base.Output(logits, features, new.get('batch_stats', {}))

  return base.Model(init, apply)
