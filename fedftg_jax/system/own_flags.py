"""Holds the flags of our programs apart from the flags of the process.

A program that imports the package may define flags of its own with the same
names, such as --seed. Our flags are therefore added to those of the process
(`absl.flags.FLAGS`) only when one of our programs starts. Both sets then share
the same flag objects, and so the same values.
"""

import functools
import sys
from typing import Any

from absl import flags

FLAGS = flags.FlagValues()

DEFINE = functools.partial(flags.DEFINE, flag_values=FLAGS)
DEFINE_bool = functools.partial(flags.DEFINE_bool, flag_values=FLAGS)
DEFINE_enum = functools.partial(flags.DEFINE_enum, flag_values=FLAGS)
DEFINE_float = functools.partial(flags.DEFINE_float, flag_values=FLAGS)
DEFINE_integer = functools.partial(flags.DEFINE_integer, flag_values=FLAGS)
DEFINE_string = functools.partial(flags.DEFINE_string, flag_values=FLAGS)


def join() -> None:
  """Adds our flags to the flags of the process, unless they are there."""
  for module, of_module in FLAGS.flags_by_module_dict().items():
    for flag in of_module:
      if flag.name not in flags.FLAGS:
        flags.FLAGS[flag.name] = flag
        flags.FLAGS.register_flag_by_module(module, flag)
        flags.FLAGS.register_flag_by_module_id(id(sys.modules[module]), flag)


def values(module: str) -> dict[str, Any]:
  """Returns the values of the flags that a module defines, by name."""
  return {
    flag.name: flag.value for flag in FLAGS.flags_by_module_dict()[module]
  }
