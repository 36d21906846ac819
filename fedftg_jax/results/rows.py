"""The rows of metrics.jsonl: columns, sums, and the summary of a run."""

from typing import Any

import numpy as np

# Numbers of every row that tables and curves show already.
_SHOWN = ('round', 'test_accuracy', 'bytes_up', 'bytes_down')
FINAL_ROUNDS = 10  # the final accuracy is the mean over so many last rounds


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
  """Computes the figures of a run from its rows."""
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


def early_accuracy(rows: list[dict[str, Any]]) -> float:
  """Averages the accuracy over the first third of the evaluations.

  Of at least one evaluation, and of the broadcast model.
  """
  first = rows[: max(1, len(rows) // 3)]
  return float(np.mean([row['test_accuracy'] for row in first]))


def _forgetting(rows) -> dict[str, float | None]:
  """Computes how much of its best accuracy a class has lost in the end.

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
  """Lists a row's models; some may be the same, see `different_models`."""
  names = ['broadcast', *row['accuracy'], *row.get('same_models', {})]
  return list(dict.fromkeys(names))


def accuracy(row: dict[str, Any], model: str = 'broadcast') -> float:
  """Returns the test accuracy of a row's model, a fraction."""
  model = row.get('same_models', {}).get(model, model)
  return (
    row['test_accuracy'] if model == 'broadcast' else row['accuracy'][model]
  )


def different_models(rows: list[dict[str, Any]]) -> dict[str, str]:
  """Groups a run's models that are the same.

  Returns:
    By title, such as 'average = aggregated', one of the names.
  """
  last = rows[-1]
  titles = {}
  for name in models(last):
    model = last.get('same_models', {}).get(name, name)
    titles.setdefault(model, []).append(name)
  return {' = '.join(names): model for model, names in titles.items()}


def curve(
  rows: list[dict[str, Any]], model: str = 'broadcast'
) -> list[tuple[int, float, float]]:
  """Returns points (round, megabytes, test accuracy in percent) of a model."""
  return [
    (row['round'], megabytes(row), 100 * accuracy(row, model)) for row in rows
  ]


def seconds(
  rows: list[dict[str, Any]], timings: list[dict[str, Any]]
) -> list[float] | None:
  """Returns the seconds of training up to each row; None where one is unknown.

  Args:
    rows: of metrics.jsonl.
    timings: of timings.jsonl.
  """
  total, until = 0.0, {}
  for timing in timings:
    total += timing.get('train_seconds', 0.0)
    until[timing['round']] = total
  if any(row['round'] not in until for row in rows):
    return None
  return [until[row['round']] for row in rows]


def flat(row: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  """Joins the names of dictionaries in a row with '/', and keeps numbers only.

  What has a number for each class, or a name, is left to metrics.jsonl.
  """
  columns = {}
  for name, value in row.items():
    if isinstance(value, dict):
      columns |= flat(value, f'{prefix}{name}/')
    elif not isinstance(value, (list, str)):
      columns[prefix + name] = value
  return columns


def measures(row: dict[str, Any]) -> list[str]:
  """Lists what a row measures beside what is shown of every run."""
  return [
    name
    for name, value in row.items()
    if isinstance(value, (int, float, type(None)))
    and name not in _SHOWN
    and not name.startswith('validation_')
  ]


def megabytes(row: dict[str, Any]) -> float:
  """Returns the megabytes sent up and down by the time of a row."""
  return (row['bytes_up'] + row['bytes_down']) / 1e6


def number(value) -> float | None:
  """Returns a float of six digits, or None (JSON's null) if not finite."""
  return float(f'{value:.6g}') if np.isfinite(value) else None
