"""Options of our contestants: candidates that may make a round faster."""

from collections.abc import Sequence

from fedftg_jax.models import convolution

_MODEL: dict[str, Sequence[str | int]] = {  # each with its values
  'conv': convolution.IMPLEMENTATIONS
}
OPTIONS: dict[str, dict[str, Sequence[str | int]]] = {
  'ours': {
    **_MODEL,
    'client_chunk': ('auto', *range(10**4)),
    # Of the server step, as the flags --ftg_NAME.
    'gen_step': ('sequential', 'joint'),
    'generator_steps': range(100),
    'student_steps': range(100),
    'ftg_batch_size': range(1, 10**4),
  },
  'centralised': _MODEL,
  'one_step': _MODEL,
}


def parse(contestant: str) -> dict[str, str | int]:
  """Parses the options of a contestant, as 'ours:conv=pallas:client_chunk=2'.

  Raises:
    ValueError: for an unknown or repeated option, or a wrong value.
  """
  who, *texts = contestant.split(':')
  known = OPTIONS.get(who, {})
  found: dict[str, str | int] = {}
  for text in texts:
    name, _, value = text.partition('=')
    if name not in known:
      raise ValueError(
        f'{name!r} is none of the options of {who}, '
        + (', '.join(known) or 'which has none')
      )
    if name in found:
      raise ValueError(f'{name} is given twice')
    allowed = {str(one): one for one in known[name]}
    if value not in allowed:
      raise ValueError(f'{name} must be {_described(known[name])}')
    found[name] = allowed[value]
  return found


def _described(values: Sequence[str | int]) -> str:
  """Lists the values of an option, as 'one of a, b' or 'auto or 0 to 9'."""
  words = [str(value) for value in values if isinstance(value, str)]
  numbers = [value for value in values if not isinstance(value, str)]
  if len(numbers) > 2:
    return ' or '.join([*words, f'{min(numbers)} to {max(numbers)}'])
  return 'one of ' + ', '.join(map(str, values))
