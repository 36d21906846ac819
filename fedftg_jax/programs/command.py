"""The command `fedftg NAME [--flag=value ...]`."""

import importlib
import sys

from fedftg_jax import programs


def main() -> None:
  """Runs the program that the first argument names."""
  name, *rest = sys.argv[1:] or ['']
  if name in programs.NAMES:
    from fedftg_jax.system import cli  # takes time to import

    # Only this one: each brings flags of its own, and what it needs.
    program = importlib.import_module(f'fedftg_jax.programs.{name}')
    cli.run(program, [f'fedftg {name}', *rest])
  elif name in ('', '-h', '--help', 'help'):
    print(_usage())
  elif name == '--version':
    import fedftg_jax  # takes time to import

    print(fedftg_jax.__version__)
  else:
    print(
      f'error: {name}: no such program; must be one of '
      f'{", ".join(programs.NAMES)}',
      file=sys.stderr,
    )
    sys.exit(2)


def _usage() -> str:
  lines = [
    f'  fedftg {name:<10} {what}' for name, what in programs.NAMES.items()
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
