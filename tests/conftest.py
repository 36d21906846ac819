"""Settings and fixtures that all tests share."""

import gc
import os

# Most of a test's time is compiling. It takes a third without LLVM's
# optimisation and without the MLIR emitters of fusions. If XLA_FLAGS names a
# level, that level is used, and everything else is as users have it. The
# variable is read when JAX is imported, here and in the processes that tests
# start.
if 'xla_backend_optimization_level' not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = ' '.join(
    [
      os.environ.get('XLA_FLAGS', ''),
      '--xla_backend_optimization_level=0',
      '--xla_cpu_use_fusion_emitters=false',
      '--xla_cpu_parallel_codegen_split_count=1',
    ]
  )

gc.disable()  # saves a tenth of tracing; each module ends with a collection

from absl import flags

# It defines flags. TFDS would import it within a test's `flagsaver`, whose end
# would remove the flags for the tests that follow.
from array_record.python import array_record_data_source  # noqa: F401
import jax
import pytest

from fedftg_jax.configuration import resolve  # noqa: F401 (defines our flags)
from fedftg_jax.system import own_flags

# As when a program begins. Not within a `flagsaver`: its end takes them away.
own_flags.join()

# absltest's temporary folders need parsed flags, also under pytest.
flags.FLAGS.mark_as_parsed()

# For tests of several devices; other tests use the first device.
jax.config.update('jax_num_cpu_devices', 8)


def pytest_configure(config):
  """Sets up a compile cache that all workers and later runs share.

  Many tests build the same program again. `pytest --cache-clear` empties it;
  with `-p no:cacheprovider` there is none.
  """
  if not hasattr(config, 'cache'):
    return
  jax.config.update(
    'jax_compilation_cache_dir', str(config.cache.mkdir('compiled'))
  )
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


@pytest.fixture(autouse=True, scope='module')
def forget_compiled():
  """Frees the compiled programs of a module.

  Each program holds memory maps, and the system gives a process only 65,530 of
  them; beyond that the compiler crashes.
  """
  yield
  jax.clear_caches()
  gc.collect()
