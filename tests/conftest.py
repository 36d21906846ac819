"""What all tests share."""

import gc
import os

# Most of a test's time is compiling. Without LLVM's optimisation, and with
# fusions emitted as before MLIR, it takes a third; who names a level gets that
# and the rest as users have it. The variable is read when JAX is imported, here
# and in the processes that tests start.
if 'xla_backend_optimization_level' not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = ' '.join(
    [
      os.environ.get('XLA_FLAGS', ''),
      '--xla_backend_optimization_level=0',
      '--xla_cpu_use_fusion_emitters=false',
      '--xla_cpu_parallel_codegen_split_count=1',
    ]
  )

gc.disable()  # a tenth of the time of tracing; modules end with a collection

from absl import flags

# It defines flags, and TFDS imports it late: within a test's `flagsaver`, whose
# end would take them away from the tests that follow.
import jax
import pytest

# absltest's temporary folders need parsed flags, also under pytest.
flags.FLAGS.mark_as_parsed()

# For tests of several devices; whatever does not ask for them uses the first.
jax.config.update('jax_num_cpu_devices', 8)


def pytest_configure(config):
  """Many tests build the same program anew; it is compiled once, for all
  workers and for the next time (`pytest --cache-clear` forgets)."""
  jax.config.update(
    'jax_compilation_cache_dir', str(config.cache.mkdir('compiled'))
  )
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


@pytest.fixture(autouse=True, scope='module')
def forget_compiled():
  """Frees a module's programs: each holds memory maps, of which the system
  gives a process only so many (65,530; past that the compiler crashes)."""
  yield
  jax.clear_caches()
  gc.collect()
