"""Draws a partition and measures how skewed it is, before any training."""

from fedftg_jax.programs import command

if __name__ == '__main__':
  command.launch('partition')
