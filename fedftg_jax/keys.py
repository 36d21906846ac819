"""The one place where random keys are derived.

Every key is `fold_in(fold_in(base, round), client_id)`, then split by purpose.
Results therefore do not depend on the order in the cohort, on chunking, or on
where a run was interrupted, and removing a client leaves the other clients'
draws unchanged.
"""

from typing import NamedTuple

import jax

_SERVER, _COMMON = 2**31 - 1, 2**31 - 2  # no client has these ids


class ClientKeys(NamedTuple):
  """One client's keys of one round."""

  start: jax.Array  # the model it begins from
  solve: jax.Array  # batches and stochastic penalties
  upload: jax.Array  # the method's message
  encode: jax.Array  # the uplink codec
  # A split into more begins with the keys of a split into fewer: what is new
  # here comes last.
  send: jax.Array  # the model that it is sent
  train: jax.Array  # what wraps local training


def client_keys(base: jax.Array, round_: jax.Array, client_id: jax.Array):
  """The keys of client `client_id` in round `round_`."""
  key = jax.random.fold_in(jax.random.fold_in(base, round_), client_id)
  return ClientKeys(*jax.random.split(key, len(ClientKeys._fields)))


def common_key(base: jax.Array, round_: jax.Array) -> jax.Array:
  """The key of what all clients compute alike in round `round_`."""
  return jax.random.fold_in(jax.random.fold_in(base, round_), _COMMON)


def server_key(base: jax.Array, round_: jax.Array) -> jax.Array:
  """The key of the server's update in round `round_`."""
  return jax.random.fold_in(jax.random.fold_in(base, round_), _SERVER)
