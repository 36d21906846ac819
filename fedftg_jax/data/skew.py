"""How unequal a partition is: pure functions of class counts [N, C]."""

import numpy as np


def class_counts(
  labels: np.ndarray, parts: list[np.ndarray], num_classes: int
) -> np.ndarray:
  """[N, C] how many examples of each class each client holds."""
  return np.array(
    [np.bincount(labels[part], minlength=num_classes) for part in parts]
  )


def total_variation(counts: np.ndarray) -> np.ndarray:
  """[N] distance of each client's classes from those of all clients together.

  1/2 sum_c |p_k(c) - p(c)|, between 0 (as all) and 1 (nothing in common); NaN
  for a client without examples.
  """
  everybody = counts.sum(0) / counts.sum()
  return np.abs(_shares(counts) - everybody).sum(1) / 2


def effective_classes(counts: np.ndarray) -> np.ndarray:
  """[N] number of classes of each client, rare ones counting less.

  The exponential of the entropy of its classes: k for k classes in equal parts
  (Hill's number of order 1); NaN for a client without examples.
  """
  shares = _shares(counts)
  logs = np.log(shares, where=shares > 0, out=np.zeros_like(shares))
  return np.exp(-(shares * logs).sum(1))


def gini(sizes: np.ndarray) -> float:
  """Gini coefficient of the client sizes: 0 for equal ones, (N - 1) / N where
  one client has everything."""
  num, ordered = len(sizes), np.sort(sizes)
  ranks = np.arange(1, num + 1)
  return float(
    2 * (ranks * ordered).sum() / (num * ordered.sum()) - (num + 1) / num
  )


def measures(counts: np.ndarray) -> dict[str, float | int]:
  """All measures of a partition as scalars.

  Args:
    counts: [N, C] from `class_counts`; means are over clients with examples.

  Returns:
    By name, in the order in which they are read.
  """
  sizes = counts.sum(1)
  distance, effective = total_variation(counts), effective_classes(counts)
  return {
    'num_clients': len(counts),
    'num_without_examples': int((sizes == 0).sum()),
    'num_examples': int(sizes.sum()),
    'size_min': int(sizes.min()),
    'size_median': float(np.median(sizes)),
    'size_max': int(sizes.max()),
    'size_gini': gini(sizes),
    'total_variation_mean': float(np.nanmean(distance)),
    'effective_classes_mean': float(np.nanmean(effective)),
    'effective_classes_min': float(np.nanmin(effective)),
    'effective_classes_max': float(np.nanmax(effective)),
  }


def _shares(counts):
  """[N, C] each client's class shares; NaN for a client without examples."""
  sizes = counts.sum(1, keepdims=True).astype(float)
  return counts / np.where(sizes > 0, sizes, np.nan)
