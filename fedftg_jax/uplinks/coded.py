"""Shared parts of the codecs: their state, and the step from code to codec."""

from typing import Any, NamedTuple, Protocol

import jax
from jax import flatten_util
import jax.numpy as jnp
import optax

from fedftg_jax.base import PyTree

MOST_BITS = 32  # size of a float32


class Message(NamedTuple):
  """The result of coding a vector."""

  decoded: jax.Array  # [P], the vector as the server decodes it
  bits: jax.Array | int  # length of the message, as it is reported
  elias: jax.Array | int  # length of the message in Elias' gamma code


class Code(Protocol):
  """Codes a vector [P] and decodes it; client and server share the key."""

  def __call__(self, vector: jax.Array, key: jax.Array, /) -> Message: ...


class Coded(NamedTuple):
  """A codec's state on one client."""

  bits: jax.Array  # [] uint32, length of the last message
  # Scalars that the engine reports, as means over the clients that arrived:
  # bits per parameter of `Message.bits` and of `Message.elias`.
  columns: dict[str, jax.Array]
  residual: PyTree = ()  # for error feedback: what has not been sent yet


def codec(
  code: Code, error_feedback: bool = False
) -> optax.GradientTransformationExtraArgs:
  """Makes an uplink from a code.

  Args:
    code: codes all parameters as one vector.
    error_feedback: whether what was not sent is added to the next message. A
      client then keeps as many numbers as the model has.

  Returns:
    The uplink; its `update` takes a `key`.
  """

  def init(params: PyTree) -> Coded:
    nothing = jnp.float32(0)
    return Coded(
      jnp.uint32(0),
      {'rate': nothing, 'rate_elias': nothing},
      optax.tree.zeros_like(params) if error_feedback else (),
    )

  def update(
    updates: PyTree,
    state: Coded,
    params: PyTree | None = None,
    *,
    key: jax.Array,
    **extra: Any,
  ) -> tuple[PyTree, Coded]:
    del params, extra
    if error_feedback:
      updates = optax.tree.add(updates, state.residual)
    vector, unravel = flatten_util.ravel_pytree(updates)
    message = code(vector, key)
    decoded = unravel(message.decoded.astype(vector.dtype))
    left = optax.tree.sub(updates, decoded) if error_feedback else ()
    columns = {'rate': message.bits, 'rate_elias': message.elias}
    return decoded, Coded(
      jnp.asarray(message.bits, jnp.uint32),
      {k: jnp.float32(v) / len(vector) for k, v in columns.items()},
      left,
    )

  return optax.GradientTransformationExtraArgs(init, update)


def check_rate(rate: float, least: float = 0.0) -> None:
  """Checks a number of bits per parameter.

  Raises:
    ValueError: if it is out of range.
  """
  if not (0 < rate <= MOST_BITS and rate >= least):
    above = f'at least {least:g}' if least else 'above 0'
    raise ValueError(
      f'the rate must be {above} and at most {MOST_BITS} bits per parameter, '
      f'got {rate}.'
    )


def in_blocks(vector: jax.Array, size: int) -> jax.Array:
  """Reshapes a vector [P] to rows [ceil(P / size), size], padded with zeros."""
  return jnp.pad(vector, (0, -len(vector) % size)).reshape(-1, size)
