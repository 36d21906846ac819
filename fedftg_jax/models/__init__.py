"""Classifiers and generators, as pairs of pure functions."""

from collections.abc import Sequence
import contextlib
import functools
import re
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fedftg_jax import base
from fedftg_jax.models import (
  calls,
  classifiers,
  convolution,
  layers,
  resnet,
  vgg,
)
from fedftg_jax.models.generator import feature_generator, image_generator

CLASSIFIERS = {
  'softmax': classifiers.softmax,
  'mlp': classifiers.mlp,
  'lenet': classifiers.lenet,
  'fedavg_cnn': classifiers.fedavg_cnn,
  'fedgen_cnn': classifiers.fedgen_cnn,
  'convnet': classifiers.convnet,
  'pfllib_cnn': classifiers.pfllib_cnn,
  'niid_cnn': classifiers.niid_cnn,
  'resnet18': resnet.resnet18,
  'resnet18_cifar': resnet.resnet18_cifar,
  'resnet20': resnet.resnet20,
  'resnet56': resnet.resnet56,
  'vgg11': vgg.vgg11,
}

# The default norm of each classifier.
DEFAULT_NORMS = {
  'softmax': 'none',
  'mlp': 'none',
  'lenet': 'none',
  'fedavg_cnn': 'none',
  'fedgen_cnn': 'batch',
  'convnet': 'instance',
  'pfllib_cnn': 'none',
  'niid_cnn': 'none',
  'resnet18': 'batch',
  'resnet18_cifar': 'batch',
  'resnet20': 'batch',
  'resnet56': 'batch',
  'vgg11': 'batch',
}

# Smallest height and width of images; other models take images of any size.
_MIN_SIZES = {
  'lenet': 4,
  'fedavg_cnn': 4,
  'convnet': 8,
  'pfllib_cnn': 16,
  'niid_cnn': 16,
}


def build(
  name: str,
  image_shape: tuple[int, int, int],
  num_classes: int,
  *,
  mean: Sequence[float] = (0.0,),
  std: Sequence[float] = (1.0,),
  norm: str | None = None,
  conv: str | None = None,
  projection_dim: int = 0,
  torch_bn: bool = True,
  dtype: DTypeLike | None = None,
) -> base.Model:
  """Builds a classifier by name.

  Args:
    name: a key of `CLASSIFIERS`.
    image_shape: (height, width, channels).
    num_classes: C.
    mean: mean per channel of pixels scaled to [0, 1]; used to normalise uint8
      images.
    std: standard deviation per channel, likewise.
    norm: 'none', 'batch', 'group' (2 groups) or 'instance', for models with
      normalisation layers; None for the model's default, see `DEFAULT_NORMS`.
    conv: implementation of convolutions, see `convolution.convolve`; None for
      what suits the device, see `convolution.default`.
    projection_dim: width of MOON's projection head, 0 for a model without one,
      see `layers.head`.
    torch_bn: whether BatchNorm's running variance uses the unbiased estimate,
      as in PyTorch, or the biased one, as in Flax.
    dtype: see `from_flax`.

  Returns:
    The model.

  Raises:
    ValueError: for an unknown name, norm or conv, a negative projection_dim, or
      images that are too small to be pooled.
  """
  _check('model', name, sorted(CLASSIFIERS))
  norm = DEFAULT_NORMS[name] if norm is None else norm
  _check('norm', norm, layers.NORMS)
  conv = convolution.default() if conv is None else conv
  _check('conv', conv, convolution.IMPLEMENTATIONS)
  if projection_dim < 0:
    raise ValueError(
      f'projection_dim must be at least 0, got {projection_dim}.'
    )
  size = _MIN_SIZES.get(name, 1)
  if min(image_shape[:2]) < size:
    raise ValueError(
      f'{name} needs images of at least {size} x {size}, got '
      f'{image_shape[0]} x {image_shape[1]}.'
    )
  options = layers.Variant(norm, conv, projection_dim, torch_bn)
  module = CLASSIFIERS[name](num_classes, options)
  return wrap(module, image_shape, mean, std, dtype)._replace(head=_HEAD)


def _check(what, value, choices):
  if value not in choices:
    raise ValueError(f'{what} must be one of {list(choices)}, got {value!r}.')


def from_flax(
  module: nn.Module,
  image_shape: Sequence[int],
  mean: Sequence[float] = (0.0,),
  std: Sequence[float] = (1.0,),
  dtype: DTypeLike | None = None,
) -> base.Model:
  """Wraps a linen module.

  The module takes the images and, if it has arguments of these names, `train`
  (or `training`, `is_training`, `deterministic`, `use_running_average`) and
  `mask`, [B], False on padding. If it takes no mask, its `nn.BatchNorm`s get
  the mask directly, so that padding never changes statistics. It returns
  (logits, features), where features are the input of the last layer, or logits
  alone; methods that need features then refuse the model.

  The model has a head if the module has exactly one linear layer named 'head',
  as `layers.head` makes it. It has a last stage if the module has a method
  `last_stage`, and stages if the module sows their 'input' and 'output' into
  'stages', as `resnet.ResNet` does. It has moments if all of its BatchNorms are
  `layers.BatchNorm`.

  Images of type uint8 are raw pixels: they are scaled to [0, 1] and normalised
  here, inside the step. Float images are used as they are.

  Args:
    module: the module.
    image_shape: (height, width, channels).
    mean: see `build`.
    std: see `build`.
    dtype: the type in which layers compute, such as bfloat16; None for the type
      of the weights. Weights, norms, the last layer and all losses keep theirs.

  Returns:
    The model.
  """
  return with_pieces(wrap(module, image_shape, mean, std, dtype), image_shape)


def with_pieces(model: base.Model, image_shape: Sequence[int]) -> base.Model:
  """Adds the head to a model that has one, and looks for its features."""
  variables = jax.eval_shape(model.init, jax.random.key(0))
  heads = _heads(variables)
  if len(heads) == 1 and heads[0]['kernel'].ndim == 2:
    model = model._replace(head=_HEAD)
  x = jax.ShapeDtypeStruct((1, *image_shape), jnp.result_type(float))
  no_features = jax.eval_shape(model.apply, variables, x).features == ()
  return model._replace(features=None) if no_features else model


def need(model: base.Model, piece: str, method: str) -> Any:
  """Returns a piece of a model that a method requires.

  Args:
    model: the classifier.
    piece: 'head', 'last_stage', 'normalise' or 'features'.
    method: name of the method that needs it, for the error message.

  Returns:
    The piece.

  Raises:
    ValueError: if the model does not have it.
  """
  found = getattr(model, piece)
  if found is None:
    raise ValueError(f'{method} needs a model that has {_PIECES[piece]}.')
  return found


_PIECES = {
  'head': "a head: one last linear layer, named 'head'",
  'last_stage': 'stages, as residual networks do',
  'normalise': 'a function `normalise` for raw pixels',
  'features': 'features: a module that gives (logits, features)',
}


def wrap(
  module: nn.Module,
  image_shape: Sequence[int],
  mean: Sequence[float],
  std: Sequence[float],
  dtype: DTypeLike | None,
) -> base.Model:
  """Wraps a linen module as `from_flax` does, but without a head."""
  arguments = calls.arguments(type(module).__call__, type(module).__name__)
  inner_mask = calls.takes(type(module).__call__, 'mask')

  def run(tree, x, mask, train, mutable):
    with contextlib.ExitStack() as stack:
      if mask is not None and not inner_mask:
        stack.enter_context(nn.intercept_methods(calls.masked_norms(mask)))
      return module.apply(tree, x, **arguments(mask, train), mutable=mutable)

  def init(key):
    x = jnp.zeros((1, *image_shape))
    tree = module.init(key, x, **arguments(None, False))
    return base.Variables(tree['params'], tree.get('batch_stats', {}))

  def apply(variables, x, mask=None, train=False):
    tree = {'params': variables.params, 'batch_stats': variables.stats}
    x = to_floats(x)
    x = x if dtype is None else x.astype(dtype)
    # The compiler removes what is not used of 'moments' and 'stages'.
    mutable = ['moments', 'stages'] + ['batch_stats'] * train
    output, new = run(tree, x, mask, train, mutable)
    logits, features = calls.logits_and_features(output)
    stats = new.get('batch_stats', {}) if train else variables.stats
    stages, moments = new.get('stages'), new.get('moments', ())
    if jax.tree.structure(moments) != jax.tree.structure(stats):
      moments = ()
    return base.Output(
      logits,
      features,
      stats,
      (stages['input'], stages['output']) if stages else (),
      moments,
    )

  to_floats = functools.partial(normalise, mean=mean, std=std)
  last_stage = getattr(module, 'last_stage', None)
  return base.Model(init, apply, None, last_stage, to_floats)


def _heads(variables) -> list:
  """Returns the parameters of all layers named 'head'."""
  places: dict = {}
  for path, leaf in jax.tree.leaves_with_path(variables.params):
    path = jax.tree_util.keystr(path, simple=True, separator='/')
    place, _, name = path.rpartition('/')
    places.setdefault(place, {})[name] = leaf
  return [
    layer
    for place, layer in places.items()
    if re.search(r'(^|/)head(/linear)?$', place)
    and layer.keys() in ({'kernel', 'bias'}, {'kernel'})
  ]


def _linear(params, x):
  """Applies the layer found by `_heads`, as it computes within its module."""
  x = layers.at_least_float32(x)
  features = params['kernel'].shape[-1]
  layer = nn.Dense(features, 'bias' in params, x.dtype)
  return layer.apply({'params': params}, x)


_HEAD = base.Head(lambda variables: _heads(variables)[0], _linear)


def normalise(
  x: jax.Array, mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
  """Scales raw pixels (uint8) to [0, 1] and normalises them per channel.

  Float images are returned unchanged.
  """
  if x.dtype != jnp.uint8:
    return x
  dtype = jnp.result_type(float)
  return (x.astype(dtype) / 255 - jnp.asarray(mean, dtype)) / jnp.asarray(
    std, dtype
  )
