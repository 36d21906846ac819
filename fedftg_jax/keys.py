"""Derives all random keys of the training, in one place.

Every key is `fold_in(fold_in(base, round), client_id)`, then split by purpose.
Results therefore do not depend on the order of clients in a cohort, on
chunking, or on where a run was interrupted, and removing a client leaves the
other clients' draws unchanged.
"""

from typing import NamedTuple

import jax

_SERVER, _COMMON = 2**31 - 1, 2**31 - 2  # no client has these ids


class ClientKeys(NamedTuple):
  """One client's keys of one round, by purpose."""

  start: jax.Array  # the model that it starts from
  solve: jax.Array  # batches and stochastic penalties
  upload: jax.Array  # the method's message
  encode: jax.Array  # the uplink codec
  # Splitting into more keys keeps the first keys as they were, so new fields
  # must be added at the end.
  send: jax.Array  # the model that is sent to it
  train: jax.Array  # the method's wrapper of local training


def client_keys(base: jax.Array, round_: jax.Array, client_id: jax.Array):
  """Derives the keys of client `client_id` in round `round_`."""
  key = jax.random.fold_in(jax.random.fold_in(base, round_), client_id)
  return ClientKeys(*jax.random.split(key, len(ClientKeys._fields)))


def common_key(base: jax.Array, round_: jax.Array) -> jax.Array:
  """Derives the key of what all clients compute alike in round `round_`."""
  return jax.random.fold_in(jax.random.fold_in(base, round_), _COMMON)


def server_key(base: jax.Array, round_: jax.Array) -> jax.Array:
  """Derives the key of the server's update in round `round_`."""
  return jax.random.fold_in(jax.random.fold_in(base, round_), _SERVER)
