"""Ranks clients by how the model would differ without them.

  fedftg influence --method=fed_avg --model=mlp --num_clients=10 --rounds=5
  fedftg influence --flip_labels=0.5,3 --cleanse=3 --seeds=5 --vary_partition

The simulation is trained once as it is, and once for each of --curvatures while
the influence of the clients in --track is estimated (docs/influence.md has the
equation). One of them, retraining, is not an estimate: it leaves each client
out of a training of its own. The others are compared with it by Pearson's and
Spearman's correlation over clients (medians over seeds), and by their cost per
client, in rounds.

A client's influence is the loss of the model without it minus the loss of the
model. It is measured on the validation set if there is one
(--validation_share), or else on the test set, which is then optimistic if
cleansing is judged on it, too. A high influence means that the client helps.

With --flip_labels some clients have wrong labels. The area under the ROC curve
measures how well a ranking finds them, compared with a ranking by the clients'
losses. With --cleanse the worst clients by the first estimate, by loss and at
random are left out of a training from the start.

Finished runs are skipped: the same command continues where it was stopped.

It writes into --workdir: report.html, influence.json, scores.csv, scores.npz,
table.md, influence.png, and each run's files in plain/seedK/, CURVATURE/seedK/
and without_RANKING/seedK/.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags as absl_flags
import numpy as np

from fedftg_jax.configuration import assembly, flags, folders, resolve
from fedftg_jax.configuration.resolve import Configuration
from fedftg_jax.results import influence, page, plots, statistics
from fedftg_jax.runs import suite
from fedftg_jax.system import cli, devices, files, progress

absl_flags.DEFINE_list(
  'curvatures',
  [influence.TRUTH, 'exact'],
  'Values of --curvature to compare. They are '
  + ', '.join(flags.CURVATURES)
  + '.',
)
absl_flags.DEFINE_integer(
  'cleanse', 0, 'Number of the worst clients to leave out.', lower_bound=0
)
FLAGS = absl_flags.FLAGS

CLAIM = {'program': 'influence'}
PLAIN = influence.PLAIN


def main() -> None:
  configs = make_configs(FLAGS.curvatures, FLAGS.track or 'all')
  resolve.say_unused(configs.values())
  folder = folders.workdir(
    FLAGS.workdir, configs[PLAIN], 'influence', *FLAGS.curvatures
  )
  with folders.opened(folder, CLAIM):
    results = suite.train_all(folder, CLAIM, configs)
    if not results:
      return
    summary = summarise(results, configs)
    if FLAGS.cleanse:
      summary['cleansing'] = cleanse(folder, configs[PLAIN], summary, results)
    write_results(summary, folder)


def make_configs(
  curvatures: Sequence[str], track: str
) -> dict[str, Configuration]:
  """Makes the configurations without tracking and with each curvature.

  Raises:
    cli.UsageError: for an unknown or repeated curvature, or another wrong
      value.
  """
  text = ','.join(curvatures)
  if not curvatures or len(set(curvatures)) < len(curvatures):
    raise cli.UsageError('curvatures', text, 'must be different curvatures')
  configs = {PLAIN: resolve.config(track='')}
  for name in curvatures:
    if name not in flags.CURVATURES:
      raise cli.UsageError(
        'curvatures', name, 'must be of ' + ', '.join(flags.CURVATURES)
      )
    configs[name] = resolve.config(track=track, curvature=name)
  if FLAGS.cleanse:
    _check_cleansing(curvatures, track, configs[PLAIN])
  return configs


def _check_cleansing(curvatures, track, config) -> None:
  def require(condition, right):
    if not condition:
      raise cli.UsageError('cleanse', FLAGS.cleanse, right)

  require(set(curvatures) - {influence.TRUTH}, 'needs an estimate')
  require(not devices.several_processes(), 'needs a single process')
  num = config.get('num_clients') if track == 'all' else track.count(',') + 1
  require(
    num is None or FLAGS.cleanse < num,
    'must be below the number of tracked clients',
  )


def summarise(
  results: statistics.Results, configs: Mapping[str, Configuration]
) -> dict[str, Any]:
  """Returns the content of influence.json, without cleansing."""
  runs = {name: of_name for name, of_name in results.items() if name != PLAIN}
  some = next(iter(configs[name] for name in runs))
  problems = [
    assembly.make_problem(
      suite.of_seed(some, seed), FLAGS.data_dir, FLAGS.manual_dir
    )
    for seed in suite.seeds()
  ]
  return influence.summarise(
    {
      name: [run['rows'] for run in of_name]  # type: ignore[index]
      for name, of_name in runs.items()
    },
    seeds=list(suite.seeds()),
    clients=assembly.ids(some, 'track', len(problems[0].parts)),
    examples=[[len(part) for part in p.parts] for p in problems],
    flipped=[p.flipped for p in problems],
    seconds={
      name: float(np.mean([run['train_seconds'] for run in of_name]))  # type: ignore[index]
      for name, of_name in results.items()
    },
  )


def cleanse(folder, config, summary, results) -> dict[str, Any]:
  """Trains without the worst clients, by several rankings.

  Returns:
    By ranking, and 'nobody' for the plain runs: the final accuracies, and the
    clients that are left out, for each seed.
  """
  worst = influence.worst(summary, FLAGS.cleanse)
  found: dict[str, Any] = {
    influence.NOBODY: {
      'final_accuracy': statistics.mean_and_std(
        [run['final_accuracy'] for run in results[PLAIN]]
      ),
      'left_out': [[] for _ in suite.seeds()],
    }
  }
  for ranking, of_seeds in worst.items():
    finals = []
    for seed, ids in zip(suite.seeds(), of_seeds):
      run = suite.train_one(
        f'without the worst by {ranking}',
        folder / f'{influence.WITHOUT}{ranking}' / f'seed{seed}',
        config.replace(leave_out=','.join(map(str, ids))),
        seed,
      )
      finals.append(run['final_accuracy'])
    found[ranking] = {
      'final_accuracy': statistics.mean_and_std(finals),
      'left_out': of_seeds,
    }
  return found


def write_results(summary: Mapping[str, Any], folder) -> None:
  """Writes and prints the results."""
  files.write_json(folder / 'influence.json', summary)
  scores = influence.score_rows(summary)
  files.write_csv(folder / 'scores.csv', scores)
  files.write_tree(
    folder / 'scores.npz',
    {name: np.array([row[name] for row in scores]) for name in scores[0]},
  )
  tables = influence.tables_of(summary)
  statistics.write_table(folder / 'table.md', tables['estimates'])
  panels = influence.panels(summary)
  if panels:
    with files.replacing(folder / 'influence.png') as temporary:
      plots.estimates(temporary, panels)
  for header, rows in tables.values():
    progress.show(list(header), [list(row) for row in rows])
  print(f'report: {page.write(folder)}; scores: {folder}/scores.csv')
