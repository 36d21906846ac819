"""Writes what --help prints: a program's docstring and its flags, in groups.

--help shows the flags that most users need, one line each, --help=METHOD all
flags of a method, --help=GROUP those of a group, and --helpfull everything.
"""

from collections.abc import Iterator
import difflib
import re
import sys
import textwrap
import types

from absl import flags

_WIDTH = 80
_TYPES = {
  'comma separated list of strings': 'LIST',
  'string enum': 'NAME',
  'int or auto': 'INT|auto',
}
_COLUMN = 31  # where the texts of one-line descriptions begin
_FILES = (
  'Flags from a file, one per line: --flagfile=PATH, or in YAML: --config=PATH.'
)
# The flags that --help shows, by group, where a program has them.
COMMON = {
  'Data': (
    'dataset',
    'train_examples',
    'validation_share',
    'augment',
    'data_dir',
  ),
  'Partition': (
    'num_clients',
    'partition',
    'dirichlet_alpha',
    'classes_per_client',
    'partition_seed',
  ),
  'Federation': ('rounds', 'cohort', 'schedule', 'dropout_rate', 'uplink'),
  'Training': (
    'model',
    'norm',
    'local_epochs',
    'batch_size',
    'learning_rate',
    'lr_decay',
    'momentum',
    'weight_decay',
    'seed',
    'seeds',
    'vary_partition',
  ),
  'Methods': (
    'method',
    'ftg_preset',
    'server_optimizer',
    'server_learning_rate',
  ),
  'Output': (
    'workdir',
    'eval_every',
    'checkpoint_every',
    'evaluate_clients',
    'personalise',
    'tensorboard',
  ),
}


def short(program: types.ModuleType) -> str:
  """Returns what --help prints.

  Args:
    program: the program. If it does not use all groups of COMMON, GROUPS names
      those that it uses.

  Returns:
    The first paragraph and the examples of the docstring, the program's own
    flags, and the common flags that it has, one line each.
  """
  first, *others = (program.__doc__ or '').strip('\n').split('\n\n')
  parts = [first, *(p for p in others[:1] if p.startswith('  '))]
  shown = getattr(program, 'GROUPS', COMMON)
  own = _own(program)
  common = [
    (title, [name for name in names if name not in own])
    for title, names in COMMON.items()
    if title in shown
  ]
  for title, names in [('Flags of this program', own), *common]:
    lines = [_line(name) for name in names if name in flags.FLAGS]
    if title == 'Methods' and lines:
      lines += _wrapped(', '.join(sorted(_methods())), '  Methods: ')
    if lines:
      parts.append('\n'.join([f'{title}:', *lines]))
  more = f'All flags, and more about the program: --helpfull. {_FILES}'
  if shown and _sections():
    groups = ', '.join(map(str.lower, _sections()))
    more = (
      'Flags of a method: --help=METHOD, such as --help=fed_ftg. Flags of a '
      f'group: --help=GROUP, of {groups}. {more}'
    )
  return '\n\n'.join([*parts, '\n'.join(_wrapped(more, rest=''))])


def full(program: types.ModuleType) -> str:
  """Returns what --helpfull prints: the docstring, and all flags."""
  groups = {'Flags of this program:': list(_own(program))}
  groups |= {f'{title}:': names for title, names in _sections().items()}
  groups |= dict(_methods().values())
  modules = flags.FLAGS.flags_by_module_dict()
  for module in sorted(modules, key=lambda name: (not _is_ours(name), name)):
    if not module.startswith('fedftg_jax.programs.'):
      groups[_title(module)] = [flag.name for flag in modules[module]]
  shown: set[str] = set()
  parts = [(program.__doc__ or '').strip('\n')]
  for title, names in groups.items():
    new = [n for n in dict.fromkeys(names) if n not in shown]
    shown.update(new)
    if new:
      parts.append('\n'.join([*_wrapped(title), *map(_entry, new)]))
  return '\n\n'.join([*parts, _FILES])


def topic(name: str) -> str:
  """Returns what --help=NAME prints: the flags of a method or a group.

  Args:
    name: a method, several joined with +, or a group.

  Raises:
    ValueError: if there is no such method or group.
  """
  methods = _methods()
  groups = {title.lower(): title for title in _sections()}
  if name.lower() in groups:
    title = groups[name.lower()]
    return '\n'.join([f'{title}:', *map(_entry, _sections()[title])])
  parts = []
  for part in name.split('+'):
    if part not in methods:
      close = difflib.get_close_matches(part.lower(), [*methods, *groups], 1)
      hint = f'; did you mean --help={close[0]}?' if close else ''
      raise ValueError(f'no such method or group{hint}')
    text, names = methods[part]
    parts.append(
      '\n'.join([*_wrapped(text), *map(_entry, names)])
      if names
      else '\n'.join(_wrapped(f'{text} It has no flags of its own.'))
    )
  return '\n\n'.join(parts)


def _modules() -> Iterator[types.ModuleType]:
  """Yields the modules of this package that define flags."""
  for name in filter(_is_ours, flags.FLAGS.flags_by_module_dict()):
    yield sys.modules[name]


def _is_ours(module: str) -> bool:
  return module.startswith('fedftg_jax.')


def _title(module: str) -> str:
  """Returns the first line of our module's docstring, or a library's name."""
  doc = sys.modules[module].__doc__ if _is_ours(module) else ''
  return (doc or f'Flags of the library {module}:').splitlines()[0]


def _sections() -> dict[str, list[str]]:
  """Returns the groups of flags, from the modules that define them."""
  return {
    title: names
    for module in _modules()
    for title, names in getattr(module, 'SECTIONS', {}).items()
  }


def _methods() -> dict[str, tuple[str, list[str]]]:
  """Returns the description and the flags of each method."""
  return {
    method: found
    for module in _modules()
    for method, found in getattr(module, 'METHODS', {}).items()
  }


def _own(program: types.ModuleType) -> tuple[str, ...]:
  """Returns the flags that a program defines itself."""
  name = program.__name__
  if name == '__main__':  # a script; absl calls it by its path
    name = sys.argv[0]
  defined = flags.FLAGS.flags_by_module_dict().get(name, [])
  return tuple(flag.name for flag in defined)


def _shown(flag: flags.Flag, value: str) -> str:
  if flag.boolean:
    return f'  --[no]{flag.name}'
  return f'  --{flag.name}={value}'


def _text(flag: flags.Flag) -> str:
  """Returns a flag's help, without the values that absl puts before it."""
  return re.sub(r'^<[^>]*>: ', '', flag.help or '')


def _type(flag: flags.Flag) -> str:
  kind = flag.flag_type()
  return _TYPES.get(kind, kind.split()[-1].upper())


def _default(flag: flags.Flag) -> str:
  if flag.default in (None, '', []):
    return ''
  return (flag.default_as_str or '').strip("'")


def _line(name: str) -> str:
  """Describes a flag in one line, by the first sentence of its help."""
  flag = flags.FLAGS[name]
  shown = _shown(flag, _default(flag) or _type(flag))
  if len(shown) >= _COLUMN:
    shown = _shown(flag, _type(flag))
  text = re.split(r'(?<=\.)\s', _text(flag), maxsplit=1)[0]
  if flag.boolean and flag.default:
    text += ' (default: yes)'
  text = textwrap.shorten(text, _WIDTH - _COLUMN, placeholder=' ...')
  return f'{shown:<{_COLUMN}}{text}'


def _entry(name: str) -> str:
  """Describes a flag in full: its values, its help and its default."""
  flag = flags.FLAGS[name]
  values = getattr(flag.parser, 'enum_values', None)
  shown = _shown(flag, '|'.join(values) if values else _type(flag))
  text = _text(flag)
  if flag.boolean:
    text += ' (default: yes)' if flag.default else ''
  elif _default(flag):
    text += f' (default: {_default(flag)})'
  return '\n'.join([shown, *_wrapped(text, ' ' * 6, ' ' * 6)])


def _wrapped(text: str, first: str = '', rest: str = '    ') -> list[str]:
  return textwrap.wrap(
    text,
    _WIDTH,
    initial_indent=first,
    subsequent_indent=rest,
    break_on_hyphens=False,
    break_long_words=False,
  )
