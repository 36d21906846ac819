"""Makes report.html of a run, comparison or sweep, from the files in its folder."""

from fedftg_jax.programs import report
from fedftg_jax.system import cli

if __name__ == '__main__':
  cli.run(report)
