"""Before anything is computed: compile cache, processes, devices.

Several hosts run the same command each. On TPU pods and on Slurm, JAX finds the
others by itself (--distributed); elsewhere --coordinator, --num_processes and
--process_id say who and where they are. Every process loads the data; all hold
the same arrays, the clients of a round are shared out over all their devices,
and process 0 alone writes files.
"""

import hashlib
import os
import pathlib
import platform

from absl import flags
import jax
from jax.experimental import multihost_utils
import numpy as np

from fedftg_jax import stacking

flags.DEFINE_string(
  'compile_cache',
  None,
  'Where compiled programs are kept for the next run; '
  "default: the user's cache folder; empty for none.",
)
flags.DEFINE_bool(
  'distributed',
  False,
  'One of several processes that JAX finds by itself (TPU '
  'pods, Slurm, Open MPI).',
)
flags.DEFINE_string(
  'coordinator', None, 'One of several processes: HOST:PORT of process 0.'
)
flags.DEFINE_integer(
  'num_processes',
  None,
  'With --coordinator: how many there are.',
  lower_bound=1,
)
flags.DEFINE_integer(
  'process_id', None, 'With --coordinator: which one this is.', lower_bound=0
)
FLAGS = flags.FLAGS


def start() -> None:
  """Sets JAX up as the flags ask for; before the first computation.

  Raises:
    ValueError: with the flag that is missing, or what JAX says where the
      processes do not find each other.
  """
  _keep_compiled()
  if FLAGS.coordinator is not None:
    for name in ('num_processes', 'process_id'):
      if FLAGS[name].value is None:
        raise ValueError(f'--coordinator={FLAGS.coordinator}: needs --{name}')
    if FLAGS.process_id >= FLAGS.num_processes:
      raise ValueError(
        f'--process_id={FLAGS.process_id}: must be less than '
        f'--num_processes={FLAGS.num_processes}'
      )
  if FLAGS.distributed or FLAGS.coordinator is not None:
    try:
      jax.distributed.initialize(
        FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id
      )
    except (RuntimeError, ValueError) as error:
      raise ValueError(f'--distributed: {error}') from error


def default_num() -> int:
  """Devices that share the clients by default: all, but one on a CPU, where
  they are threads of the same cores, unless there are several processes."""
  if jax.default_backend() == 'cpu' and not several_processes():
    return 1
  return len(jax.devices())


def several_processes() -> bool:
  return jax.process_count() > 1


def is_first() -> bool:
  """Whether this process is the one that writes files and speaks."""
  return jax.process_index() == 0


def agree(value):
  """What process 0 says: a number, or an array of them."""
  if not several_processes():
    return value
  return multihost_utils.broadcast_one_to_all(np.asarray(value))


def from_first(tree):
  """The arrays that process 0 has in a tree; all call with equal types.

  As bytes, since a broadcast is a sum, which would lose the sign of a zero.
  """
  if not several_processes():
    return tree
  arrays = [np.asarray(a) for a in jax.tree.leaves(tree)]
  sent = multihost_utils.broadcast_one_to_all(
    [np.frombuffer(a.tobytes(), np.uint8) for a in arrays]
  )
  return jax.tree.structure(tree).unflatten(
    np.frombuffer(bytearray(np.asarray(b)), a.dtype).reshape(a.shape)
    for a, b in zip(arrays, sent)
  )


def any_of(value: bool) -> bool:
  """Whether it is true in any process."""
  if not several_processes():
    return value
  return bool(multihost_utils.process_allgather(np.asarray(value)).any())


def put(tree, num_devices: int):
  """`tree` on the devices in use, whole on each."""
  return stacking.put(tree, mesh(num_devices))


def mesh(num_devices: int) -> jax.sharding.Mesh | None:
  """Of the devices in use; None for one alone."""
  return stacking.make_mesh(num_devices) if num_devices > 1 else None


def _keep_compiled() -> None:
  """The persistent compile cache, unless JAX has been given one already."""
  if FLAGS.compile_cache is not None:
    jax.config.update('jax_compilation_cache_dir', FLAGS.compile_cache or None)
  elif jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
    root = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
    # A home may be shared by machines: code for one CPU is none for another.
    machine = hashlib.sha256(processor().encode()).hexdigest()[:8]
    jax.config.update(
      'jax_compilation_cache_dir',
      str(pathlib.Path(root) / 'fedftg_jax' / f'compiled-{machine}'),
    )
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)


def processor() -> str:
  """The name of the CPU, as far as the platform tells."""
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    return platform.processor()
  return next(
    (
      line.partition(':')[2].strip()
      for line in lines
      if line.startswith('model name')
    ),
    platform.processor(),
  )
