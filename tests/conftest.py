"""What all tests share."""

import os
import tempfile

# Compilation is most of the tests' time: half of it without optimisation. The
# main job, which CI runs after the tests, is compiled as users' jobs are.
os.environ['XLA_FLAGS'] = ' '.join(
    [os.environ.get('XLA_FLAGS', ''), '--xla_backend_optimization_level=1'])

from absl import flags  # pylint: disable=g-import-not-at-top,wrong-import-position
import jax  # pylint: disable=g-import-not-at-top,wrong-import-position

# absltest's temporary folders need parsed flags, also under pytest.
flags.FLAGS.mark_as_parsed()

# Many tests build the same program anew; it is compiled once.
jax.config.update('jax_compilation_cache_dir', tempfile.mkdtemp())
jax.config.update('jax_persistent_cache_min_compile_time_secs', .2)
