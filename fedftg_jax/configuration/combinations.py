"""Lists which methods can be combined with which flags.

`python -m fedftg_jax.configuration.combinations` prints the table in the
documentation. It asks the checks of the flags.
"""

from absl import flags as absl_flags

from fedftg_jax import recipes
from fedftg_jax.configuration import resolve
from fedftg_jax.system import cli

# Flags of each column, besides --method; a value that begins with '+' is
# appended to the name of the method.
COLUMNS: dict[str, dict[str, object]] = {
  '`+fed_ftg`': {'method': '+fed_ftg'},
  '`--batch_norm=aggregate`': {'model': 'resnet20', 'batch_norm': 'aggregate'},
  '`local`': {'model': 'resnet20', 'batch_norm': 'local'},
  '`reset`': {'model': 'resnet20', 'batch_norm': 'reset'},
  '`--schedule=bernoulli`': {'schedule': 'bernoulli'},
  '`--server_optimizer`': {'server_optimizer': 'adam'},
  '`--uplink`': {'uplink': 'uveqfed'},
  '`--dp_clip`': {'dp_clip': 1.0},
  '`--secure_aggregation`': {'secure_aggregation': True},
  '`--client_state=host`': {'client_state': 'host'},
  '`--num_devices=0`': {'num_devices': 0},
}


def verdicts() -> dict[str, list[str]]:
  """Returns, by method, '' for each column that works, or why it does not."""
  found: dict[str, list[str]] = {}
  for name in sorted(recipes.RECIPES):
    found[name] = [
      _verdict(name, dict(changes)) for changes in COLUMNS.values()
    ]
  return found


def _verdict(name, changes):
  further = changes.pop('method', '')
  if further[1:] == name:
    return 'is itself'
  # Flags that the method requires.
  needs = recipes.RECIPES[name].needs
  given = {flag: allowed[0] for flag, allowed, _ in needs}
  if name.startswith('fed_zda'):
    given['norm'] = 'batch'
  if name == 'fed_df_public':
    given['public_data'] = 'train:100'
  try:
    resolve.config(method=name + further, **{**given, **changes})
  except cli.UsageError as error:
    return str(error).partition(': ')[2]
  return ''


def table() -> str:
  """Formats the verdicts in Markdown, with the reasons as notes below."""
  reasons: dict[str, int] = {}

  def cell(reason):
    if not reason:
      return 'yes'
    return f'no ({reasons.setdefault(reason, len(reasons) + 1)})'

  lines = [
    '| | ' + ' | '.join(COLUMNS) + ' |',
    '| --- |' + ' --- |' * len(COLUMNS),
    *(
      f'| `{name}` | ' + ' | '.join(map(cell, of_name)) + ' |'
      for name, of_name in verdicts().items()
    ),
    '',
    *(f'{number}. {reason}' for reason, number in reasons.items()),
  ]
  return '\n'.join(lines)


if __name__ == '__main__':
  absl_flags.FLAGS(['combinations'])
  print(table())
