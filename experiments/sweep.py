"""Trains all combinations of flag values, or a list of them, and sorts them."""

from fedftg_jax.programs import sweep
from fedftg_jax.system import cli

if __name__ == '__main__':
  cli.run(sweep)
