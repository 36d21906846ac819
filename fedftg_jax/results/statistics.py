"""Figures over seeds: means, bands, fronts, paired tests; and their tables."""

from collections.abc import Mapping, Sequence
import itertools
import math
from typing import Any, NamedTuple

from etils import epy
import numpy as np
from upath import UPath

from fedftg_jax.results import rows as rows_lib
from fedftg_jax.system import files

with epy.lazy_imports():
  from scipy import stats

# By name, each seed's `comparison.figures`; None where it diverged.
Results = Mapping[str, Sequence[dict[str, Any] | None]]

# What a sweep is sorted by, and what pictures call it.
LABELS = {
  'final_accuracy': 'final test accuracy, percent',
  'final_validation_accuracy': 'final validation accuracy, percent',
}
LEVEL = 0.05  # of a test, after Holm's correction
_ALL_SIGNS = 16  # of so many seeds all signs are tried, of more some
_CONFIDENCE = 0.95
_SAME = 1e-9  # smaller differences of accuracies are rounding


class Band(NamedTuple):
  """A quantity over the rounds: its mean over seeds, lowest and highest value.

  Attributes:
    rounds: [R] rounds that every seed has a value of.
    x: [R] what it is drawn against, mean over seeds.
    mean: [R].
    low: [R] the lowest of all seeds.
    high: [R] the highest of all seeds.
  """

  rounds: np.ndarray
  x: np.ndarray
  mean: np.ndarray
  low: np.ndarray
  high: np.ndarray


def band(seeds: Sequence[Sequence[tuple[int, float, float]]]) -> Band:
  """Averages a quantity over seeds, round by round.

  Args:
    seeds: for each seed the points (round, x, value).
  """
  by_round = [{t: point for t, *point in points} for points in seeds]
  rounds = sorted(set.intersection(*map(set, by_round)))
  points = np.array([[one[t] for t in rounds] for one in by_round], float)
  points = points.reshape(len(seeds), len(rounds), 2)
  x, values = points[..., 0].mean(0), points[..., 1]
  return Band(
    np.array(rounds, int), x, values.mean(0), values.min(0), values.max(0)
  )


def front(bands: Mapping[str, Band]) -> list[tuple[str, float, float]]:
  """Finds the Pareto front: the highest value for each cost.

  Args:
    bands: by name; `x` is the cost, and `mean` the value.

  Returns:
    (name, cost, value), in the order of the cost: the points for which no other
    one has at least this value at no higher cost. Costs within 1 % are equal.
  """
  points = sorted(
    (
      (name, float(cost), float(value))
      for name, curve in bands.items()
      for cost, value in zip(curve.x, curve.mean)
    ),
    key=lambda point: (point[1], -point[2]),
  )
  found: list[tuple[str, float, float]] = []
  for point in points:
    if found and point[2] <= found[-1][2]:
      continue
    while found and point[1] <= 1.01 * found[-1][1]:
      found.pop()
    found.append(point)
  return found


class Paired(NamedTuple):
  """A difference between two methods, over the seeds that both have.

  Attributes:
    mean: of the differences.
    low: lower end of the 95 % confidence interval of `mean`, by Student's t.
    high: its upper end.
    p: two-sided p value, of the null hypothesis that there is no difference.
    exact: whether `p` is of sign flips, and not of Student's t.
    adjusted: `p` after Holm's correction, see `against`.
  """

  mean: float
  low: float
  high: float
  p: float
  exact: bool
  adjusted: float = math.nan


def exact_seeds(num_tests: int = 1) -> int:
  """Returns from how many seeds on sign flips can show a difference.

  With n seeds their smallest p value is 2 / 2^n, and Holm's correction
  multiplies it by the number of tests: 6 seeds for one test, 7 for two.
  """
  return next(
    n for n in itertools.count(2) if num_tests * 2.0 ** (1 - n) < LEVEL
  )


def paired(differences: Sequence[float], num_tests: int = 1) -> Paired:
  """Tests whether paired differences are 0 on average.

  With enough differences, see `exact_seeds`, by sign flips: under the null
  hypothesis each difference is as likely as its negative, and p is the share of
  all choices of signs whose mean is at least as far from 0. With fewer it is a
  paired t test, which takes the differences to be normally distributed.

  Args:
    differences: of at least two seeds.
    num_tests: how many such tests are made together.
  """
  values = np.asarray(differences, float)
  mean, half = interval(differences)
  error = float(stats.sem(values))
  exact = len(values) >= exact_seeds(num_tests)
  # Where seeds differ by the same, only signs can be counted.
  if exact or error < _SAME:
    p = _sign_flips(values)
  else:
    p = float(2 * stats.t.sf(abs(mean) / error, len(values) - 1))
  return Paired(mean, mean - half, mean + half, p, exact)


def interval(values: Sequence[float]) -> tuple[float, float]:
  """Computes the mean and half of its 95 % confidence interval.

  The interval is Student's; of a single value it is infinite.
  """
  mean = float(np.mean(values))
  if len(values) < 2:
    return mean, math.inf
  quantile = stats.t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1)
  return mean, float(quantile * stats.sem(values))


def with_interval(differences: Sequence[float]) -> str:
  """Writes a mean with half of its interval, as in '+0.66 ± 0.60'."""
  mean, half = interval(differences)
  return f'{mean:+.2f}' + (f' ± {half:.2f}' if math.isfinite(half) else '')


def _sign_flips(values: np.ndarray) -> float:
  """Returns the share of sign choices with a sum as far from 0."""
  num = len(values)
  if num <= _ALL_SIGNS:
    signs = 1 - 2 * (np.arange(2**num)[:, None] >> np.arange(num) & 1)
  else:
    draws = np.random.RandomState(0).choice([-1, 1], (2**_ALL_SIGNS - 1, num))
    signs = np.vstack([np.ones(num, int), draws])
  return float(
    np.mean(np.abs(signs @ values) >= np.abs(values.sum()) - num * _SAME)
  )


def against(finals: Mapping[str, Sequence[float]]) -> dict[str, Paired]:
  """Tests each method against the first, paired by seed.

  Args:
    finals: by name the figures of all seeds, in the same order.

  Returns:
    By name, without the first, the test of its difference. `adjusted` is
    corrected after Holm (1979), so that the chance of any wrong discovery among
    all of them is at most the level.
  """
  (_, base), *others = finals.items()
  tests = {
    name: paired([a - b for a, b in zip(values, base)], len(others))
    for name, values in others
  }
  adjusted, floor = {}, 0.0
  for rank, name in enumerate(sorted(tests, key=lambda name: tests[name].p)):
    floor = max(floor, min(1.0, (len(tests) - rank) * tests[name].p))
    adjusted[name] = floor
  return {
    name: test._replace(adjusted=adjusted[name]) for name, test in tests.items()
  }


def over_seeds(runs: Sequence[dict[str, Any]], target: float) -> dict[str, Any]:
  """Computes one method's figures over its seeds."""
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
    'early_accuracy': mean_and_std(
      [rows_lib.early_accuracy(run['rows']) for run in runs]
    ),
    'best_accuracy': mean_and_std([run['best_accuracy'] for run in runs]),
    'rounds_to_target': [rounds_to(run['rows'], target) for run in runs],
    **{
      f'megabytes_{way}': float(np.mean([run[f'bytes_{way}'] for run in runs]))
      / 1e6
      for way in ('up', 'down')
    },
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
  """Returns mean, sample standard deviation (0 for one seed) and values."""
  std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
  return {'mean': float(np.mean(values)), 'std': std, 'per_seed': values}


def rounds_to(rows: list[dict[str, Any]], target: float) -> int | None:
  """Returns the first evaluated round at `target` or above; None without."""
  return next((r['round'] for r in rows if r['test_accuracy'] >= target), None)


def common_target(results: Results, share: float = 1.0) -> float:
  """Chooses a target that the runs reach: a multiple of 0.05.

  Args:
    results: by name, each seed's figures.
    share: of the names whose runs all have to reach it, rounded up.
  """
  worst = sorted(
    (min(run['best_accuracy'] for run in runs) for runs in results.values()),  # type: ignore[index]
    reverse=True,
  )
  return int(worst[math.ceil(share * len(worst)) - 1] / 0.05 + 1e-9) * 5 / 100


def comparison_table(
  summary: Mapping[str, dict[str, Any]], target: float
) -> tuple[list[str], list[list[str]]]:
  """Makes the table of a comparison: its header and its rows, as text.

  "Early" is the mean over the first third of the evaluations.

  Args:
    summary: by method, from `over_seeds`.
    target: the accuracy to which rounds are counted, a fraction.
  """
  header = [
    'method',
    'final accuracy',
    'early',
    'plain average',
    'best',
    f'rounds to {100 * target:g} %',
    'MB up',
    'MB down',
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
        percent(figures['early_accuracy']),
        percent(figures['final_accuracy_of']['average']),
        percent(figures['best_accuracy']),
        (f'{np.mean(reached):.0f}' if reached else 'never')
        + (f' ({missed} never)' if reached and missed else ''),
        *(f'{figures[f"megabytes_{way}"]:.0f}' for way in ('up', 'down')),
        f'{figures["train_seconds"]["mean"]:.0f}',
      ]
    )
    if validated:
      rows[-1].insert(
        1, percent(figures[kept_apart]) if kept_apart in figures else '–'
      )
  return header, rows


def clients_table(
  summary: Mapping[str, dict[str, Any]],
) -> tuple[list[str], list[list[str]]]:
  """Makes the table of the clients in a comparison: header and rows, as text.

  Means over the clients after the last round, on test examples with each
  client's class shares: of the broadcast model, also over the worst tenth of
  the clients; of that model after local training; and of the clients' own
  models, by name if there are several. Columns without a value are left out.

  Args:
    summary: by method, from `over_seeds`.

  Returns:
    Header and rows; no rows if no clients were evaluated.
  """
  rows = {name: _client_cells(one['clients']) for name, one in summary.items()}
  header = [
    title
    for title in (
      'clients: mean',
      'worst tenth',
      'after local training',
      'own model',
    )
    if any(cells[title] for cells in rows.values())
  ]
  if not header:
    return [], []
  return ['method', *header], [
    [name, *(cells[title] for title in header)] for name, cells in rows.items()
  ]


def _client_cells(clients) -> dict[str, str]:
  def cell(model, figure='mean'):
    found = clients.get(model, {}).get(figure)
    return percent(found) if found else ''

  own = {
    model: cell(model)
    for model in clients
    if model != 'broadcast' and not model.startswith('personalised')
  }
  return {
    'clients: mean': cell('broadcast'),
    'worst tenth': cell('broadcast', 'worst'),
    'after local training': cell('personalised'),
    'own model': ', '.join(
      f'{model} {text}' if len(own) > 1 else text for model, text in own.items()
    ),
  }


def percent(figures: Mapping[str, Any]) -> str:
  """Writes what `mean_and_std` returns in percent, as in '90.90 ± 0.73'."""
  text = f'{100 * figures["mean"]:.2f}'
  if len(figures['per_seed']) > 1:
    text += f' ± {100 * figures["std"]:.2f}'
  return text


def write_table(
  path: UPath, *tables: tuple[Sequence[str], Sequence[Sequence[str]]]
) -> None:
  """Writes tables, of a header and rows, as Markdown."""
  files.write_text(
    path,
    '\n\n'.join(
      '\n'.join(
        '| ' + ' | '.join(row) + ' |'
        for row in [header, ['---'] * len(header), *rows]
      )
      for header, rows in tables
    )
    + '\n',
  )


def curves(results: Results) -> dict[str, list[list[tuple]]]:
  """Returns the curves of the broadcast models, for `plots.curves`."""
  return {
    name: [rows_lib.curve(run['rows']) for run in runs]  # type: ignore[index]
    for name, runs in results.items()
  }


def sweep_table(
  summary: Mapping[str, Any],
) -> tuple[list[str], list[list[str]]]:
  """Makes the table of a sweep: its header and its rows, as text.

  Args:
    summary: the sweep's summary.json. Each swept flag has a column.
  """
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
  """Returns the points of a sweep, in percent, for `plots.sweep`."""
  score, points = summary['sorted_by'], []
  for row in summary['configurations']:
    values = tuple(row['settings'].get(flag) for flag in summary['swept'])
    spread_ = row.get(score, {'mean': math.nan, 'std': 0.0})
    points.append((values, 100 * spread_['mean'], 100 * spread_['std']))
  return points


def value_text(value: Any) -> str:
  """Writes a flag's value as one would type it; a dash for None."""
  if value is None:
    return '–'
  return str(value).lower() if isinstance(value, bool) else str(value)
