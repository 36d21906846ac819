"""Wraps Flax modules of a user, of linen or of NNX, as models."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

from flax import errors, nnx
from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fedftg_jax import base, models
from fedftg_jax.models import calls

Module = nn.Module | nnx.Module | base.Model | Callable[..., nnx.Module]


def name_of(module: Module) -> str:
  """Returns the name of a module's class, or of the function that makes it."""
  if isinstance(module, nn.Module | nnx.Module | base.Model):
    return type(module).__name__
  return getattr(module, '__name__', type(module).__name__)


def from_module(
  module: Module,
  image_shape: Sequence[int],
  num_classes: int,
  mean: Sequence[float] = (0.0,),
  std: Sequence[float] = (1.0,),
  dtype: DTypeLike | None = None,
) -> base.Model:
  """Wraps a Flax module as a model, and checks that it fits the images.

  Args:
    module: a module of linen, see `models.from_flax`; of NNX, see `from_nnx`;
      or a model, which is used as it is.
    image_shape: (height, width, channels).
    num_classes: C.
    mean: per channel, of pixels scaled to [0, 1]; applied to uint8 images.
    std: likewise.
    dtype: the type in which layers compute; None for the type of the weights.

  Returns:
    The model.

  Raises:
    ValueError: if the module is none of these, does not take such images, gives
      another number of logits, or draws random numbers, as dropout does.
  """
  name = name_of(module)
  if isinstance(module, base.Model):
    model = module
  elif isinstance(module, type) and issubclass(module, nn.Module):
    raise ValueError(
      f'{name} is a class of flax.linen; must be a module, as in {name}()'
    )
  elif isinstance(module, nn.Module):
    model = models.wrap(module, image_shape, mean, std, dtype)
  elif isinstance(module, nnx.Module) or callable(module):
    model = _wrap_nnx(module, mean, std, dtype)
  else:
    raise ValueError(
      f'{name} is no model; must be a name, a module of flax.linen or '
      'flax.nnx, or a function or class that makes one of flax.nnx of its rngs'
    )
  try:
    if not isinstance(module, base.Model):
      model = models.with_pieces(model, image_shape)
    logits = jax.eval_shape(_training_logits(model, image_shape))
  except errors.InvalidRngError as error:
    raise ValueError(
      f'{name} draws random numbers during training, as dropout does; that is '
      'not supported'
    ) from error
  except (TypeError, ValueError, errors.FlaxError) as error:
    why = ' '.join(str(error).split())[:300]
    raise ValueError(
      f'{name} does not take images {list(image_shape)}: {why}'
    ) from error
  if logits.shape != (2, num_classes):
    raise ValueError(
      f'{name} gives {list(logits.shape)} for 2 images; must give '
      f'[2, {num_classes}], a logit for each of the {num_classes} classes'
    )
  return model


def _training_logits(model, image_shape):
  """Makes a function that runs a new model on two images, in training."""

  def logits():
    x, mask = jnp.zeros((2, *image_shape)), jnp.ones(2, bool)
    return model.apply(model.init(jax.random.key(0)), x, mask, True).logits

  return logits


def from_nnx(
  module: nnx.Module | Callable[..., nnx.Module],
  image_shape: Sequence[int],
  mean: Sequence[float] = (0.0,),
  std: Sequence[float] = (1.0,),
  dtype: DTypeLike | None = None,
) -> base.Model:
  """Wraps a module of `flax.nnx` as a model.

  The module is called like one of linen, see `models.from_flax`, after its
  `train()` or `eval()`. If it has a BatchNorm, it must take `mask` and pass it
  to its norms.

  Args:
    module: a class or a function of `nnx.Rngs`, from which each seed draws its
      initial model; or a module, with whose parameters every seed starts.
    image_shape: (height, width, channels).
    mean: per channel, of pixels scaled to [0, 1]; applied to uint8 images.
    std: likewise.
    dtype: the type of the images; None for float32.

  Returns:
    The model.

  Raises:
    ValueError: if the module has other variables than parameters and BatchNorm
      statistics, such as the random state of dropout, or has a BatchNorm but
      takes no mask.
  """
  model = _wrap_nnx(module, mean, std, dtype)
  return models.with_pieces(model, image_shape)


def _wrap_nnx(module, mean, std, dtype) -> base.Model:
  name, kinds = name_of(module), (nnx.Param, nnx.BatchStat)
  if isinstance(module, nnx.Module):
    make, began = None, module
  else:
    make = _maker(module)
    began = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
  graph, params, stats, others = nnx.split(  # type: ignore[misc]
    began, *kinds, ...
  )
  if jax.tree.leaves(others):
    which = sorted({type(v).__name__ for _, v in nnx.to_flat_state(others)})
    raise ValueError(
      f'{name} has variables of type {", ".join(which)}; must have Param and '
      'BatchStat alone (dropout, which has random state, is not supported)'
    )
  call = type(began).__call__
  arguments = calls.arguments(call, name)
  if jax.tree.leaves(stats) and not calls.takes(call, 'mask'):
    raise ValueError(
      f'{name} has a BatchNorm but takes no mask; its __call__ must take mask '
      '[B], False on padding, and pass it to its norms'
    )

  def init(key):
    if make is None:
      return base.Variables(*map(nnx.to_pure_dict, (params, stats)))
    _, *states = nnx.split(make(nnx.Rngs(key)), *kinds)
    return base.Variables(*map(nnx.to_pure_dict, states))

  def apply(variables, x, mask=None, train=False):
    module = nnx.merge(graph, *variables)
    module.train() if train else module.eval()
    x = to_floats(x)
    x = x if dtype is None else x.astype(dtype)
    output = module(x, **arguments(mask, train))
    logits, features = calls.logits_and_features(output)
    new = nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))
    return base.Output(logits, features, new if train else variables.stats)

  to_floats = functools.partial(models.normalise, mean=mean, std=std)
  return base.Model(init, apply, None, None, to_floats)


def _maker(module: Callable[..., Any]) -> Callable[[nnx.Rngs], nnx.Module]:
  """Passes `rngs` by name to a class or function that calls it so."""
  # A module's metaclass hides the arguments of its class.
  made_by = module.__init__ if isinstance(module, type) else module  # type: ignore[misc]
  if calls.takes(made_by, 'rngs'):
    return lambda rngs: module(rngs=rngs)
  return module
