"""Compares finished runs with published figures."""

from fedftg_jax.programs import command

if __name__ == '__main__':
  command.launch('check_paper')
