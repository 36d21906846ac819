"""Times a round of ours and of what one would pick instead, side by side."""

from fedftg_jax.programs import benchmark
from fedftg_jax.system import cli

if __name__ == '__main__':
  cli.run(benchmark)
