"""The command `fedftg NAME [--flag=value ...]`."""

import importlib
import os
import signal
import sys

import fedftg_jax
from fedftg_jax import programs


def main() -> None:
  """Runs the program that the first argument names."""
  name, *rest = sys.argv[1:] or ['']
  if name in programs.NAMES:
    launch(name, [f'fedftg {name}', *rest])
  elif name in ('', '-h', '--help', 'help'):
    print(_usage())
  elif name == '--version':
    print(fedftg_jax.__version__)
  else:
    print(
      f'error: {name}: no such program; must be one of '
      f'{", ".join(programs.NAMES)}',
      file=sys.stderr,
    )
    sys.exit(2)


def launch(name: str, argv: list[str] | None = None) -> None:
  """Runs the program `name`; see `cli.launch`."""
  before = signal.getsignal(signal.SIGINT)
  if before is signal.default_int_handler:  # else it is ignored, as under nohup
    # Imported modules could swallow an exception or replace it by another.
    signal.signal(signal.SIGINT, _interrupted)
  # Importing takes a second or two. Each program defines its own flags, so only
  # this one is imported.
  from fedftg_jax.system import cli

  program = importlib.import_module(f'fedftg_jax.programs.{name}')
  signal.signal(signal.SIGINT, before)
  cli.launch(program, argv)


def _interrupted(number, frame) -> None:
  """Ends the process at once, because nothing has been done yet."""
  del number, frame
  os.write(2, b'interrupted before anything was done\n')
  os._exit(130)


def _usage() -> str:
  lines = [
    f'  fedftg {name:<11} {what}' for name, what in programs.NAMES.items()
  ]
  return '\n'.join(
    [
      'Federated learning with FedFTG, simulated in JAX.',
      '',
      *lines,
      '',
      'fedftg NAME --help lists the flags of a program. fedftg compare '
      '--preset=demo is a first run.',
    ]
  )
