"""Scores the trained model of a finished run on a data set."""

from fedftg_jax.programs import command

if __name__ == '__main__':
  command.launch('evaluate')
