"""Ranks clients by what the model would be without them."""

from fedftg_jax.programs import command

if __name__ == '__main__':
  command.launch('influence')
