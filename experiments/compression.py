"""Measures accuracy and distortion against bits per parameter, by codec."""

from fedftg_jax.programs import command

if __name__ == '__main__':
  command.launch('compression')
