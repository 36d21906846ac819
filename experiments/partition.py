"""Draws a partition and says how unequal it is, before anything is trained."""

from fedftg_jax.programs import partition
from fedftg_jax.system import cli

if __name__ == '__main__':
  cli.run(partition)
