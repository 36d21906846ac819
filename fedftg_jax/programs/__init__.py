"""One module for each program: `fedftg NAME`.

A module has `main`, and ARGUMENT, what it takes besides flags, if anything.
"""

# What each does, in a line.
NAMES = {
  'train': 'trains one federated model',
  'compare': 'compares methods over several seeds',
  'sweep': 'trains all combinations of flag values, and sorts them',
  'ablation': 'varies one factor at a time, with and without FedFTG',
  'compression': 'compares codecs of what clients send, by bits per parameter',
  'influence': 'ranks clients by what the model would be without them',
  'partition': 'draws a partition and says how unequal it is',
  'hessian': 'measures the curvature of a run, and how unlike clients are',
  'report': 'makes report.html of a folder of results anew',
  'benchmark': 'times a round of ours and of other simulators',
}
