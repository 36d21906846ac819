"""fedftg_jax itself: the functions that a run calls in a round.

Its options are candidates that may make it faster, see `options`.
"""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fedftg_jax import base, federation, models, recipes, solvers
from fedftg_jax.contestants import workloads
from fedftg_jax.data import clients, schedules
from fedftg_jax.methods import fed_avg
from fedftg_jax.models import classifiers, convolution, layers

PACKAGES = ('jax',)


class SmallCNN(nn.Module):
  """conv3x3x32, conv3x3x64 (both without padding), pool, fc128, fc."""

  conv: str

  @nn.compact
  def __call__(self, x, mask=None, train=False):
    for i, width in enumerate((32, 64)):
      conv = layers.Conv(
        width,
        3,
        implementation=self.conv,
        valid=True,
        pool=i == 1,
        name=f'conv{i}',
      )
      x = nn.relu(conv(x))
    return classifiers.MLP(workloads.NUM_CLASSES, (128,), name='mlp')(x)


def make_model(workload, conv=None):
  """Builds the model of a workload."""
  if conv and workload.model == 'mlp':
    raise NotImplementedError('no convolutions')
  if workload.model == 'small_cnn':
    module = SmallCNN(conv or convolution.default())
    return models.from_flax(
      module, workload.image_shape, dtype=_dtype(workload)
    )
  return models.build(
    workload.model,
    workload.image_shape,
    workloads.NUM_CLASSES,
    conv=conv,
    dtype=_dtype(workload),
  )


def _dtype(workload):
  return jnp.bfloat16 if workload.bfloat16 else None


def prepare(workload, conv=None, client_chunk=None, **server):
  if workload.iterations:
    step, start = server_program(workload, conv, client_chunk, **server)
    arguments = jax.jit(start)()
    return lambda: jax.block_until_ready(step(*arguments))
  if server:
    raise NotImplementedError('no server step')
  model = make_model(workload, conv)
  x, y = workloads.examples(workload)
  num_clients = workload.cohort
  parts = np.split(np.arange(y.size), num_clients)
  data = clients.from_partition(x.reshape(-1, *x.shape[2:]), y.ravel(), parts)
  make = functools.partial(
    federation.federation,
    model,
    fed_avg.fed_avg(),
    solvers.local_sgd(
      workloads.LEARNING_RATE, batch_size=workload.batch_size, epochs=1
    ),
    num_clients,
  )
  if client_chunk == 'auto':
    client_chunk = federation.chunk_that_fits(
      make(), data, num_clients, num_clients
    )
  fed = make(client_chunk=client_chunk)
  schedule = schedules.from_ids(np.arange(num_clients)[None], num_clients)
  key = jax.random.key(0)
  state = fed.init(key)

  def round_():
    nonlocal state
    state, _ = federation.run(fed, state, data, schedule, key)
    jax.block_until_ready(state)

  return round_


def server_program(workload, conv=None, client_chunk=None, **changes):
  """Makes the jitted server step of FedFTG, and what makes its arguments.

  `changes` are options of the workload's preset.
  """
  if client_chunk is not None:
    raise NotImplementedError('no clients')
  if 'ftg_batch_size' in changes:
    changes['batch_size'] = changes.pop('ftg_batch_size')
  model = make_model(workload, conv)
  preset = workload.server_step
  generator = models.image_generator(
    workload.image_shape,
    workloads.NUM_CLASSES,
    width=workloads.GENERATOR_WIDTH,
    noise_dim=workloads.NOISE_DIM,
    bias_before_norm=recipes.FTG_PRESETS[preset]['generator_bias'],
    conv=conv,
    dtype=_dtype(workload),
  )
  options = {
    'preset': preset,
    'iterations': workload.iterations,
    'batch_size': workload.batch_size,
    'student_steps': workloads.STUDENT_STEPS,
    **changes,
  }
  method = recipes.build(
    'fed_ftg',
    recipes.Settings(
      model,
      workloads.NUM_CLASSES,
      generator=generator,
      options={'fed_ftg': options},
    ),
  )

  def start():
    key, *keys = jax.random.split(jax.random.key(0), 3)
    teachers = jax.vmap(model.init)(jax.random.split(keys[0], workload.cohort))
    student = jax.tree.map(lambda a: jnp.mean(a, 0), teachers)
    return student, teachers, method.init(keys[1], student)[0], key

  @jax.jit
  def step(student, teachers, slot, key):
    counts = jnp.full((workload.cohort, workloads.NUM_CLASSES), 50)
    received = base.Received(
      broadcast=student,
      average=student,
      summed=((), ()),
      stacked=((), (teachers, counts)),
      arrived=jnp.ones(workload.cohort, bool),
      round=jnp.int32(0),
      num_clients=workload.cohort,
      public=(),
      common=((), ()),
    )
    return method.update(student, slot, received, key)[:2]

  return step, start
