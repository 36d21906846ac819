"""What differential privacy a run has; needs the extra [dp]."""

import functools


@functools.lru_cache(maxsize=1024)
def epsilon(rounds: int, rate: float, noise: float, delta: float) -> float:
  """The epsilon of (epsilon, delta) differential privacy after some rounds.

  For the presence of one client (add or remove) in a sum of clipped changes
  with Gaussian noise, each client taking part in each round with the same
  probability (Poisson sampling). By the accountant of privacy loss
  distributions of Google's dp-accounting: an upper bound.

  Args:
    rounds: T.
    rate: q, the probability to take part.
    noise: z, deviation of the noise over the clip.
    delta: probability with which epsilon may not hold.

  Raises:
    ImportError: without dp-accounting.
    ValueError: for a value out of range.
  """
  if not (rounds >= 1 and 0 < rate <= 1 and noise > 0 and 0 < delta < 1):
    raise ValueError(
      'rounds must be at least 1, rate above 0 and at most 1, noise above 0 '
      f'and delta between 0 and 1, got {rounds}, {rate}, {noise} and {delta}.'
    )
  try:
    import dp_accounting
    from dp_accounting import pld
  except ImportError as error:
    raise ImportError(
      "epsilon needs dp-accounting: pip install 'fedftg_jax[dp]'"
    ) from error
  event = dp_accounting.PoissonSampledDpEvent(
    rate, dp_accounting.GaussianDpEvent(noise)
  )
  accountant = pld.PLDAccountant()
  accountant.compose(dp_accounting.SelfComposedDpEvent(event, rounds))
  return float(accountant.get_epsilon(delta))
