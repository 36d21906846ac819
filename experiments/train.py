"""Trains one federated model and writes metrics, pictures and parameters."""

from fedftg_jax.programs import command

if __name__ == '__main__':
  command.launch('train')
