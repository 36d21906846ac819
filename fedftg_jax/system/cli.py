"""Starts and ends programs: flags are parsed, and errors become one line.

A wrong value, an unknown flag or a missing file gives one line on stderr that
names the flag, the value and what would be right, and exit status 2, before any
data is loaded or anything is compiled.
"""

from collections.abc import Callable, Iterable, Sequence
import difflib
import errno
import functools
import io
import os
import pathlib
import re
import select
import signal
import sys
import types
from typing import Any

from absl import app, flags, logging
import jax

import fedftg_jax
from fedftg_jax.system import devices, own_flags, yaml_config
from fedftg_jax.system import help as help_

PRESETS = pathlib.Path(__file__).parents[1] / 'presets'
# A flag's value that begins with ~, which shells do not expand there.
_HOME = re.compile(r'^(--?\w+=(?:npz:|file:|folder:)?)~(?=/|$)')
# Names that papers and other codes use for some flags.
_ELSEWHERE = {
  'alpha': 'dirichlet_alpha',
  'epochs': 'local_epochs',
  'lr': 'learning_rate',
  'mu': 'prox_mu',
  'participation': 'cohort',
  'wd': 'weight_decay',
}
_HELP = re.compile(r'--?(help|helpshort|helpfull|h|\?)(?:=(.*))?')

own_flags.DEFINE_string(
  'preset',
  None,
  'Name of a file with flags, such as demo. The files are in '
  'experiments/presets; further flags take precedence.',
)
own_flags.DEFINE_string(
  'config',
  None,
  'YAML file that maps names of flags to values; further flags replace its '
  'values.',
)


_given: frozenset[str] = frozenset()


class RunError(Exception):
  """An error that occurs although all flags are right, such as divergence."""


class Diverged(RunError):
  """A model that is no longer finite."""


class Terminated(Exception):
  """The process was asked to end (SIGTERM) and has saved its work."""


class UsageError(Exception):
  """A wrong flag, with its value and what would be right."""

  def __init__(self, flag: str, value: Any, right: str):
    super().__init__(f'--{flag}={value}: {right}')


class UnknownFlag(UsageError):
  """A flag that does not exist."""


class ArgumentError(UsageError, ValueError):
  """A wrong argument that is not a flag, with what would be right."""

  def __init__(self, value: Any, right: str):
    Exception.__init__(self, f'{value}: {right}')


def launch(
  program: types.ModuleType,
  argv: Sequence[str] | None = None,
  shared: bool = True,
) -> None:
  """Runs a program: parses its flags, then calls its `main`.

  Args:
    program: a module of `fedftg_jax.programs`. Its docstring is shown by
      --help. If it takes an argument besides flags, ARGUMENT is that argument's
      name.
    argv: the command line, with the program's name first; default: that of this
      process.
    shared: whether it has the flags of the package besides its own.
  """
  app.run(
    lambda argv: guarded(functools.partial(program.main, *argv[1:])),
    argv=argv and list(argv),  # type: ignore[arg-type]
    flags_parser=functools.partial(parse, program=program, shared=shared),
  )


def guarded(main: Callable[[], None]) -> None:
  """Calls `main`, and turns errors and interruptions into one line."""
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):  # no error for a ± that it lacks
      stream.reconfigure(errors='replace')
  try:
    devices.start()
  except ValueError as error:
    _fail(error)
  try:
    main()
  except UsageError as error:
    _fail(error)
  except RunError as error:
    _fail(error, status=1)
  except OSError as error:
    if _output_has_no_reader():
      sys.exit(141)  # as the shell reports a program that SIGPIPE ended
    _fail(_os_error(error), status=1)
  except MemoryError as error:
    _fail(_memory(error), status=1)
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    _fail(_memory(error), status=1)
  except Terminated as stop:
    _fail(f'{stop}; the same command continues', status=143, what='terminated')
  except KeyboardInterrupt:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process ends now
    print(
      'interrupted; the same command continues from the last checkpoint',
      file=sys.stderr,
    )
    sys.exit(130)


def _os_error(error: OSError) -> str:
  """Formats an error of the system as PATH: message."""
  if not (error.filename and error.strerror):
    return str(error)
  text = f'{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}'
  if error.errno in (errno.ENOSPC, errno.EDQUOT):
    text += '; the same command continues once there is room'
  return text


def _memory(error: Exception) -> str:
  return (
    f'not enough memory ({str(error)[:200]}); a smaller --batch_size, '
    '--client_chunk or --seeds_at_once needs less'
  )


def parse(
  argv: Sequence[str],
  program: types.ModuleType | None = None,
  shared: bool = True,
) -> list[str]:
  """Parses the command line; exits with status 2 and one line if it is wrong.

  Args:
    argv: the command line, with the program's name first.
    program: the program, for --help.
    shared: whether the flags of the package are known besides the program's.

  Returns:
    The arguments that are not flags, with the program's name first.
  """
  if shared:
    own_flags.join()
  if program:
    _help(program, argv[1:])
  if '--version' in argv[1:]:
    print(fedftg_jax.__version__)
    sys.exit(0)
  global _given
  argument = getattr(program, 'ARGUMENT', '')
  try:
    _given = frozenset(
      name_of(more)
      for arg in argv[1:]
      for more in (_expanded(arg) if name_of(arg) == 'config' else [arg])
    )
    rest = flags.FLAGS(with_files(argv))
  except UsageError as error:
    _fail(error)
  except flags.UnrecognizedFlagError as error:
    given = next(  # as it was typed, including its value
      (
        arg.lstrip('-')
        for arg in argv[1:]
        if arg.lstrip('-').split('=')[0] == error.flagname
      ),
      error.flagname,
    )
    name = suggestion(error.flagname, flags.FLAGS)
    hint = f'did you mean --{name}? ' if name else ''
    _fail(f'--{given}: no such flag; {hint}--helpfull lists all flags')
  except flags.CantOpenFlagFileError as error:
    _fail(
      f'--flagfile: {str(error).removeprefix("ERROR:: ")}; must name a file '
      'with one --flag=value in each line'
    )
  except flags.Error as error:
    # A validator says what would be right; of a text that is no value, the
    # flag's parser knows.
    _fail(_plain(error, validated=error.__context__ is None))
  except SystemExit as stop:  # absl's --helpxml exits with status 1
    sys.exit(0 if stop.code == 1 else stop.code)
  if argument and len(rest) != 2:
    _fail(f'{" ".join(rest[1:]) or "no argument"}: must be one {argument}')
  if len(rest) > 1 and not argument:
    _fail(f'{rest[1]}: not understood; values are given as --flag=value')
  return rest


def _help(program: types.ModuleType, args: Sequence[str]) -> None:
  """Prints help and exits, if one of the arguments asks for it."""
  for kind, name in (m.groups() for m in map(_HELP.fullmatch, args) if m):
    try:
      if name is not None:
        print(help_.topic(name))
      else:
        print((help_.full if kind == 'helpfull' else help_.short)(program))
      sys.stdout.flush()
    except ValueError as error:
      _fail(UsageError('help', name, str(error)))
    except BrokenPipeError:
      _output_has_no_reader()
    sys.exit(0)


def _output_has_no_reader() -> bool:
  """Returns whether the reader of the output, such as `head`, has ended.

  Then what is left of the output goes nowhere.
  """
  try:
    output = sys.stdout.fileno()
  except io.UnsupportedOperation:  # no file, as in a notebook
    return False
  poll = select.poll()
  poll.register(output, 0)
  ended = any(event & select.POLLERR for _, event in poll.poll(0))
  if ended:
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
  return ended


def given() -> frozenset[str]:
  """Returns the names of the flags on the command line and in --config.

  Not those of presets and flag files, which may be for several programs.
  """
  return _given


def suggestion(name: str, known: Iterable[str]) -> str:
  """Returns the known flag that `name` probably means, '' if there is none."""
  close = difflib.get_close_matches(name, list(known), 1)
  return _ELSEWHERE.get(name) or (close[0] if close else '')


def name_of(arg: str) -> str:
  """Returns the name of a flag from --name=value, --name or --noname."""
  known = {*own_flags.FLAGS, *flags.FLAGS}
  name = arg.lstrip('-').partition('=')[0]
  short = name.removeprefix('no')
  return short if name not in known and short in known else name


def with_files(argv: Sequence[str]) -> list[str]:
  """Replaces flag files, presets and YAML files by the flags in them.

  Args:
    argv: a command line, with the program's name first.

  Returns:
    The command line without files.

  Raises:
    UsageError: for a preset that does not exist, or a wrong YAML file.
  """
  argv = list(argv)
  end = argv.index('--') if '--' in argv else len(argv)
  argv, rest = argv[:end], argv[end:]  # behind '--' nothing is a flag
  while any(
    name_of(arg) in ('flagfile', 'preset', 'config')
    for arg in argv[1:]
    if arg.startswith('-')
  ):
    argv = [more for arg in argv for more in _expanded(arg)]
    argv = flags.FLAGS.read_flags_from_files(argv)
  return [with_home(arg) for arg in argv] + rest


def values_of(argv: Sequence[str]) -> dict[str, str | bool]:
  """Returns the flags of a command line by name, with those of its files.

  Args:
    argv: a command line, with the program's name first.

  Returns:
    Texts, and True or False for a flag without a value. If a flag is given
    several times, the last one counts.

  Raises:
    UsageError: as for `with_files`.
  """
  found: dict[str, str | bool] = {}
  for arg in with_files(argv)[1:]:
    name, has_value, value = name_of(arg), '=' in arg, arg.partition('=')[2]
    found[name] = value if has_value else arg.lstrip('-') == name
  return found


def with_home(arg: str) -> str:
  """Replaces ~ by the home folder in a flag whose value is a path."""
  return _HOME.sub(lambda m: m[1] + os.path.expanduser('~'), arg)


def _expanded(arg: str) -> list[str]:
  """Replaces --preset=NAME by its flag file, --config=FILE by its flags."""
  _, _, value = arg.partition('=')
  if arg.startswith('-') and name_of(arg) == 'config':
    return _from_yaml(value)
  if arg.startswith('-') and name_of(arg) == 'preset':
    known = sorted(path.stem for path in PRESETS.glob('*.flags'))
    if value not in known:
      raise UsageError('preset', value, 'must be one of ' + ', '.join(known))
    return [f'--flagfile={PRESETS / value}.flags']
  return [arg]


def _from_yaml(path: str) -> list[str]:
  try:
    given = yaml_config.read(path)
  except ValueError as error:
    raise UsageError('config', path, str(error)) from error
  known = {*own_flags.FLAGS, *flags.FLAGS}
  for name in (flag[2:].partition('=')[0] for flag in given):
    if name not in known:
      close = suggestion(name, known)
      hint = f'; did you mean {close}?' if close else ''
      raise UsageError('config', path, f'{name}: no such flag{hint}')
  return given


def _plain(error: Exception, validated: bool) -> str:
  """Formats absl's message as one line: --flag=value: what would be right.

  Args:
    error: absl's error.
    validated: whether the flag's validator says what would be right.
  """
  message = ' '.join(str(error).split())
  match = re.match(r'flag --(\w+)=(.*?): (.*)', message)
  if not match or match[1] not in flags.FLAGS:
    return message
  name, value, why = match.groups()
  if not validated:
    return str(UsageError(name, value, right(name, why)))
  if isinstance(given := flags.FLAGS[name].value, list):
    value = ','.join(map(str, given))  # absl's message has Python's list
  return str(UsageError(name, value, why))


def right(name: str, otherwise: str) -> str:
  """Returns what flag `name` accepts, as its parser describes it."""
  known = own_flags.FLAGS if name in own_flags.FLAGS else flags.FLAGS
  parser = known[name].parser
  text = parser.syntactic_help
  if isinstance(parser, flags.BooleanParser):
    text = 'true or false'
  return f'must be {text}' if text else otherwise


def _fail(error: Exception | str, status: int = 2, what: str = 'error') -> None:
  print(f'{what}: ' + ' '.join(str(error).split()), file=sys.stderr)
  sys.exit(status)
