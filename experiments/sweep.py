"""Trains all combinations of flag values, or a list of them, and sorts them."""

from fedftg_jax.programs import command

if __name__ == '__main__':
  command.launch('sweep')
