"""Small federated problems that the tests share."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fedftg_jax import base, federation, models, solvers
from fedftg_jax.data import clients, schedules
from fedftg_jax.methods import fed_avg
from fedftg_jax.models import layers, resnet

SIZES = (
  7,
  12,
  1,
  5,
  15,
)  # one example; no multiple of the batch size; a full one
IMAGE_SHAPE = (8, 8, 1)
NUM_CLASSES = 3
BATCH = 5


class Net(nn.Module):
  """A convolution, a norm and a linear layer."""

  norm: str = 'none'

  @nn.compact
  def __call__(self, x, mask=None, train=False):
    x = layers.Conv(4, 3)(x)
    x = nn.relu(layers.max_pool(layers.Norm(self.norm)(x, mask, train)))
    x = x.reshape(len(x), -1)
    return layers.Dense(NUM_CLASSES)(x), x


class Linear(nn.Module):
  """Softmax regression."""

  @nn.compact
  def __call__(self, x, mask=None, train=False):
    x = x.reshape(len(x), -1)
    return layers.Dense(NUM_CLASSES, name='head')(x), x


class Normed(nn.Module):
  """Two linear layers with a BatchNorm between them."""

  @nn.compact
  def __call__(self, x, mask=None, train=False):
    x = layers.Dense(6)(x.reshape(len(x), -1))
    x = nn.relu(layers.Norm('batch')(x, mask, train))
    return layers.Dense(NUM_CLASSES, name='head')(x), x


class DenseGenerator(nn.Module):
  """A small network with a BatchNorm.

  It compiles in a fraction of the time of a convolutional one.
  """

  @nn.compact
  def __call__(self, z, labels, train=False):
    x = jnp.concatenate(
      [z, jax.nn.one_hot(labels, NUM_CLASSES, dtype=z.dtype)], axis=-1
    )
    # Without a bias, whose gradient is 0 up to rounding: Adam would amplify
    # that.
    x = nn.Dense(6, use_bias=False, param_dtype=jnp.result_type(float))(x)
    x = nn.tanh(layers.BatchNorm()(x, train=train))
    return nn.tanh(layers.Dense(int(np.prod(IMAGE_SHAPE)))(x)).reshape(
      -1, *IMAGE_SHAPE
    )


def _generator(noise_dim=4):
  def init(key):
    tree = DenseGenerator().init(
      key, jnp.zeros((1, noise_dim)), jnp.zeros(1, jnp.int32)
    )
    return base.Variables(tree['params'], tree['batch_stats'])

  def apply(variables, z, labels, train=False):
    tree = {'params': variables.params, 'batch_stats': variables.stats}
    if not train:
      return DenseGenerator().apply(tree, z, labels), variables.stats
    images, new = DenseGenerator().apply(
      tree, z, labels, train=True, mutable=['batch_stats']
    )
    return images, new['batch_stats']

  return base.Generator(init, apply, noise_dim)


def quick(pair):
  """Makes a model or generator draw its weights from one vector.

  Separate draws would take a tenth of a second each to compile.
  """

  @jax.jit
  def init(key):
    random = np.random.RandomState(0)
    scale = jax.random.uniform(key, minval=0.5, maxval=1.5)

    def fill(path, leaf):
      if path[-1].key != 'kernel':
        return jnp.full_like(leaf, path[-1].key in ('scale', 'var'))
      fan_in = np.prod(leaf.shape[:-1])
      return (scale * random.normal(0, fan_in**-0.5, leaf.shape)).astype(
        leaf.dtype
      )

    return jax.tree.map_with_path(fill, jax.eval_shape(pair.init, key))

  return pair._replace(init=init)


def from_flax(module):
  return quick(models.from_flax(module, IMAGE_SHAPE, (0.4,), (0.3,)))


@functools.cache  # equal models are one object, so that jit recognises them
def make_model(norm='none'):
  return from_flax(Net(norm))


GENERATOR = quick(_generator())
NORMED, LINEAR = from_flax(Normed()), from_flax(Linear())
# A residual network of two stages.
STAGED = from_flax(
  resnet.ResNet(
    NUM_CLASSES, (4, 6), 1, False, False, layers.Variant('batch', 'im2col')
  )
)


def make_data(sizes=SIZES, seed=0):
  """Makes images whose brightness in one corner depends on the class."""
  rng = np.random.RandomState(seed)
  num = sum(sizes)
  y = rng.randint(NUM_CLASSES, size=num)
  x = rng.randint(0, 120, (num, *IMAGE_SHAPE)).astype(np.uint8)
  for i, label in enumerate(y):
    x[i, label * 2 : label * 2 + 2] += 100
  parts = np.split(rng.permutation(num), np.cumsum(sizes)[:-1])
  return clients.from_partition(x, y, parts)


DATA = make_data()


def solver(**changes):
  settings = dict(batch_size=BATCH, epochs=2, weight_decay=1e-3, clip_norm=10.0)
  return solvers.local_sgd(lambda r: 0.1 * 0.9**r, **{**settings, **changes})


SOLVER = solver()
FED_AVG = base.chain(fed_avg.fed_avg())
_make = functools.cache(
  federation.federation
)  # an equal one may be compiled already


def make(
  model=LINEAR,
  method=FED_AVG,
  sizes=SIZES,
  solve=SOLVER,
  client_chunk=0,
  **kwargs,
):
  """Builds a federation that stacks all clients on every device."""
  return _make(
    model, method, solve, len(sizes), client_chunk=client_chunk, **kwargs
  )


def schedule(rows, num_clients=len(SIZES)):
  return schedules.from_ids(np.array(rows), num_clients)


def row(ids, arrived=True, num_steps=base.NO_LIMIT, num_clients=len(SIZES)):
  """Makes one row of a schedule, on the device.

  It has room for all clients, so that tests share a program.
  """
  pad = max(num_clients - len(ids), 0)
  ids = np.pad(ids, (0, pad), constant_values=-1)
  fill = lambda value: np.append(
    np.broadcast_to(value, len(ids) - pad), np.zeros(pad, int)
  )
  cohort = schedule([ids], num_clients)
  return jax.tree.map(
    jnp.asarray,
    base.Cohort(
      cohort.client_id[0],
      cohort.arrived[0] & fill(arrived).astype(bool),
      fill(num_steps).astype(np.int32),
    ),
  )
