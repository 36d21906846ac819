"""Calls Flax modules whose arguments have different names."""

from collections.abc import Callable
import inspect
from typing import Any

from flax import linen as nn
import jax

# Names of the argument that is True, or False, during training.
_TRAINING = ('train', 'training', 'is_training')
_NOT_TRAINING = ('deterministic', 'use_running_average')


def arguments(
  call: Callable, name: str
) -> Callable[[jax.Array | None, bool], dict[str, Any]]:
  """Finds the arguments that a module takes besides the images.

  Args:
    call: the module's `__call__`, not bound to it.
    name: name of the module, for the error message.

  Returns:
    A function (mask, train) -> keyword arguments of the module.

  Raises:
    ValueError: if the module needs another argument.
  """
  _, _, *others = inspect.signature(call).parameters.values()
  taken = [p.name for p in others]
  for p in others:
    known = p.name in ('mask', *_TRAINING, *_NOT_TRAINING)
    may_miss = p.default is not p.empty or p.kind in (
      p.VAR_KEYWORD,
      p.VAR_POSITIONAL,
    )
    if not (known or may_miss):
      raise ValueError(
        f'{name} is called with images, and may take mask and train, but needs '
        f'{p.name}; give it a default'
      )

  def of(mask, train):
    values = {
      'mask': mask,
      **dict.fromkeys(_TRAINING, train),
      **dict.fromkeys(_NOT_TRAINING, not train),
    }
    return {key: values[key] for key in taken if key in values}

  return of


def takes(call: Callable, name: str) -> bool:
  """Returns whether a function has an argument of that name."""
  return name in inspect.signature(call).parameters


def logits_and_features(output: Any) -> tuple[jax.Array, Any]:
  """Splits a module's output into logits and features, () if it has none."""
  logits, features = output if isinstance(output, tuple) else (output, ())
  return logits, features


def masked_norms(mask: jax.Array) -> Callable:
  """Makes linen's BatchNorms ignore padding, unless they get a mask already.

  Args:
    mask: [B], False on padding.

  Returns:
    A function for `nn.intercept_methods`.
  """

  def intercept(call, args, kwargs, context):
    if isinstance(context.module, nn.BatchNorm):
      if context.method_name == '__call__' and kwargs.get('mask') is None:
        shape = len(mask), *[1] * (args[0].ndim - 1)
        kwargs = {**kwargs, 'mask': mask.reshape(shape)}
    return call(*args, **kwargs)

  return intercept
