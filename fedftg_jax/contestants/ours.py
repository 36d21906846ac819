"""fedftg_jax itself: the functions that a run calls in a round."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedftg_jax import distillation, federation, models, solvers
from fedftg_jax.contestants import workloads
from fedftg_jax.data import clients, schedules
from fedftg_jax.methods import fed_avg, fed_ftg
from fedftg_jax.models import classifiers, convolution, layers

PACKAGES = ('jax',)


class SmallCNN(nn.Module):
  """conv3x3x32, conv3x3x64 (both without padding), pool, fc128, fc."""

  conv: str

  @nn.compact
  def __call__(self, x, mask=None, train=False):
    for i, width in enumerate((32, 64)):
      x = layers.Conv(
        width, 3, implementation=self.conv, valid=True, name=f'conv{i}'
      )(x)
      x = nn.relu(x) if not i else nn.relu(layers.max_pool(x))
    return classifiers.MLP(workloads.NUM_CLASSES, (128,), name='mlp')(x)


def make_model(workload, conv=None):
  """Builds the model of a workload."""
  dtype = jnp.bfloat16 if workload.bfloat16 else None
  if workload.model == 'small_cnn':
    module = SmallCNN(conv or convolution.default())
    return models.from_flax(module, workload.image_shape, dtype=dtype)
  return models.build(
    workload.model,
    workload.image_shape,
    workloads.NUM_CLASSES,
    conv=conv,
    dtype=dtype,
  )


def prepare(workload, conv=None, client_chunk=None):
  model = make_model(workload, conv)
  if workload.iterations:
    return _server_step(workload, model, conv)
  x, y = workloads.examples(workload)
  num_clients = workload.cohort
  parts = np.split(np.arange(y.size), num_clients)
  data = clients.from_partition(x.reshape(-1, *x.shape[2:]), y.ravel(), parts)
  fed = federation.federation(
    model,
    fed_avg.fed_avg(),
    solvers.local_sgd(
      workloads.LEARNING_RATE, batch_size=workload.batch_size, epochs=1
    ),
    num_clients,
    client_chunk=client_chunk,
  )
  schedule = schedules.from_ids(np.arange(num_clients)[None], num_clients)
  key = jax.random.key(0)
  state = fed.init(key)

  def round_():
    nonlocal state
    state, _ = federation.run(fed, state, data, schedule, key)
    jax.block_until_ready(state)

  return round_


def _server_step(workload, model, conv):
  generator = models.image_generator(
    workload.image_shape,
    workloads.NUM_CLASSES,
    width=workloads.GENERATOR_WIDTH,
    noise_dim=workloads.NOISE_DIM,
    conv=conv,
  )
  keys = jax.random.split(jax.random.key(0), workload.cohort + 2)
  teachers = jax.vmap(model.init)(keys[2:])
  student = jax.tree.map(lambda a: jnp.mean(a, 0), teachers)
  made = generator.init(keys[0])
  counts = jnp.full((workload.cohort, workloads.NUM_CLASSES), 50)

  @jax.jit
  def step(student, made, key):
    z, labels = fed_ftg.draw(
      key,
      counts.sum(0),
      generator.noise_dim,
      workload.iterations,
      workload.batch_size,
    )
    return fed_ftg.fine_tune(
      model,
      generator,
      student,
      made,
      teachers,
      counts,
      z,
      labels,
      generator_optimizer=optax.adam(0.01),
      student_optimizer=distillation.sgd(0.1, weight_decay=1e-3),
      student_steps=workloads.STUDENT_STEPS,
    )[:2]

  def round_():
    jax.block_until_ready(step(student, made, keys[1]))

  return round_
