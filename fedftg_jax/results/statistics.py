"""What runs come to: figures over seeds, and tables of them."""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import numpy as np
from upath import UPath

from fedftg_jax.results import rows as rows_lib
from fedftg_jax.system import files

# By name, each seed's figures, see `suite.figures_of`; None where it diverged.
Results = Mapping[str, Sequence[dict[str, Any] | None]]

# What a sweep is sorted by, and what pictures call it.
LABELS = {
  'final_accuracy': 'final test accuracy, percent',
  'final_validation_accuracy': 'final validation accuracy, percent',
}


def over_seeds(runs: Sequence[dict[str, Any]], target: float) -> dict[str, Any]:
  """One method's figures over its seeds."""
  variants = runs[0]['final_accuracy_of']
  validation = 'final_validation_accuracy'
  return {
    'rounds': runs[0]['rounds'],
    'final_accuracy': mean_and_std([run['final_accuracy'] for run in runs]),
    'final_accuracy_of': {
      name: mean_and_std([run['final_accuracy_of'][name] for run in runs])
      for name in variants
    },
    **(
      {validation: mean_and_std([run[validation] for run in runs])}
      if validation in runs[0]
      else {}
    ),
    'best_accuracy': mean_and_std([run['best_accuracy'] for run in runs]),
    'rounds_to_target': [rounds_to(run['rows'], target) for run in runs],
    'megabytes_up': runs[0]['bytes_up'] / 1e6,
    'train_seconds': mean_and_std([run['train_seconds'] for run in runs]),
    'clients': {
      model: {
        name: mean_and_std([run['clients'][model][name] for run in runs])
        for name in figures
        if all(name in run['clients'][model] for run in runs)
      }
      for model, figures in runs[0]['clients'].items()
      if all(model in run['clients'] for run in runs)
    },
  }


def mean_and_std(values: list[float]) -> dict[str, Any]:
  """Mean, sample standard deviation (0 for one seed) and the values."""
  std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
  return {'mean': float(np.mean(values)), 'std': std, 'per_seed': values}


def rounds_to(rows: list[dict[str, Any]], target: float) -> int | None:
  """The first evaluated round at `target` or above; None if there is none."""
  return next((r['round'] for r in rows if r['test_accuracy'] >= target), None)


def common_target(results: Results, share: float = 1.0) -> float:
  """The highest multiple of 0.05 that every run of a share of the names
  reaches, rounded up to whole names."""
  worst = sorted(
    (min(run['best_accuracy'] for run in runs) for runs in results.values()),  # type: ignore[index]
    reverse=True,
  )
  return int(worst[math.ceil(share * len(worst)) - 1] / 0.05 + 1e-9) * 5 / 100


def comparison_table(
  summary: Mapping[str, dict[str, Any]], target: float
) -> tuple[list[str], list[list[str]]]:
  """Header and rows, as text."""
  header = [
    'method',
    'final accuracy',
    'plain average',
    'best',
    f'rounds to {100 * target:g} %',
    'MB up',
    's',
  ]
  kept_apart = 'final_validation_accuracy'
  validated = any(kept_apart in figures for figures in summary.values())
  if validated:
    header.insert(1, 'on validation data')
  rows = []
  for name, figures in summary.items():
    reached = [t for t in figures['rounds_to_target'] if t is not None]
    missed = len(figures['rounds_to_target']) - len(reached)
    rows.append(
      [
        name,
        percent(figures['final_accuracy']),
        percent(figures['final_accuracy_of']['average']),
        percent(figures['best_accuracy']),
        (f'{np.mean(reached):.0f}' if reached else 'never')
        + (f' ({missed} never)' if reached and missed else ''),
        f'{figures["megabytes_up"]:.0f}',
        f'{figures["train_seconds"]["mean"]:.0f}',
      ]
    )
    if validated:
      rows[-1].insert(
        1, percent(figures[kept_apart]) if kept_apart in figures else '–'
      )
  return header, rows


def percent(figures: Mapping[str, Any]) -> str:
  """'90.90 ± 0.73' of what `mean_and_std` gives."""
  text = f'{100 * figures["mean"]:.2f}'
  if len(figures['per_seed']) > 1:
    text += f' ± {100 * figures["std"]:.2f}'
  return text


def write_table(
  path: UPath, header: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
  """A table as Markdown."""
  files.write_text(
    path,
    '\n'.join(
      '| ' + ' | '.join(row) + ' |'
      for row in [header, ['---'] * len(header), *rows]
    )
    + '\n',
  )


def curves(results: Results) -> dict[str, list[list[tuple]]]:
  """What `plots.curves` draws of the broadcast models."""
  return {
    name: [rows_lib.curve(run['rows']) for run in runs]  # type: ignore[index]
    for name, runs in results.items()
  }


def sweep_table(
  summary: Mapping[str, Any],
) -> tuple[list[str], list[list[str]]]:
  """As `comparison_table`, of a sweep's summary.json: with a column for each
  flag."""
  swept, rows = summary['swept'], summary['configurations']
  header, cells = comparison_table(
    {row['name']: row for row in rows if not row['diverged']},
    summary['target_accuracy'],
  )
  of_name = {name: rest for name, *rest in cells}
  for row in rows:
    if row['diverged']:
      seeds = len(summary['seeds'])
      of_name[row['name']] = [
        'diverged' + (f' ({row["diverged"]} of {seeds})' if seeds > 1 else ''),
        *['–'] * (len(header) - 2),
      ]
  return [*swept, *header[1:]], [
    [
      *(value_text(row['settings'].get(flag)) for flag in swept),
      *of_name[row['name']],
    ]
    for row in rows
  ]


def sweep_points(summary: Mapping[str, Any]) -> list[tuple]:
  """What `plots.sweep` draws of a sweep's summary.json, in percent."""
  score, points = summary['sorted_by'], []
  for row in summary['configurations']:
    values = tuple(row['settings'].get(flag) for flag in summary['swept'])
    spread_ = row.get(score, {'mean': math.nan, 'std': 0.0})
    points.append((values, 100 * spread_['mean'], 100 * spread_['std']))
  return points


def value_text(value: Any) -> str:
  """A flag's value as one would type it; a dash for None."""
  if value is None:
    return '–'
  return str(value).lower() if isinstance(value, bool) else str(value)
