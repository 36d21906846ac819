"""absltest's temporary folders need parsed flags, also under pytest."""

from absl import flags

flags.FLAGS.mark_as_parsed()
