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

from fedftg_jax.configuration import folders, resolve
from fedftg_jax.configuration.resolve import Configuration
from fedftg_jax.runs import comparison, suite
from fedftg_jax.system import cli, progress

absl_flags.DEFINE_list(
  'methods',
  ['fed_avg', 'fed_ftg'],
  'Methods to compare, separated by commas. Each may carry flags after colons: '
  'fed_ftg:ftg_preset=paper.',
)
FLAGS = absl_flags.FLAGS


def main() -> None:
  if 'method' in cli.given() and 'methods' not in cli.given():
    raise cli.UsageError(
      'method', FLAGS.method, 'is of one run; give --methods=NAME,NAME'
    )
  base = resolve.config()
  configs = parse_methods(FLAGS.methods)
  resolve.say_unused(configs.values())
  folder = folders.workdir(FLAGS.workdir, base, 'compare', *configs)
  claim = comparison.claim(base)
  with folders.opened(folder, {**claim, **folders.contents(claim)}):
    results = suite.train_all(folder, claim, configs)
    if not results:  # not the first process
      return
    tables, conclusion = comparison.write(
      folder, results, claim, suite.seeds(), FLAGS.target_accuracy
    )
  for table in tables:
    progress.show(*table)
  print(
    f'report: {folder}/report.html; pictures: {folder}/curves.png, '
    f'{folder}/*/seed*/*.png'
  )
  if conclusion:
    print(conclusion)


def parse_methods(names: list[str]) -> dict[str, Configuration]:
  """Parses methods into configurations, by display name.

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
      if flag in comparison.SHARED:
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
