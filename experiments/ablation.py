"""When does FedFTG help? One factor at a time around a centre, paired by seed."""

from fedftg_jax.programs import ablation
from fedftg_jax.system import cli

if __name__ == '__main__':
  cli.run(ablation)
