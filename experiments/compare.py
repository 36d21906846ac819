"""Compares methods over several seeds, on equal partitions and schedules."""

from fedftg_jax.programs import compare
from fedftg_jax.system import cli

if __name__ == '__main__':
  cli.run(compare)
