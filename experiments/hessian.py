"""Measures the curvature of a run's loss, and how it differs across clients."""

from fedftg_jax.programs import command

if __name__ == '__main__':
  command.launch('hessian')
