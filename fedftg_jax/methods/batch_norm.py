"""Three policies for BatchNorm's running statistics.

aggregate  They are averaged with the model (the official codes of this field).
           This needs no extra part: every aggregating method does it.
local      Each client keeps its own statistics and starts with them. FedBN (Li
           et al., ICLR 2021, arXiv:2102.07623) also keeps the layers' scale and
           bias on the client; SiloBN (Andreux et al., DART 2020) keeps only the
           statistics, as here.
           Deviation: statistics are still sent with the model, since teachers
           on the server use their own; a client in its first round starts with
           the received ones.
reset      A client estimates them on its own data with the received parameters
           before it trains: per batch, then the mean over the batches.
"""

import jax
import jax.numpy as jnp

from fedftg_jax import losses, trees
from fedftg_jax.base import Method, Model
from fedftg_jax.data import clients
from fedftg_jax.models import layers

POLICIES = ('aggregate', 'local', 'reset')


def policy_parts(
  policy: str, model: Model, batch_size: int = 50
) -> tuple[Method, ...]:
  """Returns the parts of a chain that a policy for statistics needs.

  Args:
    policy: one of `POLICIES`.
    model: the classifier.
    batch_size: examples in a batch in 'reset'.

  Returns:
    `local_stats` or `reset_stats`, which come last in a chain; nothing for
    'aggregate'.

  Raises:
    ValueError: for an unknown policy.
  """
  if policy not in POLICIES:
    raise ValueError(f'policy must be one of {POLICIES}, got {policy!r}.')
  return {
    'aggregate': (),
    'local': (local_stats(),),
    'reset': (reset_stats(model, batch_size),),
  }[policy]


def local_stats() -> Method:
  """Builds the part with which clients keep their own statistics.

  A client's slot is (statistics, whether it has any).
  """

  def init(key, variables):
    del key
    return (), (variables.stats, jnp.zeros((), bool))

  def start(view, key):
    del key
    own, seen = view.own
    stats = trees.where(seen, own, view.variables.stats)
    return view.variables._replace(stats=stats)

  def upload(view, local, objective, key):
    del view, objective, key
    return (local.variables.stats, jnp.ones((), bool)), ()

  return Method(init=init, start=start, upload=upload)


def reset_stats(
  model: Model,
  batch_size: int = 50,
  momentum: float = layers.BATCH_NORM_MOMENTUM,
) -> Method:
  """Builds the part with which clients start with statistics of their own data.

  Args:
    model: the classifier.
    batch_size: examples in a batch.
    momentum: that of the model's BatchNorm: one pass moves the running
      statistics by this share of the way to those of the batch, which are
      computed from that.

  Returns:
    The method; it keeps nothing.
  """

  def start(view, key):
    del key
    old = view.variables.stats

    def of_batch(batch):
      new = losses.frozen(
        lambda v: model.apply(v, batch.x, mask=batch.mask, train=True).stats,
        view.variables,
      )
      return jax.tree.map(lambda a, b: a + (b - a) / momentum, old, new)

    stats = clients.mean_over_examples(of_batch, view.data, batch_size)
    stats = trees.where(view.data.count > 0, stats, old)
    return view.variables._replace(stats=stats)

  return Method(start=start)
