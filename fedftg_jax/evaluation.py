"""Accuracy and loss of models on whole data sets."""

import functools

import jax
import jax.numpy as jnp
import optax

from fedftg_jax import trees
from fedftg_jax.base import Data, Method, Model, PyTree, Variables
from fedftg_jax.data import clients


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def evaluate(
    model: Model, variables: Variables, x: jax.Array, y: jax.Array,
    batch_size: int = 500, batch_stats: bool = False) -> dict[str, jax.Array]:
  """Mean cross-entropy and accuracy.

  Args:
    model: the classifier.
    variables: its variables.
    x: [M, H, W, channels] images.
    y: [M] labels.
    batch_size: examples at once; the last batch is padded and masked.
    batch_stats: whether BatchNorm normalises by each batch, for a model whose
      running statistics mean nothing; else by the running statistics.

  Returns:
    {'loss', 'accuracy'}: scalars.
  """
  num = len(y)
  data = Data(x, y, jnp.arange(num), jnp.int32(num))
  return clients.mean_over_examples(
      functools.partial(_scores, model, variables, batch_stats), data,
      min(batch_size, num))


@functools.partial(jax.jit, static_argnums=(0, 4))
def evaluate_clients(
    model: Model, params: PyTree, stats: PyTree, data: Data,
    batch_size: int = 500) -> dict[str, jax.Array]:
  """One model on each client's examples, with each client's statistics.

  Args:
    model: the classifier.
    params: of the model.
    stats: running statistics, every leaf [N, ...].
    data: examples and who holds which.
    batch_size: examples at once; the last batch is padded and masked.

  Returns:
    {'loss', 'accuracy'}: [N], NaN for clients without examples.
  """
  def one(client):
    stats, index, count = client
    scores = clients.mean_over_examples(
        functools.partial(_scores, model, Variables(params, stats), False),
        data._replace(index=index, count=count),
        min(batch_size, len(index)))
    return jax.tree.map(lambda a: jnp.where(count > 0, a, jnp.nan), scores)

  return jax.lax.map(one, (stats, data.index, data.count))


def _scores(model, variables, batch_stats, batch):
  logits = model.apply(
      variables, batch.x, mask=batch.mask, train=batch_stats).logits
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.y)
  correct = jnp.argmax(logits, axis=-1) == batch.y
  num = jnp.maximum(jnp.sum(batch.mask), 1)
  return {'loss': jnp.sum(batch.mask * loss) / num,
          'accuracy': jnp.sum(batch.mask * correct) / num}


def last_models() -> Method:
  """Every client keeps its last model, for `mean_of_last_models`.

  The official plots of many methods show the mean over ALL clients' last
  models. It costs N models of memory, and nothing is sent.
  """
  return Method(
      init=lambda key, variables: ((), variables),
      upload=lambda view, local, objective, key: (local.variables, ()))


def mean_of_last_models(own: Variables, weight: jax.Array) -> Variables:
  """The mean over the slots of `last_models`.

  Args:
    own: the slots, every leaf [N, ...].
    weight: [N] how clients count, such as their numbers of examples (the
      official FedAvg) or ones (FedDyn, SCAFFOLD).

  Returns:
    One model.
  """
  return trees.weighted_sum(own, weight / jnp.sum(weight))
