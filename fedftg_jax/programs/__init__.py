"""The programs, one module each: `fedftg NAME`.

A module has `main`. If a program takes an argument besides flags, ARGUMENT is
its name. If --help should not show all groups of common flags, GROUPS has those
that it should show.
"""

# One line on each program.
NAMES = {
  'train': 'trains one federated model',
  'compare': 'compares methods over several seeds',
  'sweep': 'trains all combinations of flag values, and sorts the results',
  'ablation': 'varies one factor at a time, with and without FedFTG',
  'compression': 'compares codecs of client updates, by bits per parameter',
  'influence': 'ranks clients by how the model would differ without them',
  'partition': 'draws a partition and measures how skewed it is',
  'hessian': "measures the curvature of a run's loss, and across clients",
  'check_paper': 'compares finished runs with published figures',
  'evaluate': 'scores the trained model of a run on a data set',
  'report': 'writes report.html again, from a folder of results',
  'benchmark': 'times a round of this package and of other simulators',
}
