"""A run's rows, as metrics.jsonl holds them: columns, sums and the summary."""

from typing import Any

import numpy as np

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
      name: number(np.mean([r['accuracy'][name] for r in tail]))
      for name in last['accuracy']
    },
    **validation,
    'bytes_up': last['bytes_up'],
    'bytes_down': last['bytes_down'],
  }


def flat(row: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  """A row without dictionaries in it: their names are joined with '/'. What has a
  number per class is left to metrics.jsonl."""
  columns = {}
  for name, value in row.items():
    if isinstance(value, dict):
      columns |= flat(value, f'{prefix}{name}/')
    elif not isinstance(value, list):
      columns[prefix + name] = value
  return columns


def megabytes(row: dict[str, Any]) -> float:
  """What has been sent, up and down, by a row of metrics.jsonl."""
  return (row['bytes_up'] + row['bytes_down']) / 1e6


def number(value) -> float | None:
  """A float of six digits, None (JSON's null) if it is not finite."""
  return float(f'{value:.6g}') if np.isfinite(value) else None
