"""Codecs for what clients send, one file each, for `federation(uplink=...)`.

An uplink is an optax transformation of the change of the parameters. Its state,
kept per client, has `bits`, the length of the message, and `columns`, numbers
that the engine reports. A client and the server share a key, that of
`keys.client_keys(...).encode`, so random numbers that are drawn with it need
not be sent.
"""

import optax

from fedftg_jax.uplinks import qsgd, rotated, top_k, uveqfed
from fedftg_jax.uplinks.lattices import LATTICES

# One line on each, for --help.
HELP = {
  'none': 'float32, without coding',
  'uveqfed': 'subtractive dithered lattice quantisation',
  'qsgd': 'stochastic rounding',
  'top_k': 'the largest entries, with the rest kept for later',
  'rotated': 'stochastic rounding to equal levels after a rotation',
}


def build(
  name: str, rate: float, lattice: str
) -> optax.GradientTransformationExtraArgs | None:
  """Builds an uplink by name; None for 'none'.

  Args:
    name: a key of `HELP`.
    rate: bits per parameter.
    lattice: for uveqfed, see there.

  Returns:
    The uplink, or None.

  Raises:
    ValueError: for an unknown name or a value out of range.
  """
  if name not in HELP:
    raise ValueError(f'the uplink must be one of {tuple(HELP)}, got {name!r}.')
  if name == 'none':
    return None
  if name == 'uveqfed':
    return uveqfed.uveqfed(rate, lattice)
  make = {'qsgd': qsgd.qsgd, 'top_k': top_k.top_k, 'rotated': rotated.rotated}
  return make[name](rate)
