"""A run's rows, as metrics.jsonl holds them: columns, sums and the summary."""

from typing import Any

import numpy as np

# Numbers of every row that tables and curves show already.
_SHOWN = ('round', 'test_accuracy', 'bytes_up', 'bytes_down')
FINAL_ROUNDS = 10  # the final accuracy is the mean over so many last rounds


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
  """The figures of a run, from the rows of its metrics.jsonl."""
  last = rows[-1]
  tail = [r for r in rows if r['round'] > last['round'] - FINAL_ROUNDS]
  validation = (
    {}
    if 'validation_accuracy' not in last
    else {
      'final_validation_accuracy': number(
        np.mean([r['validation_accuracy'] for r in tail])
      )
    }
  )
  return {
    'rounds': last['round'],
    'final_accuracy': number(np.mean([r['test_accuracy'] for r in tail])),
    'best_accuracy': max(r['test_accuracy'] for r in rows),
    'final_accuracy_of': {
      name: number(np.mean([accuracy(r, name) for r in tail]))
      for name in models(last)
    },
    **validation,
    **_forgetting(rows),
    'bytes_up': last['bytes_up'],
    'bytes_down': last['bytes_down'],
  }


def _forgetting(rows) -> dict[str, float | None]:
  """How much of its best accuracy a class has lost in the end.

  FedNTD's F (arXiv:2106.03097): mean over the classes of the largest
  A_c(t) - A_c(T) over the evaluations t before the last, T. Accuracies of the
  broadcast model; classes without test examples do not count. Nothing for a
  single evaluation.
  """
  if len(rows) < 2 or 'class_accuracy' not in rows[-1]:
    return {}
  *before, last = np.array([row['class_accuracy'] for row in rows], float)
  return {'forgetting': number(np.nanmean(np.max(before, axis=0) - last))}


def models(row: dict[str, Any]) -> list[str]:
  """The names of a row's models; some may be one, see `different_models`."""
  names = ['broadcast', *row['accuracy'], *row.get('same_models', {})]
  return list(dict.fromkeys(names))


def accuracy(row: dict[str, Any], model: str = 'broadcast') -> float:
  """The test accuracy of a row's model, a fraction."""
  model = row.get('same_models', {}).get(model, model)
  return (
    row['test_accuracy'] if model == 'broadcast' else row['accuracy'][model]
  )


def different_models(rows: list[dict[str, Any]]) -> dict[str, str]:
  """The models of a run by their title: 'average = aggregated' for the average,
  if it has both names."""
  last = rows[-1]
  titles = {}
  for name in models(last):
    model = last.get('same_models', {}).get(name, name)
    titles.setdefault(model, []).append(name)
  return {' = '.join(names): model for model, names in titles.items()}


def curve(
  rows: list[dict[str, Any]], model: str = 'broadcast'
) -> list[tuple[int, float, float]]:
  """Points (round, megabytes, test accuracy in percent) of one of a run's
  models."""
  return [
    (row['round'], megabytes(row), 100 * accuracy(row, model)) for row in rows
  ]


def flat(row: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  """Joins the names of dictionaries in a row with '/'; keeps numbers only. What
  has a number per class, or a name, is left to metrics.jsonl."""
  columns = {}
  for name, value in row.items():
    if isinstance(value, dict):
      columns |= flat(value, f'{prefix}{name}/')
    elif not isinstance(value, (list, str)):
      columns[prefix + name] = value
  return columns


def measures(row: dict[str, Any]) -> list[str]:
  """The names of what a row measures beside what is shown of every run."""
  return [
    name
    for name, value in row.items()
    if isinstance(value, (int, float, type(None)))
    and name not in _SHOWN
    and not name.startswith('validation_')
  ]


def megabytes(row: dict[str, Any]) -> float:
  """What has been sent, up and down, by a row of metrics.jsonl."""
  return (row['bytes_up'] + row['bytes_down']) / 1e6


def number(value) -> float | None:
  """A float of six digits, None (JSON's null) if it is not finite."""
  return float(f'{value:.6g}') if np.isfinite(value) else None
