"""fedftg_jax itself: the functions that a run calls in a round.

Its options are candidates that may make it faster (`OPTIONS`).
"""

from collections.abc import Sequence

from flax import linen as nn
import jax
from jax import flatten_util
import jax.numpy as jnp
import numpy as np
import optax

from fedftg_jax import base, distillation, federation, models, solvers
from fedftg_jax.contestants import workloads
from fedftg_jax.data import clients, schedules
from fedftg_jax.methods import fed_avg, fed_ftg
from fedftg_jax.models import classifiers, convolution, layers

PACKAGES = ('jax',)
OPTIONS: dict[str, Sequence[str | int]] = {  # each with its values
  'conv': convolution.IMPLEMENTATIONS,
  'client_chunk': range(10**4),
  'flat': (0, 1),  # the parameters of a model as one array
}


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


def options(texts: list[str]) -> dict[str, str | int]:
  """Parses options as they are given to the benchmark, 'conv=pallas'.

  Raises:
    ValueError: for an unknown or repeated option, or a wrong value.
  """
  found: dict[str, str | int] = {}
  for text in texts:
    name, _, value = text.partition('=')
    if name not in OPTIONS:
      raise ValueError(f'{name!r} is none of the options ' + ', '.join(OPTIONS))
    if name in found:
      raise ValueError(f'{name} is given twice')
    allowed = {str(one): one for one in OPTIONS[name]}
    if value not in allowed:
      known = list(allowed)
      if len(known) > 10:
        known = [f'{known[0]} to {known[-1]}']
      raise ValueError(f'{name} must be one of ' + ', '.join(known))
    found[name] = allowed[value]
  return found


def as_one_array(model: base.Model) -> base.Model:
  """Makes a model whose parameters are one array.

  A step of descent and a mean over clients then have one array to work on.
  """
  params = jax.eval_shape(model.init, jax.random.key(0)).params
  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), params)
  unravel = flatten_util.ravel_pytree(zeros)[1]

  def init(key):
    variables = model.init(key)
    return variables._replace(
      params=flatten_util.ravel_pytree(variables.params)[0]
    )

  def apply(variables, *args, **kwargs):
    whole = variables._replace(params=unravel(variables.params))
    return model.apply(whole, *args, **kwargs)

  return base.Model(init, apply)


def prepare(workload, conv=None, client_chunk=None, flat=0):
  if conv and workload.model == 'mlp':
    raise NotImplementedError('no convolutions')
  if client_chunk is not None and workload.iterations:
    raise NotImplementedError('no clients')
  model = make_model(workload, conv)
  if flat:
    model = as_one_array(model)
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
