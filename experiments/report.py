"""Makes report.html of a run, comparison or sweep, from the files in its
folder."""

from fedftg_jax.programs import command

if __name__ == '__main__':
  command.launch('report')
