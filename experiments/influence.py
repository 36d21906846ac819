"""Ranks clients by how the model would differ without them."""

from fedftg_jax.programs import command

if __name__ == '__main__':
  command.launch('influence')
