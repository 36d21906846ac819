"""What --help prints: a program's docstring, and its flags by what they are
about."""

import sys
import textwrap
import types

from absl import flags

_WIDTH = 88


def text(program: types.ModuleType) -> str:
  """Describes a program and its flags.

  Flags stand under the titles in SECTIONS of the module that defines them, or
  else under the first line of its docstring; those of the program itself come
  first.
  """
  parts = [(program.__doc__ or '').rstrip()]
  modules = flags.FLAGS.flags_by_module_dict()
  for name in sorted(modules, key=lambda name: name != program.__name__):
    module = sys.modules.get(name)
    if module is None or not name.startswith('fedftg_jax.'):
      continue
    if name.startswith('fedftg_jax.programs.') and module is not program:
      continue
    title = (module.__doc__ or '').splitlines()[0].rstrip('.')
    if module is program:
      title = 'Flags of this program'
    sections = getattr(
      module, 'SECTIONS', {title: [flag.name for flag in modules[name]]}
    )
    for title, names in sections.items():
      parts.append('\n'.join([title + ':', *(_flag(n) for n in names)]))
  parts.append(
    'Flags may also stand in a file, one in each line: --flagfile=PATH. '
    '--helpfull lists those of the libraries, too.'
  )
  return '\n\n'.join(parts)


def _flag(name: str) -> str:
  flag = flags.FLAGS[name]
  shown = f'  --{name}'
  if flag.boolean:
    shown = f'  --[no]{name}'
  values = getattr(flag.parser, 'enum_values', None)
  if values:
    shown += '=' + '|'.join(values)
  elif not flag.boolean:
    shown += '=' + flag.flag_type().upper().replace(' ', '_')
  default = (
    ''
    if flag.default in (None, '', []) or flag.boolean
    else (f' (default: {flag.default_as_str})'.replace("'", ''))
  )
  if flag.boolean and flag.default:
    default = ' (default: yes)'
  return '\n'.join(
    [
      shown,
      textwrap.fill(
        flag.help + default,
        _WIDTH,
        initial_indent=' ' * 6,
        subsequent_indent=' ' * 6,
      ),
    ]
  )
