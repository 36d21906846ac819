"""Trains one federated model and writes metrics, pictures and parameters."""

from fedftg_jax.programs import train
from fedftg_jax.system import cli

if __name__ == '__main__':
  cli.run(train)
