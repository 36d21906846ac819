"""Measures when FedFTG helps, one factor at a time, paired by seed."""

from fedftg_jax.programs import command

if __name__ == '__main__':
  command.launch('ablation')
