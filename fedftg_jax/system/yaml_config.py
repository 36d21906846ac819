"""Reads flags from a YAML file that maps names of flags to values.

method: fed_avg+fed_ftg
rounds: 50
ftg_preset: robust
"""

from collections.abc import Iterator
import pathlib
from typing import Any

from absl import flags

# Flags that name further files: a file could include itself.
_NOT_HERE = ('config', 'flagfile')


def read(path: str) -> list[str]:
  """Reads a YAML file as flags.

  Only plain values are read; a file cannot run code.

  Args:
    path: path of the file. A list becomes values with commas between them, or
      several flags if the flag may be repeated. An entry that is null is
      skipped.

  Returns:
    '--name=value' for each entry, in the order of the file.

  Raises:
    ValueError: for a file that cannot be read, or an entry that cannot be a
      flag.
  """
  import yaml  # only needed here

  try:
    loaded = yaml.safe_load(pathlib.Path(path).expanduser().read_text('utf-8'))
  except OSError as error:
    raise ValueError(f'cannot be read: {error.strerror}') from error
  except (yaml.YAMLError, ValueError, RecursionError) as error:
    raise ValueError(f'is not YAML ({" ".join(str(error).split())})') from error
  if not isinstance(loaded, dict):
    raise ValueError('must have a line NAME: VALUE for each flag')
  return [flag for entry in loaded.items() for flag in _flags(*entry)]


def _flags(name: Any, value: Any) -> Iterator[str]:
  if not isinstance(name, str) or name in _NOT_HERE:
    raise ValueError(
      f'has the key {name!r}; keys must be names of flags, except '
      f'{" and ".join(_NOT_HERE)}'
    )
  if value is None:
    return
  values = value if isinstance(value, list) else [value]
  for each in values:
    if not isinstance(each, str | int | float):
      raise ValueError(
        f'{name} is {each!r}; must be text, a number, true or false, or a list '
        'of these'
      )
  if name in flags.FLAGS and isinstance(flags.FLAGS[name], flags.MultiFlag):
    yield from (f'--{name}={each}' for each in values)
  else:
    yield f'--{name}={",".join(map(str, values))}'
