"""Measures of how skewed a partition is, from class counts [N, C]."""

from collections.abc import Sequence

import numpy as np

from fedftg_jax.data.parts import Parts


def class_counts(
  labels: np.ndarray, parts: Sequence[np.ndarray], num_classes: int
) -> np.ndarray:
  """Counts the examples of each class on each client, [N, C]."""
  parts = Parts.of(parts)
  cells = parts.owners() * num_classes + labels[parts.rows]
  return np.bincount(cells, minlength=len(parts) * num_classes).reshape(
    len(parts), num_classes
  )


def total_variation(counts: np.ndarray) -> np.ndarray:
  """Computes each client's distance [N] from the overall class distribution.

  It is 1/2 sum_c |p_k(c) - p(c)|, between 0 (the same distribution) and 1
  (disjoint), and NaN for a client without examples.
  """
  everybody = counts.sum(0) / counts.sum()
  return np.abs(_shares(counts) - everybody).sum(1) / 2


def effective_classes(counts: np.ndarray) -> np.ndarray:
  """Computes each client's effective number of classes, [N].

  This is the exponential of the entropy of its class distribution: k for k
  equally frequent classes, and rare classes count less (Hill's number of order
  1). It is NaN for a client without examples.
  """
  shares = _shares(counts)
  logs = np.log(shares, where=shares > 0, out=np.zeros_like(shares))
  return np.exp(-(shares * logs).sum(1))


def gini(sizes: np.ndarray) -> float:
  """Computes the Gini coefficient of the client sizes.

  It is 0 for equal sizes, and (N - 1) / N if one client has everything.
  """
  num, ordered = len(sizes), np.sort(sizes)
  ranks = np.arange(1, num + 1)
  return float(
    2 * (ranks * ordered).sum() / (num * ordered.sum()) - (num + 1) / num
  )


def measures(counts: np.ndarray) -> dict[str, float | int]:
  """Computes all measures of a partition as scalars.

  Args:
    counts: [N, C] from `class_counts`; means are over clients with examples.

  Returns:
    The measures by name, in the order in which they should be shown.
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
  """Computes each client's class shares [N, C]; NaN without examples."""
  sizes = counts.sum(1, keepdims=True).astype(float)
  return counts / np.where(sizes > 0, sizes, np.nan)
