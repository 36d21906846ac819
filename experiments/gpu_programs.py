"""Compiles the benchmark's steps for a GPU that need not be there, and counts.

  pip install -e ".[gpu-compiler]"
  python -m experiments.gpu_programs
  python -m experiments.gpu_programs --programs=W2,W2:conv=pallas

A program is a workload of `fedftg benchmark`, with the options of `one_step`,
or of `ours` if it is a server step. It prints for each program the kernels that
are launched and the bytes that they read and write (see `kernels.count`), the
memory of temporary arrays, and the seconds of tracing and of compiling.

The GPU is described by TARGET, an H200. Nothing is run on it, so kernels are
not chosen by trying them, as on a GPU (XLA's autotuning). A program that does
not compile gets a row that says why, and the exit status is 1.
"""

import sys
import time

from absl import flags
import jax
from jax.experimental import topologies

from fedftg_jax.contestants import kernels, one_step, options, ours, workloads
from fedftg_jax.models import convolution
from fedftg_jax.system import cli

TARGET = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 4800000000000
  device_memory_size: 150754820096
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H200"
"""
PROGRAMS = [
  *('W1', 'W1:conv=pallas', 'W1:conv=lax'),
  *('W2', 'W2:conv=pallas', 'W2:conv=lax'),
  *('W3', 'W6'),
  *('W5', 'W5:conv=pallas', 'W5:conv=lax'),
  *('W4', 'W4:gen_step=joint', 'W4:conv=mixed'),
  *('W7', 'W7:student_steps=0', 'W7:conv=mixed', 'W7:conv=pallas'),
]
OPTIONS = {'xla_gpu_autotune_level': 0}  # no GPU is there to try kernels on
_PROGRAMS = flags.DEFINE_list('programs', PROGRAMS, 'Programs to compile.')

HEADER = (
  '| program | kernels | GB moved | GB of temporaries | s, tracing | '
  's, compiling |\n| --- | --- | --- | --- | --- | --- |'
)


def program(name: str):
  """Makes a jitted function and the function that makes its arguments.

  Args:
    name: as 'W2:conv=pallas'.

  Raises:
    ValueError: for an unknown workload or option.
    NotImplementedError: if the workload has no such option.
  """
  workload, *rest = name.split(':')
  if workload not in workloads.WORKLOADS:
    raise ValueError(f'must be one of {", ".join(workloads.WORKLOADS)}')
  work = workloads.WORKLOADS[workload]
  who = 'ours' if work.iterations else 'one_step'
  chosen = options.parse(':'.join([who, *rest]))
  if work.model != 'mlp':
    chosen.setdefault('conv', convolution.DEFAULTS['gpu'])
  make = ours.server_program if work.iterations else one_step.program
  return make(work, **chosen)


def target() -> jax.sharding.NamedSharding:
  """Returns a placement on the GPU that is described by TARGET.

  Raises:
    RuntimeError: if JAX has no plug-in for CUDA.
  """
  topology = topologies.get_topology_desc(
    platform='cuda', topology_name='', topology='1x1x1', target_config=TARGET
  )
  mesh = topologies.make_mesh(topology, (1,), ('gpu',))
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def row(name: str, step, start, placement: jax.sharding.NamedSharding) -> str:
  """Compiles a program and returns its row of the table."""
  arguments = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placement),
    jax.eval_shape(start),
  )
  begin = time.perf_counter()
  lowered = step.trace(*arguments).lower(lowering_platforms=('cuda',))
  traced = time.perf_counter()
  compiled = lowered.compile(OPTIONS)
  done = time.perf_counter()
  found = kernels.count(compiled.as_text())
  temporary = compiled.memory_analysis().temp_size_in_bytes
  return (
    f'| {name} | {found.kernels:,} | {found.bytes / 1e9:.2f} | '
    f'{temporary / 1e9:.2f} | {traced - begin:.1f} | {done - traced:.1f} |'
  )


def main() -> None:
  # Before anything else of JAX: its plug-in for CUDA would look for a GPU.
  jax.config.update('jax_platforms', 'cpu')
  # A program that is taken from a cache does not tell how long it compiles.
  jax.config.update('jax_enable_compilation_cache', False)
  programs = {}
  if not any(_PROGRAMS.value):
    raise cli.UsageError('programs', '', 'must name programs')
  for name in _PROGRAMS.value:
    try:
      programs[name] = program(name)
    except (ValueError, NotImplementedError) as error:
      raise cli.UsageError('programs', name, str(error)) from error
  try:
    placement = target()
  except RuntimeError as error:
    raise cli.ArgumentError(
      error, 'needs a plug-in: pip install -e ".[gpu-compiler]"'
    ) from error
  print(HEADER)
  failed = 0
  for name, (step, start) in programs.items():
    try:
      print(row(name, step, start, placement), flush=True)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
      reason = str(error).splitlines()[0].replace('|', '/')
      print(f'| {name} | not compiled: {reason} | | | | |', flush=True)
      failed = 1
  sys.exit(failed)


if __name__ == '__main__':
  cli.launch(sys.modules[__name__], shared=False)
