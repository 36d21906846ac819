"""Flips labels of some clients, to test whether they are found."""

from collections.abc import Sequence

import numpy as np

from fedftg_jax.data.parts import Parts


def flip(
  labels: np.ndarray,
  parts: Sequence[np.ndarray],
  num_classes: int,
  *,
  share: float,
  num_clients: int,
  seed: int,
) -> tuple[np.ndarray, list[int]]:
  """Gives some clients wrong labels.

  Args:
    labels: [M] labels of all examples.
    parts: rows of each client.
    num_classes: C.
    share: share of a client's labels, rounded to a whole number, that are
      changed to another class, drawn uniformly from the others.
    num_clients: number of clients with wrong labels, drawn from those that have
      examples.
    seed: seed of the draws.

  Returns:
    The labels, and the ids of the clients with wrong labels, ascending.

  Raises:
    ValueError: for a number out of range, or if there is only one class.
  """
  parts = Parts.of(parts)
  able = np.flatnonzero(parts.sizes)
  if not 0 < share <= 1:
    raise ValueError(f'the share must be above 0 and at most 1, got {share}.')
  if not 1 <= num_clients <= len(able):
    raise ValueError(
      f'the number of clients must be 1 to {len(able)}, those with examples, '
      f'got {num_clients}.'
    )
  if num_classes < 2:
    raise ValueError(
      f'flipping labels needs at least 2 classes, got {num_classes}.'
    )
  random = np.random.RandomState([seed, 5])
  chosen = sorted(random.permutation(able)[:num_clients].tolist())
  labels = np.array(labels)
  for k in chosen:
    rows = np.asarray(parts[k])
    wrong = random.permutation(rows)[: round(share * len(rows))]
    shift = random.randint(1, num_classes, len(wrong))
    labels[wrong] = (labels[wrong] + shift) % num_classes
  return labels, chosen
