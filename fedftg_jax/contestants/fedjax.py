"""Google's FedJAX: its federated averaging, with a model of flax layers."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

jax.tree_map = jax.tree.map  # FedJAX 0.0.17 calls this name, which JAX removed
import fedjax
from fedjax.algorithms import fed_avg
import optax

from fedftg_jax.contestants import workloads

PACKAGES = ('fedjax', 'jax')

CONVS = {  # (width, size, padding, whether to pool)
  'small_cnn': [(32, 3, 'VALID', False), (64, 3, 'VALID', True)],
  'fedavg_cnn': [(64, 5, 'SAME', True), (64, 5, 'SAME', True)],
  'niid_cnn': [(6, 5, 'VALID', True), (16, 5, 'VALID', True)],
  'mlp': [],
}
DENSES = {
  'small_cnn': (128,),
  'fedavg_cnn': (384, 192),
  'niid_cnn': (120, 84),
  'mlp': (200, 200),
}


class Classifier(nn.Module):
  """The classifier of a workload; `dtype` is that in which layers compute."""

  model: str
  dtype: Any = None

  @nn.compact
  def __call__(self, x):
    for width, size, padding, pool in CONVS[self.model]:
      x = nn.Conv(width, (size, size), padding=padding, dtype=self.dtype)(x)
      x = nn.relu(nn.max_pool(x, (2, 2), (2, 2)) if pool else x)
    x = x.reshape(len(x), -1)
    for width in DENSES[self.model]:
      x = nn.relu(nn.Dense(width, dtype=self.dtype)(x))
    logits = nn.Dense(workloads.NUM_CLASSES, dtype=self.dtype)(x)
    return logits.astype(jnp.float32)


def prepare(workload):
  if workload.iterations or workload.model not in CONVS:
    raise NotImplementedError('no server step, no BatchNorm')
  x, y = workloads.examples(workload)
  module = Classifier(
    workload.model, jnp.bfloat16 if workload.bfloat16 else None
  )
  params = module.init(jax.random.key(0), jnp.zeros((1, *workload.image_shape)))

  def loss(params, batch, rng):
    del rng
    return jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(
        module.apply(params, batch['x']), batch['y']
      )
    )

  algorithm = fed_avg.federated_averaging(
    jax.grad(loss),
    fedjax.optimizers.sgd(workloads.LEARNING_RATE),
    fedjax.optimizers.sgd(1.0),
    fedjax.ShuffleRepeatBatchHParams(
      batch_size=workload.batch_size, num_epochs=1
    ),
  )
  clients = [
    (
      str(k),
      fedjax.ClientDataset({'x': x[k], 'y': y[k]}),
      jax.random.PRNGKey(k),
    )
    for k in range(workload.cohort)
  ]
  state = algorithm.init(params)

  def round_():
    nonlocal state
    state, _ = algorithm.apply(state, clients)
    jax.block_until_ready(state.params)

  return round_
