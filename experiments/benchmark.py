"""Times a round of ours and of what one would pick instead, side by side."""

from fedftg_jax.programs import command

if __name__ == '__main__':
  command.launch('benchmark')
