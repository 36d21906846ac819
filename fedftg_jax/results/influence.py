"""Computes figures of tracked influence.

They are the agreement with retraining, the cost, rankings, and how well clients
with wrong labels are found."""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epy
import numpy as np

from fedftg_jax.results import statistics
from fedftg_jax.results.tables import Table

with epy.lazy_imports():
  from scipy import stats

TRUTH = 'retraining'  # what the others estimate
PLAIN = 'plain'  # the runs without tracking
WITHOUT = 'without_'  # begins the names of runs without some clients
NOBODY = 'nobody'  # who is left out of the plain runs
LOSS = 'own_loss'
TABLES = 'estimates', 'ranking', 'detection', 'cleansing'
# Influences of `influence.on_test`, by what influence.json calls them.
MEASURES = {'fil': 'loss', 'fia': 'accuracy', 'fip': 'parameters'}


def summarise(
  rows: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
  *,
  seeds: Sequence[int],
  clients: Sequence[int],
  examples: Sequence[Sequence[int]],
  flipped: Sequence[Sequence[int]],
  seconds: Mapping[str, float],
) -> dict[str, Any]:
  """Computes what influence.json holds.

  Args:
    rows: by curvature and seed, those of metrics.jsonl.
    seeds: of the runs.
    clients: those that are tracked, C of them.
    examples: of each seed, how many each client trains on.
    flipped: of each seed, the clients with wrong labels.
    seconds: of training, by curvature and for `PLAIN`.

  Returns:
    'scores': by curvature, seed and measure [C] values in the end. 'fil', 'fia'
    and 'fip' (loss, accuracy, parameters): by curvature `agreement` with
    retraining, the medians over seeds, and by seed. 'by_round': the medians for
    the loss at each evaluation. 'cost': by curvature, for each client and round
    in plain rounds. 'auc': by ranking, where labels are flipped.
  """
  scores = {
    name: [_values(of_seed[-1]) for of_seed in of_name]
    for name, of_name in rows.items()
  }
  summary = {
    'seeds': list(seeds),
    'clients': list(clients),
    'examples': [[counts[c] for c in clients] for counts in examples],
    'flipped': [sorted(ids) for ids in flipped],
    'rounds': next(iter(rows.values()))[0][-1]['round'],
    'scores': scores,
    'seconds': dict(seconds),
    'cost': {
      name: (seconds[name] / seconds[PLAIN] - 1) / len(clients)
      for name in rows
      if seconds[PLAIN] > 0
    },
  }
  if TRUTH in rows:
    summary |= {
      title: {
        name: _over_seeds(
          [
            agreement(one[measure], true[measure])
            for one, true in zip(of_name, scores[TRUTH])
          ]
        )
        for name, of_name in scores.items()
        if name != TRUTH
      }
      for title, measure in MEASURES.items()
    }
    summary['by_round'] = {
      name: _by_round(of_name, rows[TRUTH])
      for name, of_name in rows.items()
      if name != TRUTH
    }
  if any(flipped):
    summary['auc'] = _detection(summary)
  return summary


def _values(row) -> dict[str, list[float | None]]:
  return {name: list(values) for name, values in row['influence'].items()}


def _array(values) -> np.ndarray:
  """Returns numbers as an array, NaN for null."""
  return np.array(values, float)


def agreement(
  estimate: Sequence[float | None], true: Sequence[float | None]
) -> dict[str, float | None]:
  """Measures how well estimates agree with the true values, over clients.

  Args:
    estimate: [C].
    true: [C].

  Returns:
    'pearson' and 'spearman', None where they are not defined; and 'error', the
    sum of the absolute differences over that of the true values.
  """
  found, wanted = _array(estimate), _array(true)
  nothing: dict[str, float | None] = {
    'pearson': None,
    'spearman': None,
    'error': None,
  }
  if not np.isfinite([found, wanted]).all():
    return nothing
  total = np.sum(np.abs(wanted))
  error = float(np.sum(np.abs(found - wanted)) / total) if total else None
  if len(found) < 2 or not (np.ptp(found) and np.ptp(wanted)):
    return {**nothing, 'error': error}
  return {
    'pearson': float(stats.pearsonr(found, wanted)[0]),
    'spearman': float(stats.spearmanr(found, wanted)[0]),
    'error': error,
  }


def _over_seeds(found) -> dict[str, Any]:
  """Collects values by seed, and medians where every seed has one."""
  medians: dict[str, Any] = {}
  for name in found[0]:
    values = [one[name] for one in found]
    medians[name] = None if None in values else float(np.median(values))
    medians[f'{name}_by_seed'] = values
  return medians


def _by_round(estimates, truths) -> list[dict[str, Any]]:
  """Computes the agreement of the loss at each evaluation."""
  points = []
  for i, row in enumerate(estimates[0]):
    found = _over_seeds(
      [
        agreement(one[i]['influence']['loss'], true[i]['influence']['loss'])
        for one, true in zip(estimates, truths)
      ]
    )
    points.append(
      {
        'round': row['round'],
        **{k: v for k, v in found.items() if not k.endswith('_by_seed')},
      }
    )
  return points


def rankings(summary: Mapping[str, Any]) -> dict[str, list[np.ndarray]]:
  """Rates how suspicious each tracked client is, for each seed.

  Returns:
    By ranking, [C] for each seed: by a curvature, the less a client helps the
    higher; by 'loss', the larger its own loss the higher.
  """
  found = {
    name: [-_array(one['loss']) for one in of_name]
    for name, of_name in summary['scores'].items()
  }
  first = next(iter(summary['scores'].values()))
  found['loss'] = [_array(one[LOSS]) for one in first]
  return found


def area(suspicion: np.ndarray, positive: np.ndarray) -> float | None:
  """Computes the area under the ROC curve.

  It is the probability that a positive is more suspicious than a negative; ties
  count by half.

  Args:
    suspicion: [C].
    positive: [C] bool.

  Returns:
    The area; None without both kinds, or where a value is not finite.
  """
  some, others = suspicion[positive], suspicion[~positive]
  if not len(some) or not len(others) or not np.isfinite(suspicion).all():
    return None
  won = stats.mannwhitneyu(some, others).statistic
  return float(won / (len(some) * len(others)))


def _detection(summary) -> dict[str, dict[str, Any]]:
  positives = [
    np.isin(summary['clients'], flipped) for flipped in summary['flipped']
  ]
  areas = {
    name: [area(one, p) for one, p in zip(of_name, positives)]
    for name, of_name in rankings(summary).items()
  }
  return {
    name: {
      'mean': None if None in values else float(np.mean(_array(values))),
      'by_seed': values,
    }
    for name, values in areas.items()
  }


def worst(summary: Mapping[str, Any], num: int) -> dict[str, list[list[int]]]:
  """Picks the most suspicious clients of each seed.

  Args:
    summary: what influence.json holds.
    num: how many.

  Returns:
    By ranking, the clients of each seed: by the first estimate, by loss, and at
    random.
  """
  estimate = next(name for name in summary['scores'] if name != TRUTH)
  clients = np.array(summary['clients'])
  found = {
    name: [
      sorted(clients[np.argsort(-np.nan_to_num(one), kind='stable')[:num]])
      for one in rankings(summary)[name]
    ]
    for name in (estimate, 'loss')
  }
  found['random'] = [
    sorted(np.random.RandomState([seed, 6]).permutation(clients)[:num])
    for seed in summary['seeds']
  ]
  return {
    name: [[int(c) for c in ids] for ids in of_seeds]
    for name, of_seeds in found.items()
  }


def score_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Lists the scores, a row for each curvature, seed and client."""
  return [
    {
      'curvature': name,
      'seed': seed,
      'client': client,
      'examples': summary['examples'][i][c],
      'flipped': client in summary['flipped'][i],
      **{
        measure: np.nan if values[c] is None else values[c]
        for measure, values in of_name[i].items()
      },
    }
    for name, of_name in summary['scores'].items()
    for i, seed in enumerate(summary['seeds'])
    for c, client in enumerate(summary['clients'])
  ]


def panels(summary: Mapping[str, Any]) -> dict[str, list[tuple]]:
  """Pairs (true, estimate) of the influence on the loss, by curvature.

  The pairs are those of all clients and seeds; `plots.estimates` draws them.
  """
  if TRUTH not in summary['scores']:
    return {}
  found = {}
  for name, of_name in summary['fil'].items():
    pairs = [
      pair
      for one, true in zip(summary['scores'][name], summary['scores'][TRUTH])
      for pair in zip(true['loss'], one['loss'])
      if None not in pair
    ]
    title = (
      f'{name}: Pearson {_number(of_name["pearson"], "+.2f")}, '
      f'Spearman {_number(of_name["spearman"], "+.2f")}'
    )
    if pairs:
      found[title] = pairs
  return found


def by_round(summary: Mapping[str, Any]) -> dict[str, dict[str, list[tuple]]]:
  """Lists points (round, agreement) by figure and curvature.

  There are none if there is only one evaluation.
  """
  found = {
    title: {
      name: [
        (point['round'], point[figure])
        for point in points
        if point[figure] is not None
      ]
      for name, points in summary.get('by_round', {}).items()
    }
    for figure, title in (
      ('pearson', "Pearson's correlation"),
      ('spearman', "Spearman's correlation"),
      ('error', 'error of the loss'),
    )
  }
  found = {
    title: {name: points for name, points in curves.items() if len(points) > 1}
    for title, curves in found.items()
  }
  return {title: curves for title, curves in found.items() if curves}


def tables_of(summary: Mapping[str, Any]) -> dict[str, Table]:
  """Makes the tables of the influence.

  They are 'estimates', 'ranking' and, if there are such figures, 'detection'
  and 'cleansing'.
  """
  found = {'estimates': _estimates(summary), 'ranking': _ranking(summary)}
  if 'auc' in summary:
    found['detection'] = Table(
      ['ranking by', 'area under the ROC curve'],
      [
        *(
          [name, _number(area_['mean'], '.3f')]
          for name, area_ in summary['auc'].items()
        ),
        ['random', '0.500'],
      ],
    )
  if 'cleansing' in summary:
    found['cleansing'] = Table(
      ['left out by', 'final accuracy', 'clients, by seed'],
      [
        [
          name,
          statistics.percent(of_name['final_accuracy']),
          '; '.join(' '.join(map(str, ids)) for ids in of_name['left_out'])
          if any(of_name['left_out'])
          else '–',
        ]
        for name, of_name in summary['cleansing'].items()
      ],
    )
  return found


def _estimates(summary) -> Table:
  """Lists agreement and cost, a row for each curvature."""
  rows = []
  for name in summary['scores']:
    row = [name]
    for measure in MEASURES:
      of_name = summary.get(measure, {}).get(name, {})
      row += [
        _number(of_name.get(figure), '.3f')
        for figure in ('pearson', 'spearman')
      ]
    error = summary.get('fil', {}).get(name, {}).get('error')
    cost = summary['cost'].get(name)
    seconds = summary['seconds'][name]
    rows.append(
      [*row, _number(error, '.3g'), f'{seconds:.1f}', _number(cost, '.2f')]
    )
  return Table(
    [
      'curvature',
      'loss: Pearson',
      'Spearman',
      'accuracy: Pearson',
      'Spearman',
      'parameters: Pearson',
      'Spearman',
      'error of the loss',
      's',
      'rounds per client and round',
    ],
    rows,
  )


def _ranking(summary) -> Table:
  """Lists the first seed's clients; the most helpful one comes first."""
  scores = {name: of_name[0] for name, of_name in summary['scores'].items()}
  by = next((name for name in scores if name != TRUTH), TRUTH)
  order = np.argsort(-np.nan_to_num(_array(scores[by]['loss'])), kind='stable')
  flipped = summary['flipped'][0]
  return Table(
    [
      'client',
      'examples',
      *(f'influence on the loss: {name}' for name in scores),
      'own loss',
      *(['labels'] if flipped else []),
    ],
    [
      [
        str(summary['clients'][c]),
        str(summary['examples'][0][c]),
        *(_number(one['loss'][c], '+.4f') for one in scores.values()),
        _number(scores[by][LOSS][c], '.3f'),
        *(
          ['flipped' if summary['clients'][c] in flipped else 'right']
          if flipped
          else []
        ),
      ]
      for c in order
    ],
  )


def _number(value, form) -> str:
  return '–' if value is None or not np.isfinite(value) else f'{value:{form}}'
