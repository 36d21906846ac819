"""Compares methods over several seeds, on equal partitions and schedules.

  python -m experiments.compare --methods=fed_avg,fed_ftg --seeds=3

A method may carry flags of its own, each after a colon; it is then shown under
that name:

  --methods=fed_avg,fed_ftg:ftg_preset=official,fed_ftg:ftg_preset=paper

Seeds start at --seed and change models, batches and generated images; partition
and participation are those of --partition_seed and --schedule_seed for all, or,
with --vary_partition, change with the seed too. Runs that are finished are
skipped: a comparison that was stopped is continued by the same command.

Writes into --workdir: report.html, table.md, summary.json, curves.png, and each
run's files in METHOD/seedK/.
"""

import re
from typing import Any

from absl import flags as absl_flags
import numpy as np
from upath import UPath

from experiments import assembly
from experiments import cli
from experiments import devices
from experiments import files
from experiments import flags
from experiments import folders
from experiments import plots
from experiments import progress
from experiments import records
from experiments import report as html
from experiments import runner

absl_flags.DEFINE_list(
    'methods', ['fed_avg', 'fed_ftg'], 'Methods to compare, with commas between '
    'them; each may carry flags after colons (fed_ftg:ftg_preset=paper).')
absl_flags.DEFINE_integer('seeds', 1, 'Runs per method.', lower_bound=1)
absl_flags.DEFINE_integer(
    'seeds_at_once', 1, 'Seeds that are trained together, as a mapped axis of one '
    'program; needs memory for so many.', lower_bound=1)
absl_flags.DEFINE_bool(
    'vary_partition', False, 'Add the seed to the seeds of partition and schedule '
    'as well (seeds are then trained one by one).')
absl_flags.DEFINE_float(
    'target_accuracy', None, 'For the rounds to a target; default: the highest '
    'multiple of 0.05 that all methods reach.', lower_bound=0, upper_bound=1)
absl_flags.adopt_module_key_flags(flags)  # for --help
FLAGS = absl_flags.FLAGS

# What every method of a comparison shares.
_SHARED = ('seed', 'rounds', 'eval_every', 'dataset', 'data_dir', 'manual_dir',
           'workdir', 'public_data', 'validation_share', 'dropout_rate',
           'straggler_rate', 'min_availability', 'partition', 'partition_seed',
           *sorted({flag for used in flags.PARTITIONS.values() for flag in used}),
           'num_clients', 'cohort', 'schedule', 'schedule_seed')


def main() -> None:
  base = flags.config()
  if FLAGS.seeds_at_once > 1 and base['client_state'] != 'device':
    raise cli.UsageError('seeds_at_once', FLAGS.seeds_at_once,
                         'must be 1 without --client_state=device')
  configs = parse_methods(FLAGS.methods)
  folder = folders.workdir(FLAGS.workdir, base, 'compare', *configs)
  shared = {'program': 'compare', **{
      k: v for k, v in base.items() if k in _SHARED and k != 'seed'}}
  folders.check_folder(folder, {**shared, **folders.contents(shared)})
  seeds = range(base['seed'], base['seed'] + FLAGS.seeds)
  places = {name: [folder / folders.folder_name(name) / f'seed{seed}'
                   for seed in seeds] for name in configs}
  # Everything is checked and built before anything is trained.
  left = {name: [(seed, place) for seed, place in zip(seeds, places[name])
                 if not devices.agree(
                     folders.is_finished(place, of_seed(config, seed)))]
          for name, config in configs.items()}
  experiments = {
      name: assembly.build(of_seed(configs[name], todo[0][0]), FLAGS.data_dir,
                           FLAGS.manual_dir)
      for name, todo in left.items() if todo}
  folders.claim_folder(folder, shared)
  for name, experiment in experiments.items():
    run_method(name, configs[name], experiment, left[name])
  if not devices.is_first():
    return
  results = {name: [read_run(place, base['rounds']) for place in found]
             for name, found in places.items()}
  report(results, folder, shared, seeds)


def parse_methods(names: list[str]) -> dict[str, dict[str, Any]]:
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
      if flag in _SHARED:
        raise cli.UsageError(
            'methods', name, f'{flag} must be the same for all methods')
      values[flag] = flags.parse_value(flag, text)
    if name in configs:
      raise cli.UsageError('methods', ','.join(names), f'{name} is named twice')
    try:
      configs[name] = flags.config(**values)
    except cli.UsageError as error:
      raise cli.UsageError('methods', name, str(error)) from error
  if not configs:
    raise cli.UsageError('methods', '', 'must name at least one method')
  return configs


def of_seed(config: dict[str, Any], seed: int) -> dict[str, Any]:
  """The configuration of one seed's run."""
  shift = seed if FLAGS.vary_partition else 0
  return {**config, 'seed': seed, **{
      k: config[k] + shift for k in ('partition_seed', 'schedule_seed')
      if k in config}}


def run_method(name, config, experiment, left) -> None:
  """Trains the seeds that are not finished yet, some at once."""
  at_once = 1 if FLAGS.vary_partition else FLAGS.seeds_at_once
  for first in range(0, len(left), at_once):
    seeds, places = zip(*left[first:first + at_once])
    if FLAGS.vary_partition and first:
      experiment = assembly.with_seeds(experiment, of_seed(config, seeds[0]))
    runner.train(experiment, seeds, places,
                 f'{name} seed {",".join(map(str, seeds))}',
                 runner.asked_for())


def read_run(folder: UPath, rounds: int) -> dict[str, Any]:
  """A finished run's rows and figures, up to `rounds`."""
  run = html.read_run(folder, rounds)
  seconds = sum(row['train_seconds'] for row in run.timings)
  return {**records.summarise(run.rows), 'train_seconds': seconds,
          'rows': run.rows, 'clients': run.clients.get('summary', {})}


def report(results, folder, shared, seeds) -> None:
  """Writes and prints what the runs came to."""
  target = FLAGS.target_accuracy or common_target(results)
  summary = {name: summarise(runs, target) for name, runs in results.items()}
  files.write_json(folder / 'summary.json', {
      'methods': summary, 'target_accuracy': target,
      'seeds': list(seeds), 'config': shared})
  header, rows = table(summary, target)
  files.write_text(folder / 'table.md', '\n'.join(
      '| ' + ' | '.join(row) + ' |'
      for row in [header, ['---'] * len(header), *rows]) + '\n')
  with files.replacing(folder / 'curves.png') as temporary:
    plots.curves(temporary, {
        name: [[(row['round'], records.megabytes(row), row['test_accuracy'])
                for row in run['rows']] for run in runs]
        for name, runs in results.items()},
                 'test accuracy', 'broadcast model')
  page = html.write(folder)
  progress.show(header, rows)
  print(f'report: {page}; pictures: {folder}/curves.png, {folder}/*/seed*/*.png')


def summarise(runs: list[dict[str, Any]], target: float) -> dict[str, Any]:
  """One method's figures over its seeds."""
  variants = runs[0]['final_accuracy_of']
  validation = 'final_validation_accuracy'
  return {
      'final_accuracy': spread([run['final_accuracy'] for run in runs]),
      'final_accuracy_of': {
          name: spread([run['final_accuracy_of'][name] for run in runs])
          for name in variants},
      **({validation: spread([run[validation] for run in runs])}
         if validation in runs[0] else {}),
      'best_accuracy': spread([run['best_accuracy'] for run in runs]),
      'rounds_to_target': [rounds_to(run['rows'], target) for run in runs],
      'megabytes_up': runs[0]['bytes_up'] / 1e6,
      'train_seconds': spread([run['train_seconds'] for run in runs]),
      'clients': {
          model: {name: spread([run['clients'][model][name] for run in runs])
                  for name in figures}
          for model, figures in runs[0]['clients'].items()
          if all(model in run['clients'] for run in runs)},
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
  kept_apart = 'final_validation_accuracy'
  validated = any(kept_apart in figures for figures in summary.values())
  if validated:
    header.insert(1, 'on validation data')
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
    if validated:
      rows[-1].insert(1, _percent(figures[kept_apart]))
  return header, rows


def _percent(figures) -> str:
  text = f'{100 * figures["mean"]:.2f}'
  if len(figures['per_seed']) > 1:
    text += f' ± {100 * figures["std"]:.2f}'
  return text


if __name__ == '__main__':
  cli.run(main)
