"""When does FedFTG help? One factor at a time around a centre, paired by
seed."""

from fedftg_jax.programs import command

if __name__ == '__main__':
  command.launch('ablation')
