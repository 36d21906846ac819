"""Trains all combinations of flag values, or a list of them, and sorts them.

  fedftg sweep --seeds=2 \\
    --grid=learning_rate=0.03,0.1 --grid=method=fed_avg,fed_prox
  fedftg sweep \\
    --list=learning_rate=0.1:local_epochs=5,learning_rate=0.03:local_epochs=10

Any flag of `train` can be swept except --seed, for which there is --seeds; the
other flags apply to all runs. A flag that a method does not use does not
multiply its runs (--grid=method=fed_avg,fed_prox --grid=prox_mu=0.01,0.1 is
three configurations). If both are given, every entry of the list is combined
with every point of the grid.

Everything is checked before any training. Finished runs are skipped: the same
command continues a sweep that was stopped, and a sweep with more values in the
same --workdir trains only the new ones. If a run diverges, this is noted, and
the others continue.

With --validation_share results are sorted by validation accuracy; otherwise by
test accuracy, which then overestimates the best configuration.

It writes into --workdir: report.html, table.md, table.csv and summary.json,
sorted; for one or two flags sweep.png (accuracy by their values); and each
run's files in CONFIGURATION/seedK/.
"""

from collections.abc import Mapping, Sequence
import itertools
import re
from typing import Any, NamedTuple

from absl import flags as absl_flags

from fedftg_jax.configuration import folders, resolve
from fedftg_jax.configuration.resolve import Configuration
from fedftg_jax.results import page, plots, statistics
from fedftg_jax.runs import suite
from fedftg_jax.system import cli, files, progress

absl_flags.DEFINE_multi_string(
  'grid',
  [],
  'A flag and its values: FLAG=VALUE,VALUE. Give it several times for all '
  'combinations.',
)
absl_flags.DEFINE_list(
  'list',
  [],
  'Configurations, separated by commas. In each, flags are separated by '
  'colons: FLAG=VALUE:FLAG=VALUE.',
)
FLAGS = absl_flags.FLAGS

_TEST, _VALIDATION = statistics.LABELS

# One choice of values, by flag.
Settings = Mapping[str, Any]


class Entry(NamedTuple):
  """One configuration of a sweep."""

  settings: Settings  # values of the swept flags that have an effect in it
  config: Configuration  # from `resolve.config`


def main() -> None:
  entries = parse(FLAGS.grid, FLAGS.list)
  configs = {name: entry.config for name, entry in entries.items()}
  resolve.say_unused(configs.values())
  folder = folders.workdir(
    FLAGS.workdir, _union(configs.values()), 'sweep', *configs
  )
  progress.say(
    f'{len(entries)} configurations, {len(suite.seeds())} seed(s) each'
  )
  claim = {'program': 'sweep'}
  with folders.opened(folder, claim):
    results = suite.train_all(folder, claim, configs, tolerant=True)
    if results:
      write_results(entries, results, folder)


def parse(grid: Sequence[str], listed: Sequence[str]) -> dict[str, Entry]:
  """Makes the configurations of --grid and --list, by name, each once.

  Raises:
    cli.UsageError: for an unknown flag, a wrong value, or a flag without
      effect.
  """
  axes, chosen = parse_grid(grid), parse_list(listed)
  for flag in axes:
    if any(flag in settings for settings in chosen):
      raise cli.UsageError(
        'list', ','.join(listed), f'{flag} is in --grid, too'
      )
  if not axes and not chosen:
    raise cli.UsageError('grid', '', 'must be FLAG=VALUE,VALUE, or give --list')
  swept = list(dict.fromkeys([*axes, *itertools.chain(*chosen)]))
  entries = {}
  for first, *values in itertools.product(chosen or [{}], *axes.values()):
    typed = {**first, **dict(zip(axes, values))}
    config = _config(typed)
    name = name_of({k: v for k, v in typed.items() if k in config})
    entries.setdefault(
      name,
      Entry({flag: config[flag] for flag in swept if flag in config}, config),
    )
  for flag in swept:
    if not any(flag in entry.settings for entry in entries.values()):
      raise cli.UsageError(
        'grid' if flag in axes else 'list',
        flag,
        'changes no result of these configurations',
      )
  return entries


def parse_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
  """Parses the values of each flag, from 'FLAG=VALUE,VALUE' each."""
  axes = {}
  for text in texts:
    flag, _, values = text.partition('=')
    if not values:
      raise cli.UsageError('grid', text, 'must be FLAG=VALUE,VALUE')
    parsed = [_value('grid', text, flag, value) for value in values.split(',')]
    if len(set(parsed)) < len(parsed):
      raise cli.UsageError('grid', text, 'a value is there twice')
    if flag in axes:
      raise cli.UsageError('grid', text, f'{flag} is given twice')
    axes[flag] = parsed
  return axes


def parse_list(texts: Sequence[str]) -> list[Settings]:
  """Parses the settings of each 'FLAG=VALUE:FLAG=VALUE'."""
  chosen: list[Settings] = []
  for text in texts:
    settings = {}
    for part in re.split(r':(?=\w+=)', text):
      flag, is_there, value = part.partition('=')
      if not is_there:
        raise cli.UsageError('list', text, 'must be FLAG=VALUE:FLAG=VALUE')
      if flag in settings:
        raise cli.UsageError('list', text, f'{flag} is given twice')
      settings[flag] = _value('list', text, flag, value)
    if settings in chosen:
      raise cli.UsageError('list', ','.join(texts), f'{text} is there twice')
    chosen.append(settings)
  return chosen


def _value(option, text, flag, value):
  if flag == 'seed':
    raise cli.UsageError(option, text, 'seeds are not swept; give --seeds')
  return resolve.parse_value(flag, value)


def _config(settings) -> Configuration:
  try:
    return resolve.config(**settings)
  except cli.UsageError as error:
    raise cli.UsageError(
      'list' if FLAGS.list else 'grid', name_of(settings), str(error)
    ) from error


def name_of(settings: Settings) -> str:
  """Returns a name such as 'learning_rate=0.1,method=fed_avg'."""
  return ','.join(
    f'{k}={statistics.value_text(v)}' for k, v in settings.items()
  )


def _union(configs) -> dict[str, Any]:
  """Returns all values that some run depends on.

  Of values that differ between runs, one is taken; the names tell them apart.
  """
  return {name: value for config in configs for name, value in config.items()}


def write_results(
  entries: Mapping[str, Entry], results: statistics.Results, folder
) -> None:
  """Writes and prints the results, the best first.

  Raises:
    cli.RunError: if all runs diverged.
  """
  summary = summarise(entries, results)
  rows, swept = summary['configurations'], summary['swept']
  files.write_json(folder / 'summary.json', summary)
  files.write_csv(folder / 'table.csv', [csv_row(row, swept) for row in rows])
  header, lines = statistics.sweep_table(summary)
  statistics.write_table(folder / 'table.md', (header, lines))
  progress.show(header, lines)
  if all(row['diverged'] for row in rows):
    raise cli.RunError(f'{folder}: every configuration diverged')
  if len(swept) in plots.SWEPT:
    with files.replacing(folder / 'sweep.png') as temporary:
      plots.sweep(
        temporary,
        swept,
        statistics.sweep_points(summary),
        statistics.LABELS[summary['sorted_by']],
      )
  print(f'report: {page.write(folder)}; table: {folder}/table.csv')


def summarise(
  entries: Mapping[str, Entry], results: statistics.Results
) -> dict[str, Any]:
  """Returns the content of summary.json, with diverged configurations last."""
  ended = {name: runs for name, runs in results.items() if None not in runs}
  target = FLAGS.target_accuracy
  if target is None:
    target = statistics.common_target(ended, share=0.5) if ended else 0.0
  found = {
    name: statistics.over_seeds(runs, target)  # type: ignore[arg-type]
    for name, runs in ended.items()  # type: ignore[arg-type]
  }
  validated = found and all(_VALIDATION in each for each in found.values())
  score = _VALIDATION if validated else _TEST
  order = sorted(found, key=lambda name: -found[name][score]['mean'])
  return {
    'configurations': [
      {
        'name': name,
        'settings': dict(entries[name].settings),
        'diverged': sum(run is None for run in results[name]),
        **found.get(name, {}),
      }
      for name in [*order, *(n for n in results if n not in found)]
    ],
    'swept': list(
      dict.fromkeys(
        flag for entry in entries.values() for flag in entry.settings
      )
    ),
    'sorted_by': score,
    'target_accuracy': target,
    'seeds': list(suite.seeds()),
  }


def csv_row(row: Mapping[str, Any], swept: Sequence[str]) -> dict[str, Any]:
  """Flattens a configuration of summary.json."""
  flat = {flag: row['settings'].get(flag) for flag in swept}
  for name in (_VALIDATION, _TEST, 'best_accuracy', 'train_seconds'):
    if name in row:
      flat |= {name: row[name]['mean'], f'{name}_std': row[name]['std']}
  for i, value in enumerate(row.get(_TEST, {}).get('per_seed', [])):
    flat[f'{_TEST}_seed{FLAGS.seed + i}'] = value
  return {
    **flat,
    'megabytes_up': row.get('megabytes_up'),
    'megabytes_down': row.get('megabytes_down'),
    'diverged': row['diverged'],
  }
