"""Wrong labels, to see whether the clients that have them are found."""

from collections.abc import Sequence

import numpy as np


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
    labels: [M] of all examples.
    parts: rows of each client.
    num_classes: C.
    share: of a client's labels, rounded to whole ones, that become another
      class, each drawn uniformly from the others.
    num_clients: how many clients; drawn from those that have examples.
    seed: of the draws.

  Returns:
    The labels, and the clients, ascending.

  Raises:
    ValueError: for a number out of range, or a single class.
  """
  able = [k for k, part in enumerate(parts) if len(part)]
  if not 0 < share <= 1:
    raise ValueError(f'the share must be above 0 and at most 1, got {share}.')
  if not 1 <= num_clients <= len(able):
    raise ValueError(
      f'the clients must be 1 to {len(able)}, those with examples, got '
      f'{num_clients}.'
    )
  if num_classes < 2:
    raise ValueError('there is no other class.')
  random = np.random.RandomState([seed, 5])
  chosen = sorted(random.permutation(able)[:num_clients].tolist())
  labels = np.array(labels)
  for k in chosen:
    rows = np.asarray(parts[k])
    wrong = random.permutation(rows)[: round(share * len(rows))]
    shift = random.randint(1, num_classes, len(wrong))
    labels[wrong] = (labels[wrong] + shift) % num_classes
  return labels, chosen
