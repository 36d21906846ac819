"""The tables of a report."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedftg_jax.results import rows as rows_lib
from fedftg_jax.results import statistics
from fedftg_jax.results.reader import Recorded
from fedftg_jax.system import clock


class Table(NamedTuple):
  """Text: the first column names its row, the others are numbers."""

  header: Sequence[str]
  rows: Sequence[Sequence[str]]


# What is compared, by name: of each seed its run, and which of its models.
Entries = Mapping[str, Sequence[tuple[Recorded, str]]]
_TARGETS = (
  0.5,
  0.7,
  0.8,
  0.9,
  0.95,
  0.97,
  0.98,
  0.99,
)  # accuracies that count rounds
_SHOWN_TARGETS = 4
_SHOWN_TENSORS = 12


def final(entries: Entries, kind: str, average: bool = False) -> Table:
  """Accuracies in percent: final with every seed's, best, `average` the plain
  average of the models, and of broadcast models that on validation data."""
  validated = any(
    'validation_accuracy' in run.rows[-1]
    for of_name in entries.values()
    for run, _ in of_name
  )
  rows = []
  for name, of_name in entries.items():
    final = final_accuracies(of_name)
    row = [
      name,
      *([on_validation(of_name)] if validated else []),
      mean_text(final),
    ]
    if average:
      row.append(
        mean_text(final_accuracies([(run, 'average') for run, _ in of_name]))
      )
    row.append(
      mean_text(
        [
          max(rows_lib.accuracy(row, model) for row in run.rows)
          for run, model in of_name
        ]
      )
    )
    rows.append([*row, *map(percent, final)] if len(final) > 1 else row)
  seeds = [run.config['seed'] for run, _ in next(iter(entries.values()))]
  return Table(
    [
      kind,
      *(['on validation data'] if validated else []),
      'final',
      *(['plain average'] if average else []),
      'best',
      *([f'seed {seed}' for seed in seeds] if len(seeds) > 1 else []),
    ],
    rows,
  )


def targets(entries: Entries, target: float | None = None) -> Table | None:
  """Rounds and megabytes to the first evaluation at each target.

  Args:
    entries: what to compare.
    target: one that is shown in any case.

  Returns:
    The table, with the highest few targets that some run reaches; None if no
    run reaches any.
  """
  best = max(
    rows_lib.accuracy(row, model)
    for of_name in entries.values()
    for run, model in of_name
    for row in run.rows
  )
  reached = [t for t in _TARGETS if t <= best][-_SHOWN_TARGETS:]
  targets = sorted({*reached, *([target] if target else [])})
  if not targets:
    return None
  return Table(
    ['', *(f'{100 * t:g} %' for t in targets)],
    [
      [name, *(_to_target(of_name, t) for t in targets)]
      for name, of_name in entries.items()
    ],
  )


def _to_target(of_name, target) -> str:
  """'14 (182 MB)': means over the seeds that get there, and how many do not."""
  found = [
    next(
      (
        (row['round'], rows_lib.megabytes(row))
        for row in run.rows
        if rows_lib.accuracy(row, model) >= target
      ),
      None,
    )
    for run, model in of_name
  ]
  there = [point for point in found if point is not None]
  if not there:
    return 'never'
  rounds, megabytes = np.mean(there, axis=0)
  missed = len(found) - len(there)
  return (
    f'{rounds:.1f}'.removesuffix('.0')
    + f' ({megabytes:.0f} MB)'
    + (f', {missed} of {len(found)} never' if missed else '')
  )


def fairness(clients: Entries) -> Table:
  """How evenly accuracy falls to clients, means over seeds."""
  rows = []
  distributions = {
    title: key
    for title, key in (
      ('own classes', 'in_distribution'),
      ('other classes', 'out_distribution'),
    )
    if any(
      key in run.clients['summary'][model]
      for of_name in clients.values()
      for run, model in of_name
    )
  }
  for name, of_name in clients.items():
    figures = [run.clients['summary'][model] for run, model in of_name]

    def mean(key, figures=figures):
      return np.mean([f.get(key, np.nan) for f in figures])

    rows.append(
      [
        name,
        *(percent(mean(k)) for k in ('mean', 'worst', 'best')),
        f'{1e4 * mean("variance"):.1f}',
        f'{mean("jain"):.3f}',
        f'{mean("clients"):.4g}',
        *(percent(mean(k)) for k in distributions.values()),
      ]
    )
  return Table(
    [
      '',
      'mean',
      'worst 10 %',
      'best 10 %',
      'variance',
      'Jain index',
      'clients',
      *distributions,
    ],
    rows,
  )


def curvature(runs: Mapping[str, Sequence[Recorded]]) -> Table | None:
  """What `fedftg hessian` found, means over the seeds that it was asked of;
  None if of none."""
  measures = 'top_eigenvalue', 'trace', 'H_N', 'H_D'
  rows = []
  for name, of_name in runs.items():
    found = [
      {**run.hessian.get('clients', {}), **run.hessian}
      for run in of_name
      if run.hessian
    ]
    if found:
      values = [[one.get(measure) for one in found] for measure in measures]
      means = np.array(values, float).mean(axis=1)  # of None: NaN
      cells = [f'{v:.4g}' if np.isfinite(v) else '–' for v in means]
      rows.append([name, *cells, str(len(found))])
  header = ['', 'largest eigenvalue', *measures[1:], 'seeds']
  return Table(header, rows) if rows else None


def curvature_by_tensor(hessian: Mapping[str, Any]) -> Table:
  """The largest of the traces that `hessian` has for each tensor."""
  traces = {k: v for k, v in hessian['per_tensor'].items() if v is not None}
  largest = sorted(traces, key=lambda name: -abs(traces[name]))
  return Table(
    ['tensor', 'trace'],
    [[name, f'{traces[name]:.4g}'] for name in largest[:_SHOWN_TENSORS]],
  )


def times(runs: Mapping[str, Sequence[Recorded]]) -> Table:
  """Seconds per stage and rounds per second, means over seeds."""
  rows = []
  for name, of_name in runs.items():
    stages = [
      [
        sum(row.get(f'{stage}_seconds', 0.0) for row in run.timings)
        for stage in clock.STAGES
      ]
      for run in of_name
    ]
    seconds = np.mean(stages, axis=0)
    rounds = np.mean([run.rows[-1]['round'] for run in of_name])
    rows.append(
      [
        name,
        *(f'{s:.1f}' for s in seconds),
        f'{rounds / max(seconds[0], 1e-9):.3g}',
      ]
    )
  return Table(
    [
      '',
      'train, s',
      'evaluate, s',
      'checkpoints, s',
      'compile, s',
      'rounds per s',
    ],
    rows,
  )


def on_validation(of_name) -> str:
  """As `final_accuracies`, which only the broadcast model is measured for."""
  values = [
    rows_lib.summarise(run.rows).get('final_validation_accuracy')
    if model == 'broadcast'
    else None
    for run, model in of_name
  ]
  return '–' if None in values else mean_text(values)


def final_accuracies(of_name) -> list[float]:
  """Each seed's mean over the last rounds, of one of its models."""
  return [
    rows_lib.summarise(run.rows)['final_accuracy_of'][model]
    for run, model in of_name
  ]


def mean_text(values) -> str:
  """Mean and, over several seeds, standard deviation, in percent."""
  return statistics.percent(statistics.mean_and_std(values))


def percent(value) -> str:
  return f'{100 * value:.2f}'
