"""What all tests share."""

import tempfile

from absl import flags
import jax

# absltest's temporary folders need parsed flags, also under pytest.
flags.FLAGS.mark_as_parsed()

# For tests of several devices; whatever does not ask for them uses the first.
jax.config.update('jax_num_cpu_devices', 8)

# Many tests build the same program anew; it is compiled once.
jax.config.update('jax_compilation_cache_dir', tempfile.mkdtemp())
jax.config.update('jax_persistent_cache_min_compile_time_secs', .2)
