"""Sets JAX up before anything is computed: cache, processes, devices.

Several hosts each run the same command. On TPU pods and on Slurm, JAX finds the
other processes by itself (--distributed); elsewhere --coordinator,
--num_processes and --process_id tell where they are. Every process loads the
data. All hold the same arrays, the clients of a round are divided among all
devices, and only process 0 writes files.
"""

import contextlib
import hashlib
import os
import pathlib
import platform
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils
import numpy as np

from fedftg_jax import stacking
from fedftg_jax.system import own_flags as flags

MOST_OF_A_CPU = 256  # each device has threads of its own

flags.DEFINE_string(
  'compile_cache',
  None,
  'Folder in which compiled programs are kept for later runs; empty for none. '
  "Default: in the user's cache folder.",
)
flags.DEFINE_bool(
  'distributed',
  False,
  'This is one of several processes, which JAX finds by itself (TPU pods, '
  'Slurm, Open MPI).',
)
flags.DEFINE_string(
  'coordinator',
  None,
  'This is one of several processes; HOST:PORT of process 0.',
)
flags.DEFINE_integer(
  'num_processes',
  None,
  'With --coordinator: number of processes.',
  lower_bound=1,
)
flags.DEFINE_integer(
  'process_id',
  None,
  'With --coordinator: index of this process, from 0 on.',
  lower_bound=0,
)


class Start(NamedTuple):
  """Settings of JAX for a process; see the flags of the same names."""

  compile_cache: str | None = None
  distributed: bool = False
  coordinator: str | None = None
  num_processes: int | None = None
  process_id: int | None = None


def start(asked: Start | None = None) -> None:
  """Sets JAX up; call it before the first computation.

  Args:
    asked: what to set up; None for the values of the flags.

  Raises:
    ValueError: names the flag that is missing, or says why the processes cannot
      find each other.
  """
  asked = asked or Start(**flags.values(__name__))
  _keep_compiled(asked.compile_cache)
  if asked.coordinator is not None:
    if asked.num_processes is None:
      raise ValueError(
        f'--coordinator={asked.coordinator}: needs --num_processes'
      )
    if asked.process_id is None:
      raise ValueError(f'--coordinator={asked.coordinator}: needs --process_id')
    if asked.process_id >= asked.num_processes:
      raise ValueError(
        f'--process_id={asked.process_id}: must be less than '
        f'--num_processes={asked.num_processes}'
      )
  several = asked.distributed or asked.coordinator is not None
  if several and not jax.distributed.is_initialized():
    try:
      jax.distributed.initialize(
        asked.coordinator, asked.num_processes, asked.process_id
      )
    except (RuntimeError, ValueError) as error:
      raise ValueError(f'--distributed: {error}') from error


def default_num() -> int:
  """Returns the default number of devices that share the clients.

  These are all devices, except on a CPU with a single process: there it is 1,
  because what is fastest there depends on the model, see docs/devices.md.
  """
  if jax.default_backend() == 'cpu' and not several_processes():
    return 1
  return len(jax.devices())


def divide_cpu(num: int) -> None:
  """Lets JAX count `num` devices on a CPU, which then share its cores.

  This does nothing if JAX has counted the devices already, was told a number of
  them (JAX_NUM_CPU_DEVICES), or would be asked for more than MOST_OF_A_CPU.
  Other devices are not concerned.
  """
  told = jax.config.jax_num_cpu_devices != -1  # type: ignore[attr-defined]
  if told or num > MOST_OF_A_CPU:
    return
  with contextlib.suppress(RuntimeError):  # they are counted
    jax.config.update('jax_num_cpu_devices', num)


def several_processes() -> bool:
  """Returns whether several processes train together."""
  return jax.process_count() > 1


def is_first() -> bool:
  """Returns whether this is process 0, which writes files and prints."""
  return jax.process_index() == 0


def agree(value):
  """Returns the value of process 0, a number or an array of numbers."""
  if not several_processes():
    return value
  return multihost_utils.broadcast_one_to_all(np.asarray(value))


def from_first(tree):
  """Returns the arrays of process 0; all processes call it with equal types.

  They are sent as bytes, because a broadcast is a sum, which would lose the
  sign of a zero.
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
  """Returns whether `value` is true in any process."""
  if not several_processes():
    return value
  return bool(multihost_utils.process_allgather(np.asarray(value)).any())


def put(tree, num_devices: int):
  """Replicates `tree` on the devices in use."""
  return stacking.put(tree, mesh(num_devices))


def mesh(num_devices: int) -> jax.sharding.Mesh | None:
  """Returns the mesh of the devices in use; None for a single device."""
  return stacking.make_mesh(num_devices) if num_devices > 1 else None


def _keep_compiled(folder: str | None) -> None:
  """Sets the persistent compile cache, unless JAX has one already."""
  if folder is not None:
    jax.config.update('jax_compilation_cache_dir', folder or None)
  elif jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
    root = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
    # Machines may share a home folder, but code for one CPU does not run on
    # another.
    machine = hashlib.sha256(processor().encode()).hexdigest()[:8]
    jax.config.update(
      'jax_compilation_cache_dir',
      str(pathlib.Path(root) / 'fedftg_jax' / f'compiled-{machine}'),
    )
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)


def processor() -> str:
  """Returns the name of the CPU, if the platform gives it."""
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
