"""Draws a partition and says how unequal it is, before anything is trained."""

from fedftg_jax.programs import command

if __name__ == '__main__':
  command.launch('partition')
