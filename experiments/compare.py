"""Compares methods over several seeds, on equal partitions and schedules."""

from fedftg_jax.programs import command

if __name__ == '__main__':
  command.launch('compare')
