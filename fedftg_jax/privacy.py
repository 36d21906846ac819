"""Computes the differential privacy of a run; needs the extra [dp]."""

import functools


@functools.lru_cache(maxsize=1024)
def epsilon(rounds: int, rate: float, noise: float, delta: float) -> float:
  """Computes the epsilon of (epsilon, delta) differential privacy of a run.

  It holds for adding or removing one client, where each round publishes a sum
  of clipped changes with Gaussian noise and each client takes part in each
  round with the same probability (Poisson sampling). The value is an upper
  bound, from the accountant of privacy loss distributions in Google's
  dp-accounting.

  Args:
    rounds: T.
    rate: q, the probability that a client takes part in a round.
    noise: z, the noise multiplier: standard deviation of the noise over the
      clip.
    delta: the probability with which epsilon may not hold.

  Returns:
    Epsilon.

  Raises:
    ImportError: if dp-accounting is not installed.
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
