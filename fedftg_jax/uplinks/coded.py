"""What codecs have in common: their state, and how a code becomes a codec."""

from typing import Any, NamedTuple, Protocol

import jax
from jax import flatten_util
import jax.numpy as jnp
import optax

from fedftg_jax.base import PyTree

MOST_BITS = 32  # of a float32


class Message(NamedTuple):
  """What becomes of a vector."""

  decoded: jax.Array  # [P], what the server makes of it
  bits: jax.Array | int  # its length, as it is billed
  elias: jax.Array | int  # its length in Elias' code


class Code(Protocol):
  """Codes a vector [P] and decodes it; client and server share the key."""

  def __call__(self, vector: jax.Array, key: jax.Array, /) -> Message: ...


class Coded(NamedTuple):
  """A codec's state on one client."""

  bits: jax.Array  # [] uint32, of the last message
  # Scalars that the engine reports, means over the clients that arrived: bits
  # per parameter, as billed and in Elias' code.
  columns: dict[str, jax.Array]
  residual: PyTree = ()  # of error feedback: what is still to be sent


def codec(
  code: Code, error_feedback: bool = False
) -> optax.GradientTransformationExtraArgs:
  """Makes an uplink of a code.

  Args:
    code: works on all parameters as one vector.
    error_feedback: whether what was not sent is added to what is sent the next
      time. A client then keeps as many numbers as the model has.

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
  """Raises ValueError for bits per parameter that are out of range."""
  if not (0 < rate <= MOST_BITS and rate >= least):
    above = f'at least {least:g}' if least else 'above 0'
    raise ValueError(
      f'the rate must be {above} and at most {MOST_BITS} bits per parameter, '
      f'got {rate}.'
    )


def in_blocks(vector: jax.Array, size: int) -> jax.Array:
  """A vector [P] as rows [ceil(P / size), size], filled up with zeros."""
  return jnp.pad(vector, (0, -len(vector) % size)).reshape(-1, size)
