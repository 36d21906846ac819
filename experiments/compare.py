"""Compares methods over several seeds, on equal partitions and schedules.

  python -m experiments.compare --methods=fed_avg,fed_ftg --seeds=3

A method may carry flags of its own, each after a colon; it is then shown under
that name:

  --methods=fed_avg,fed_ftg:ftg_preset=official,fed_ftg:ftg_preset=paper

Seeds start at --seed and change models, batches and generated images; partition
and participation are those of --partition_seed and --schedule_seed for all, or,
with --vary_partition, change with the seed too. Runs that are finished are
skipped: a comparison that was stopped is continued by the same command.

Writes into --workdir: table.md, summary.json, curves.png, and each run's files
in METHOD/seedK/.
"""

import json
import pathlib
import re
from typing import Any

from absl import flags as absl_flags
import numpy as np
from rich import console as rich_console
from rich import table as rich_table

from experiments import flags

absl_flags.DEFINE_list(
    'methods', ['fed_avg', 'fed_ftg'], 'Methods to compare, with commas between '
    'them; each may carry flags after colons (fed_ftg:ftg_preset=paper).')
absl_flags.DEFINE_integer('seeds', 1, 'Runs per method.', lower_bound=1)
absl_flags.DEFINE_integer(
    'seeds_at_once', 1, 'Seeds that are trained together, as a mapped axis of one '
    'program. Pays on an accelerator with memory for so many.', lower_bound=1)
absl_flags.DEFINE_bool(
    'vary_partition', False, 'Add the seed to the seeds of partition and schedule '
    'as well (seeds are then trained one by one).')
absl_flags.DEFINE_float(
    'target_accuracy', None, 'For the rounds to a target; default: the highest '
    'multiple of 0.05 that all methods reach.', lower_bound=0, upper_bound=1)
FLAGS = absl_flags.FLAGS


def main() -> None:
  base = flags.config()
  configs = parse_methods(FLAGS.methods, base)
  from experiments import runner  # after the check of the flags: it is slow
  folder = pathlib.Path(
      FLAGS.workdir or runner.default_folder(base, 'compare', *configs))
  seeds = range(base['seed'], base['seed'] + FLAGS.seeds)
  for name, config in configs.items():
    run_method(runner, name, config, seeds, folder / folder_name(name))
  results = {name: [read_run(folder / folder_name(name) / f'seed{seed}')
                    for seed in seeds] for name in configs}
  report(results, folder, base)


def parse_methods(
    names: list[str], base: dict[str, Any]) -> dict[str, dict[str, Any]]:
  """Configurations by display name.

  Raises:
    flags.UsageError: for an unknown method or flag, or one named twice.
  """
  configs = {}
  for name in names:
    method, *changes = name.split(':')
    values = {'method': method}
    for change in changes:
      flag, _, text = change.partition('=')
      values[flag] = flags.parse_value(flag, text)
    if name in configs:
      raise flags.UsageError('methods', ','.join(names), f'{name} is named twice')
    if method not in base and not method:
      raise flags.UsageError('methods', ','.join(names), 'a name is empty')
    try:
      configs[name] = flags.config(**values)
    except flags.UsageError as error:
      raise flags.UsageError('methods', name, str(error)) from error
  if not configs:
    raise flags.UsageError('methods', '', 'must name at least one method')
  return configs


def folder_name(name: str) -> str:
  return re.sub(r'[^\w+=.,-]', '_', name)


def run_method(runner, name, config, seeds, folder) -> None:
  """Runs the seeds that are not finished yet."""
  def of_seed(seed):
    shift = seed if FLAGS.vary_partition else 0
    return {**config, 'seed': seed, **{
        k: config[k] + shift for k in ('partition_seed', 'schedule_seed')}}

  left = [s for s in seeds
          if not runner.is_finished(folder / f'seed{s}', of_seed(s))]
  at_once = 1 if FLAGS.vary_partition else FLAGS.seeds_at_once
  experiment = None
  for first in range(0, len(left), at_once):
    group = left[first:first + at_once]
    if experiment is None:
      experiment = runner.build(of_seed(group[0]), FLAGS.data_dir)
    elif FLAGS.vary_partition:
      experiment = runner.with_seeds(experiment, of_seed(group[0]))
    runner.train(experiment, group, [folder / f'seed{s}' for s in group],
                 f'{name} seed {",".join(map(str, group))}')


def read_run(folder: pathlib.Path) -> dict[str, Any]:
  from experiments import files  # imports jax
  return {**json.loads((folder / 'summary.json').read_text()),
          'rows': files.read_jsonl(folder / 'metrics.jsonl')}


def report(results, folder, base) -> None:
  """Writes and prints what the runs came to."""
  from experiments import files
  from experiments import plots
  target = FLAGS.target_accuracy or common_target(results)
  summary = {name: summarise(runs, target) for name, runs in results.items()}
  files.write_json(folder / 'summary.json', {
      'methods': summary, 'target_accuracy': target, 'config': base})
  header, rows = table(summary, target)
  files.write_text(folder / 'table.md', '\n'.join(
      '| ' + ' | '.join(row) + ' |'
      for row in [header, ['---'] * len(header), *rows]) + '\n')
  with files.replacing(folder / 'curves.png') as temporary:
    plots.curves(temporary, {
        name: [[(row['round'], row['test_accuracy']) for row in run['rows']]
               for run in runs] for name, runs in results.items()},
                 'test accuracy', 'broadcast model')
  show(header, rows)
  print(f'pictures: {folder}/curves.png, {folder}/*/seed*/*.png')


def show(header: list[str], rows: list[list[str]]) -> None:
  """Prints a table, as wide as it needs to be where nobody's screen wraps it."""
  console = rich_console.Console()
  if not console.is_terminal:
    console = rich_console.Console(width=200)
  screen = rich_table.Table()
  for title in header:
    screen.add_column(title, overflow='fold')
  for row in rows:
    screen.add_row(*row)
  console.print(screen)


def summarise(runs: list[dict[str, Any]], target: float) -> dict[str, Any]:
  """One method's figures over its seeds."""
  variants = runs[0]['final_accuracy_of']
  return {
      'final_accuracy': spread([run['final_accuracy'] for run in runs]),
      'final_accuracy_of': {
          name: spread([run['final_accuracy_of'][name] for run in runs])
          for name in variants},
      'best_accuracy': spread([run['best_accuracy'] for run in runs]),
      'rounds_to_target': [rounds_to(run['rows'], target) for run in runs],
      'megabytes_up': runs[0]['bytes_up'] / 1e6,
      'train_seconds': spread([run['train_seconds'] for run in runs]),
  }


def spread(values: list[float]) -> dict[str, Any]:
  """Mean, sample standard deviation (0 for one seed) and the values."""
  std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.
  return {'mean': float(np.mean(values)), 'std': std, 'per_seed': values}


def rounds_to(rows: list[dict[str, Any]], target: float) -> int | None:
  """The first evaluated round at `target` or above; None if there is none."""
  return next((r['round'] for r in rows if r['test_accuracy'] >= target), None)


def common_target(results) -> float:
  """The highest multiple of 0.05 that every run of every method reaches."""
  worst = min(run['best_accuracy'] for runs in results.values() for run in runs)
  return int(worst / .05 + 1e-9) * 5 / 100


def table(summary, target) -> tuple[list[str], list[list[str]]]:
  """Header and rows, as text."""
  header = ['method', 'final accuracy', 'plain average', 'best',
            f'rounds to {target:.2f}', 'MB up', 's']
  rows = []
  for name, figures in summary.items():
    reached = [t for t in figures['rounds_to_target'] if t is not None]
    missed = len(figures['rounds_to_target']) - len(reached)
    rows.append([
        name, _percent(figures['final_accuracy']),
        _percent(figures['final_accuracy_of']['average']),
        _percent(figures['best_accuracy']),
        (f'{np.mean(reached):.0f}' if reached else 'never') + (
            f' ({missed} never)' if reached and missed else ''),
        f'{figures["megabytes_up"]:.0f}',
        f'{figures["train_seconds"]["mean"]:.0f}'])
  return header, rows


def _percent(figures) -> str:
  text = f'{100 * figures["mean"]:.2f}'
  if len(figures['per_seed']) > 1:
    text += f' ± {100 * figures["std"]:.2f}'
  return text


if __name__ == '__main__':
  flags.run(main)
