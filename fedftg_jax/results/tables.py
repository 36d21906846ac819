"""The tables of a report, as text, and as CSV."""

from collections.abc import Iterable, Mapping, Sequence
import csv
import io
import json
from typing import Any, NamedTuple

import numpy as np

from fedftg_jax.results import rows as rows_lib
from fedftg_jax.results import statistics
from fedftg_jax.results.reader import Recorded
from fedftg_jax.results.statistics import Paired
from fedftg_jax.system import clock


class Table(NamedTuple):
  """Text: the first column names its row, the others are numbers."""

  header: Sequence[str]
  rows: Sequence[Sequence[str]]

  @property
  def csv(self) -> str:
    """The table as CSV.

    Cells such as '90.9 ± 0.7' and '3 to 5' become two columns, and a dash an
    empty cell.
    """
    between = [
      next((sign for sign in _TWO if any(sign in r[i] for r in self.rows)), '')
      for i in range(len(self.header))
    ]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator='\n')
    for row in (self.header, *self.rows):
      cells: list[str] = []
      for cell, sign in zip(row, between):
        if sign and row is self.header:
          cells += [cell, f'{cell},{sign}'.rstrip()]
        elif sign:
          value, _, other = cell.partition(sign)
          cells += [value, other]
        else:
          cells.append(cell)
      writer.writerow(map(_for_csv, cells))
    return file.getvalue()


def _for_csv(text: str) -> str:
  """Writes a cell so that no spreadsheet takes it for a formula."""
  text = '' if text == '–' else text.replace('−', '-')
  try:
    float(text)
  except ValueError:
    return f"'{text}" if text[:1] in ('=', '+', '-', '@', '\t') else text
  return text


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
_TWO = ' ± ', ' to '  # stand between two numbers in a cell
_SHOWN_TENSORS = 12


def final(entries: Entries, kind: str, average: bool = False) -> Table:
  """Lists accuracies in percent: final, best, and the final one of each seed.

  Args:
    entries: what to compare.
    kind: what their names are, such as 'method'.
    average: whether to list the plain average of the clients' models, too.
  """
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
  """Counts rounds and megabytes to the first evaluation at each target.

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
  """Writes means over the seeds that get there, as in '14 (182 MB)'."""
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


def differences(tests: Mapping[str, Paired]) -> Table | None:
  """Lists each method's difference from the first, in points, and its test.

  Args:
    tests: from `statistics.against`, of fractions.

  Returns:
    The table; None without a test.
  """
  if not tests:
    return None
  several = len(tests) > 1
  header = ['method', 'difference', '95 % interval', 'p']
  return Table(
    [*header, *(['p, corrected'] if several else [])],
    [
      [
        name,
        points(test.mean),
        f'{points(test.low)} to {points(test.high)}',
        f'{test.p:.2g}',
        *([f'{test.adjusted:.2g}'] if several else []),
      ]
      for name, test in tests.items()
    ],
  )


def points(value: float) -> str:
  """Writes a fraction in points, as '+1.25', or '−1.25' with a minus sign."""
  return f'{100 * value:+.2f}'.replace('-', '−')


def fronts(front: Iterable[tuple[str, float, float]], unit: str) -> Table:
  """Lists which method is best for which cost.

  Args:
    front: from `statistics.front`.
    unit: of the cost.
  """
  stretches: list[list[tuple[str, float, float]]] = []
  for point in front:
    if not stretches or stretches[-1][-1][0] != point[0]:
      stretches.append([])
    stretches[-1].append(point)
  return Table(
    ['best', unit, 'accuracy'],
    [
      [
        stretch[0][0],
        *(
          ' to '.join(dict.fromkeys(format(point[i], form) for point in ends))
          for i, form in ((1, '.3g'), (2, '.2f'))
        ),
      ]
      for stretch in stretches
      for ends in [(stretch[0], stretch[-1])]
    ],
  )


def classes(
  values: Mapping[str, np.ndarray], names: Sequence[str], signed: bool = False
) -> Table:
  """Lists a percentage of each class.

  Args:
    values: by name, [C]; NaN for a class without examples.
    names: [C] of the classes.
    signed: whether the values are changes.
  """
  form = '+.1f' if signed else '.1f'
  return Table(
    ['class', *values],
    [
      [
        name,
        *(
          f'{v[c]:{form}}'.replace('-', '−') if np.isfinite(v[c]) else '–'
          for v in values.values()
        ),
      ]
      for c, name in enumerate(names)
    ],
  )


def confusion(counts: np.ndarray, names: Sequence[str]) -> Table:
  """Lists how many examples of each class are taken for each class.

  Args:
    counts: [C, C] examples of each class (rows) by predicted class (columns).
    names: [C] of the classes.
  """
  return Table(
    ['true class', *names],
    [[name, *map(str, row)] for name, row in zip(names, counts.tolist())],
  )


def settings(
  configs: Mapping[str, Mapping[str, Any]], without: Sequence[str] = ()
) -> dict[str, Any]:
  """Lists the flags of several configurations by how many of them have them.

  Args:
    configs: by name.
    without: flags that are left out.

  Returns:
    'same': the flags that all have in common, in two halves; 'different':
    those in which some differ that have them, a blank where one has no such
    flag, or None; 'own': by the names that have them the flags that the others
    do not have.
  """
  flags = sorted({flag for config in configs.values() for flag in config})
  same, different = [], []
  own: dict[str, list[list[str]]] = {}
  for flag in flags:
    values = {
      name: config[flag] for name, config in configs.items() if flag in config
    }
    shown = [text(value) for value in values.values()]
    if flag in without:
      continue
    if len({json.dumps(value) for value in values.values()}) > 1:
      if flag != 'method' or any(v != n for n, v in values.items()):
        row = [text(values[n]) if n in values else '' for n in configs]
        different.append([flag, *row])
    elif len(values) < len(configs):
      own.setdefault(', '.join(values), []).append([flag, shown[0]])
    else:
      same.append([flag, shown[0]])
  header, half = ['flag', 'value'], -(-len(same) // 2)
  halves = same[:half], same[half:]
  return {
    'same': [Table(header, rows) for rows in halves if rows],
    'different': Table(['flag', *configs], different) if different else None,
    'own': {names: Table(header, rows) for names, rows in own.items()},
  }


def text(value: Any) -> str:
  """Writes a flag's value."""
  return f'{value:g}' if isinstance(value, float) else str(value)


def fairness(clients: Entries) -> Table:
  """Lists how evenly accuracy falls to clients, means over seeds."""
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
  """Lists what `fedftg hessian` found, means over the seeds that it measured.

  Args:
    runs: by method, those of all seeds.

  Returns:
    The table; None if none was measured.
  """
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
  """Lists the largest of the traces that `hessian` has for each tensor."""
  traces = {k: v for k, v in hessian['per_tensor'].items() if v is not None}
  largest = sorted(traces, key=lambda name: -abs(traces[name]))
  return Table(
    ['tensor', 'trace'],
    [[name, f'{traces[name]:.4g}'] for name in largest[:_SHOWN_TENSORS]],
  )


def times(runs: Mapping[str, Sequence[Recorded]]) -> Table:
  """Lists seconds of each stage and rounds per second, means over seeds."""
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
  """Writes the final validation accuracy, of the broadcast model only."""
  values = [
    rows_lib.summarise(run.rows).get('final_validation_accuracy')
    if model == 'broadcast'
    else None
    for run, model in of_name
  ]
  return '–' if None in values else mean_text(values)


def final_accuracies(of_name) -> list[float]:
  """Returns each seed's final accuracy, of one of its models; fractions."""
  return [
    rows_lib.summarise(run.rows)['final_accuracy_of'][model]
    for run, model in of_name
  ]


def mean_text(values) -> str:
  """Writes mean and, with several seeds, standard deviation, in percent."""
  return statistics.percent(statistics.mean_and_std(values))


def percent(value) -> str:
  return f'{100 * value:.2f}'
