"""Times a round of this package and of alternatives, side by side."""

from fedftg_jax.programs import command

if __name__ == '__main__':
  command.launch('benchmark')
