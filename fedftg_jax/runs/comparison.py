"""Writes the results of a comparison: several methods, each with some seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

from upath import UPath

from fedftg_jax.configuration import flags
from fedftg_jax.results import page, plots, reader, rows, statistics, verdicts
from fedftg_jax.system import files

# Files of a comparison beside the folders of its methods.
FILES = (
  'config.json',
  'summary.json',
  'table.md',
  'curves.png',
  'report.html',
  'ro-crate-metadata.json',
  'check_paper.json',
)
# What every method of a comparison shares.
SHARED = (
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


def claim(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what identifies a comparison, for the config.json of its folder.

  Args:
    config: that of any of its runs.
  """
  shared = {k: v for k, v in config.items() if k in SHARED and k != 'seed'}
  return {'program': 'compare', **shared}


def varied(values: Mapping[str, Any], seed: int) -> dict[str, int]:
  """Returns the seeds of partition and schedule of one of several seeds' runs.

  Args:
    values: `partition_seed`, `schedule_seed` and `schedule`, by name.
    seed: of the run.
  """
  # Round t of a Bernoulli schedule is drawn with the seed plus t.
  far = 10**6 if values['schedule'] == 'bernoulli' else 1
  return {
    'partition_seed': values['partition_seed'] + seed,
    'schedule_seed': values['schedule_seed'] + far * seed,
  }


def figures(folder: UPath, rounds: int | None = None) -> dict[str, Any]:
  """Reads the figures and rows of a finished run, up to `rounds`.

  Raises:
    ValueError: if it has no evaluation up to there.
  """
  run = reader.read(folder, rounds)
  return {
    **rows.summarise(run.rows),
    'train_seconds': sum(row['train_seconds'] for row in run.timings),
    'rows': run.rows,
    'clients': run.clients.get('summary', {}),
    'config': run.config,
  }


def write(
  folder: UPath,
  results: statistics.Results,
  claimed: Mapping[str, Any],
  seeds: Sequence[int],
  target: float | None = None,
) -> tuple[list[tuple[list[str], list[list[str]]]], str]:
  """Writes table.md, summary.json, curves.png and report.html.

  Args:
    folder: the comparison's; the runs are in METHOD/seedK/.
    results: by method, `figures` of each seed.
    claimed: see `claim`.
    seeds: of the runs.
    target: accuracy to count the rounds to; None for the highest multiple of
      0.05 that all methods reach.

  Returns:
    Header and rows of each table (the methods; the clients, if they were
    evaluated), and what can be concluded.
  """
  if target is None:
    target = statistics.common_target(results)
  summary = {
    name: statistics.over_seeds(runs, target)  # type: ignore[arg-type]
    for name, runs in results.items()
  }
  finals = {
    name: of_name['final_accuracy']['per_seed']
    for name, of_name in summary.items()
  }
  conclusion = verdicts.conclusion(
    finals,
    [run['config'] for runs in results.values() for run in runs],  # type: ignore[index]
  )
  files.write_json(
    folder / 'summary.json',
    {
      'methods': summary,
      'conclusion': conclusion,
      'target_accuracy': target,
      'seeds': list(seeds),
      'config': dict(claimed),
    },
  )
  tables = [statistics.comparison_table(summary, target)]
  header, lines = statistics.clients_table(summary)
  if lines:
    tables.append((header, lines))
  statistics.write_table(folder / 'table.md', *tables)
  with files.replacing(folder / 'curves.png') as temporary:
    plots.curves(
      temporary,
      statistics.curves(results),
      'test accuracy, percent',
      'broadcast model',
    )
  page.write(folder)
  return tables, conclusion
