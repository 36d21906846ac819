"""Compares methods over several seeds, on equal partitions and schedules.

  fedftg compare --methods=fed_avg,fed_ftg --seeds=3

A method may carry flags of its own, each after a colon; it is then shown under
that name:

  --methods=fed_avg,fed_ftg:ftg_preset=official,fed_ftg:ftg_preset=paper

Seeds start at --seed and change models, batches and generated images; partition
and participation are those of --partition_seed and --schedule_seed for all, or,
with --vary_partition, change with the seed too. Runs that are finished are
skipped: a comparison that was stopped is continued by the same command.

At the end it says what can be concluded and what cannot: each method is tested
against the first, paired by seed.

Writes into --workdir: report.html with its tables and pictures in report/,
table.md, summary.json, curves.png, ro-crate-metadata.json, and each run's files
in METHOD/seedK/.
"""

import re

from absl import flags as absl_flags

from fedftg_jax.configuration import flags, folders, resolve
from fedftg_jax.configuration.resolve import Configuration
from fedftg_jax.results import page, plots, statistics, verdicts
from fedftg_jax.runs import suite
from fedftg_jax.system import cli, files, progress

absl_flags.DEFINE_list(
  'methods',
  ['fed_avg', 'fed_ftg'],
  'Methods to compare, separated by commas. Each may carry flags after colons: '
  'fed_ftg:ftg_preset=paper.',
)
FLAGS = absl_flags.FLAGS

# What every method of a comparison shares.
_SHARED = (
  'seed',
  'rounds',
  'eval_every',
  'dataset',
  'data_dir',
  'manual_dir',
  'workdir',
  'public_data',
  'validation_share',
  'dropout_rate',
  'dropout_after_work',
  'straggler_rate',
  'min_availability',
  'partition',
  'partition_seed',
  *sorted({flag for _, used in flags.PARTITIONS.values() for flag in used}),
  'flip_labels',
  'num_clients',
  'cohort',
  'leave_out',
  'schedule',
  'schedule_seed',
)


def main() -> None:
  base = resolve.config()
  configs = parse_methods(FLAGS.methods)
  resolve.say_unused(configs.values())
  folder = folders.workdir(FLAGS.workdir, base, 'compare', *configs)
  shared = {
    'program': 'compare',
    **{k: v for k, v in base.items() if k in _SHARED and k != 'seed'},
  }
  with folders.opened(folder, {**shared, **folders.contents(shared)}):
    results = suite.train_all(folder, shared, configs)
    if results:
      write_results(results, folder, shared)


def parse_methods(names: list[str]) -> dict[str, Configuration]:
  """Configurations by display name.

  Raises:
    cli.UsageError: for an unknown method or flag, or one named twice.
  """
  configs = {}
  for name in names:
    method, *changes = re.split(r':(?=\w+=)', name)
    values = {'method': method}
    for change in changes:
      flag, _, text = change.partition('=')
      if flag in resolve.PRESENTATION:
        raise cli.UsageError('methods', name, f'{flag} changes no result')
      if flag in _SHARED:
        raise cli.UsageError(
          'methods', name, f'{flag} must be the same for all methods'
        )
      values[flag] = resolve.parse_value(flag, text)
    if name in configs:
      raise cli.UsageError('methods', ','.join(names), f'{name} is named twice')
    try:
      configs[name] = resolve.config(**values)
    except cli.UsageError as error:
      raise cli.UsageError('methods', name, str(error)) from error
  if not configs:
    raise cli.UsageError('methods', '', 'must name at least one method')
  return configs


def write_results(results, folder, shared) -> None:
  """Writes and prints the results, and what can be concluded from them."""
  target = FLAGS.target_accuracy or statistics.common_target(results)
  summary = {
    name: statistics.over_seeds(runs, target) for name, runs in results.items()
  }
  finals = {
    name: figures['final_accuracy']['per_seed']
    for name, figures in summary.items()
  }
  conclusion = verdicts.conclusion(finals, not suite.FLAGS.vary_partition)
  files.write_json(
    folder / 'summary.json',
    {
      'methods': summary,
      'conclusion': conclusion,
      'target_accuracy': target,
      'seeds': list(suite.seeds()),
      'config': shared,
    },
  )
  header, rows = statistics.comparison_table(summary, target)
  statistics.write_table(folder / 'table.md', header, rows)
  with files.replacing(folder / 'curves.png') as temporary:
    plots.curves(
      temporary,
      statistics.curves(results),
      'test accuracy, percent',
      'broadcast model',
    )
  written = page.write(folder)
  progress.show(header, rows)
  print(
    f'report: {written}; pictures: {folder}/curves.png, {folder}/*/seed*/*.png'
  )
  if conclusion:
    print(conclusion)
