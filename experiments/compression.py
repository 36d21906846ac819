"""Accuracy and distortion against bits per parameter, for every codec."""

from fedftg_jax.programs import command

if __name__ == '__main__':
  command.launch('compression')
