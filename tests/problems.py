"""Small federated problems that the tests share."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fedftg_jax import base, federation, models, solvers
from fedftg_jax.data import clients, schedules
from fedftg_jax.methods import fed_avg
from fedftg_jax.models import layers

SIZES = (7, 12, 1, 5, 15)  # one example; no multiple of the batch size; a full one
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
    return layers.Dense(NUM_CLASSES)(x), x


class Normed(nn.Module):
  """Two linear layers with a BatchNorm between them."""

  @nn.compact
  def __call__(self, x, mask=None, train=False):
    x = layers.Dense(6)(x.reshape(len(x), -1))
    x = nn.relu(layers.Norm('batch')(x, mask, train))
    return layers.Dense(NUM_CLASSES)(x), x


class DenseGenerator(nn.Module):
  """A small net with a BatchNorm: compiles in a fraction of a convolutional one."""

  @nn.compact
  def __call__(self, z, labels, train=False):
    x = jnp.concatenate(
        [z, jax.nn.one_hot(labels, NUM_CLASSES, dtype=z.dtype)], axis=-1)
    x = layers.Dense(6)(x)
    x = nn.tanh(layers.BatchNorm()(x, train=train))
    return nn.tanh(layers.Dense(int(np.prod(IMAGE_SHAPE)))(x)).reshape(
        -1, *IMAGE_SHAPE)


def _generator(noise_dim=4):
  def init(key):
    tree = DenseGenerator().init(
        key, jnp.zeros((1, noise_dim)), jnp.zeros(1, jnp.int32))
    return base.Variables(tree['params'], tree['batch_stats'])

  def apply(variables, z, labels, train=False):
    tree = {'params': variables.params, 'batch_stats': variables.stats}
    if not train:
      return DenseGenerator().apply(tree, z, labels), variables.stats
    images, new = DenseGenerator().apply(
        tree, z, labels, train=True, mutable=['batch_stats'])
    return images, new['batch_stats']

  return base.Generator(init, apply, noise_dim)


def quick(pair):
  """A model or generator whose initialisation is one program, not one per draw."""
  return pair._replace(init=jax.jit(pair.init))


def from_flax(module):
  return quick(models.from_flax(module, IMAGE_SHAPE, (.4,), (.3,)))


@functools.cache  # equal models are one, so that jit knows them again
def make_model(norm='none'):
  return from_flax(Net(norm))


GENERATOR = quick(_generator())
NORMED, LINEAR = from_flax(Normed()), from_flax(Linear())


def make_data(sizes=SIZES, seed=0):
  """Images whose brightness in one corner tells the class."""
  rng = np.random.RandomState(seed)
  num = sum(sizes)
  y = rng.randint(NUM_CLASSES, size=num)
  x = rng.randint(0, 120, (num, *IMAGE_SHAPE)).astype(np.uint8)
  for i, label in enumerate(y):
    x[i, label * 2:label * 2 + 2] += 100
  parts = np.split(rng.permutation(num), np.cumsum(sizes)[:-1])
  return clients.from_partition(x, y, parts)


DATA = make_data()


def solver(**changes):
  settings = dict(batch_size=BATCH, epochs=2, weight_decay=1e-3, clip_norm=10.)
  return solvers.local_sgd(
      lambda r: .1 * .9**r, **{**settings, **changes})


def make(model=LINEAR, method=None, sizes=SIZES, solve=None, client_chunk=0,
         **kwargs):
  """All clients stacked, whatever the device."""
  return federation.federation(
      model, method or base.chain(fed_avg.fed_avg()), solve or solver(),
      len(sizes), client_chunk=client_chunk, **kwargs)


def schedule(rows, num_clients=len(SIZES)):
  return schedules.from_ids(np.array(rows), num_clients)


def row(ids, arrived=None, num_steps=None, num_clients=len(SIZES)):
  """One row of a schedule, on the device."""
  cohort = jax.tree.map(lambda a: jnp.asarray(a[0]), schedule([ids], num_clients))
  if arrived is not None:
    cohort = cohort._replace(arrived=jnp.asarray(arrived))
  if num_steps is not None:
    cohort = cohort._replace(num_steps=jnp.asarray(num_steps, jnp.int32))
  return cohort
