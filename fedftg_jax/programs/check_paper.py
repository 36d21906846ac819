"""Compares finished runs with published figures.

  fedftg check_paper runs/niid_bench
  fedftg check_paper runs/mine --published=pfllib

The folder is that of a run, a comparison or a sweep. Its runs are compared with
the figures of the preset of the same name, or of --published. Figures are
published for cifar10_fed_mr, cifar10_fed_ntd, cifar100_fed_align,
mnist_fed_gen, niid_bench and pfllib; they are in
experiments/presets/published.yaml, with their sources. Each figure is compared
with all runs of its method and flags, as the mean over seeds; a figure of the
best value of a flag with the runs of the best of the published values. The
difference is also given in standard deviations, of one seed here and of one
published seed together. A deviation that is not known, because there is one
seed or none was published, counts as 0; if neither is known, or if a seed
diverged, the column is empty. Flags in which the runs differ from the preset
are named, since they may explain a difference. Not compared, but named, are
runs that are not finished or that diverged, runs that repeat a seed, and runs
of a figure's method that lack its flags. Writes check_paper.json.
"""

from collections.abc import Iterable, Iterator, Mapping
import math
from typing import Any, NamedTuple

from absl import flags as absl_flags
import numpy as np
from upath import UPath
import yaml

from fedftg_jax import recipes
from fedftg_jax.configuration import folders, resolve
from fedftg_jax.configuration.resolve import Configuration
from fedftg_jax.results import rows, statistics
from fedftg_jax.system import cli, files, own_flags, progress

ARGUMENT = 'FOLDER'
GROUPS = ()  # of common flags in --help
PUBLISHED = cli.PRESETS / 'published.yaml'
FLAGS = absl_flags.FLAGS

absl_flags.DEFINE_string(
  'published',
  '',
  "Preset with the published figures; default: the folder's name.",
)

_SEEDS = 'seed', 'partition_seed', 'schedule_seed'
# Flags that differ between seeds, or that change no accuracy but by rounding.
_FREE = (
  *_SEEDS,
  'evaluate_clients',
  'evaluated_clients',
  'personalise',
  'clients_by_class',
  'evaluate_all',
  'conv',
  'client_chunk',
  'client_state',
  'num_devices',
)
# Of a figure; others are flags.
_KEYS = ('percent', 'deviation', 'figure', 'best_of')


class _Run(NamedTuple):
  place: UPath
  config: dict[str, Any]
  rows: list[dict[str, Any]]  # of metrics.jsonl; none if it diverged


class Compared(NamedTuple):
  """A published figure beside runs that differ in nothing but the seed.

  Attributes:
    flags: the flags that the figure is of.
    published: in percent.
    deviation: standard deviation of the published seeds; None if unknown.
    ours: accuracy of each seed, in percent.
    diverged: number of further seeds that diverged.
    rounds: of the runs.
    differs: what the runs and the preset have for the flags that differ; None
      for a flag that there is not any more.
    tried: number of seeds of each value of which this one is the best; {} for
      a figure that is not of the best value of a flag.
  """

  flags: dict[str, Any]
  published: float
  deviation: float | None
  ours: list[float]
  diverged: int
  rounds: int
  differs: dict[str, tuple[Any, Any]]
  tried: dict[str, int]

  @property
  def difference(self) -> float:
    """Mean of the runs less the published figure, in points."""
    return float(np.mean(self.ours)) - self.published

  @property
  def deviations(self) -> float | None:
    """The difference in standard deviations.

    None if neither deviation is known, or if a seed diverged: then the mean is
    of some runs only, and the published one may be of all.
    """
    own = statistics.mean_and_std(self.ours)['std']
    both = math.hypot(own, self.deviation or 0.0)
    return self.difference / both if both and not self.diverged else None


def main(folder: str) -> None:
  try:
    place = UPath(folder)
  except (ValueError, ImportError) as error:  # a store that is not known here
    raise cli.ArgumentError(folder, str(error)) from error
  known = yaml.safe_load(PUBLISHED.read_text())
  if not place.is_dir():
    raise cli.ArgumentError(folder, 'must be a folder with finished runs')
  name = FLAGS.published or place.absolute().resolve().name
  if name not in known:
    names = ', '.join(known)
    if FLAGS.published:
      raise cli.UsageError('published', name, f'must be one of {names}')
    raise cli.ArgumentError(
      folder,
      'is not named after a preset with published figures; name one of them '
      f'by --published: {names}',
    )
  found = compare(place, name, known[name])
  if not found:
    raise cli.ArgumentError(
      folder,
      f'has no finished run with the method and flags of a figure in {name}',
    )
  source, checked = known[name]['source'], known[name]['checked']
  progress.show(
    ['run', 'seeds', 'rounds', 'ours', 'published', 'difference', 'deviations'],
    [*map(_cells, found)],
  )
  for one in found:
    if one.tried:
      print(f'{_named(one.flags)} is the best of {_seeds(one.tried)}')
    if one.diverged:
      print(
        f'{_named(one.flags)}: {one.diverged} of '
        f'{one.diverged + len(one.ours)} seeds diverged; the mean is of the '
        'others, the published one may be of all'
      )
    if one.differs:
      print(f'{_named(one.flags)} differs from the preset: {_said(one)}')
  print(f'published: {source}')
  if not checked:
    print('Nobody has checked these figures there. Do not quote them.')
  path = place / 'check_paper.json'
  files.write_json(
    path,
    {
      'preset': name,
      'source': source,
      'checked': checked,
      'figures': [
        {
          **one._asdict(),
          'difference': one.difference,
          'deviations': one.deviations,
        }
        for one in found
      ],
    },
  )
  print(f'written: {path}')


def compare(
  folder: UPath, name: str, published: Mapping[str, Any]
) -> list[Compared]:
  """Compares the runs in a folder with the published figures of a preset.

  Args:
    folder: of a run, a comparison or a sweep.
    name: of the preset.
    published: its entry in published.yaml.

  Returns:
    A comparison for each figure and each group of runs that differ in nothing
    but the seed.
  """
  free = _free(name)
  groups = _groups(_runs(folder), free)
  left = {**groups}  # those that no figure is of
  found = []
  for figure in published['figures']:
    figure = {'figure': published['figure'], **figure}
    wanted = flags_of(figure)
    preset = preset_config(name, wanted)
    of_figure: list[Compared] = []
    for key, runs in groups.items():
      if _same(Configuration(runs[0].config), preset, wanted):
        left.pop(key, None)
        of_figure += _beside(runs, figure, preset, free)
    found += _best(of_figure, figure)
  for runs in left.values():
    for figure in published['figures']:
      if _same(runs[0].config, figure, ['method']):
        progress.say(
          f'{runs[0].config["method"]} is not compared: the figure is of '
          f'{_named(flags_of(figure))}'
        )
  return found


def flags_of(figure: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the flags that a figure in published.yaml is of."""
  return {k: v for k, v in figure.items() if k not in _KEYS}


def preset_config(name: str, changes: Mapping[str, Any]) -> Configuration:
  """Returns the configuration of a run of a preset, with some flags changed."""
  values = _preset_values(name)
  ours = {k: v for k, v in values.items() if k in own_flags.FLAGS}
  values = resolve.from_arguments({**ours, **changes})
  # The data need not be here: the configuration is checked without them.
  config = resolve.config(**{**values, 'dataset': 'arrays:'})
  return config.replace(dataset=values['dataset'])


def _preset_values(name: str) -> dict[str, Any]:
  """Returns the values of the flags that a preset sets."""
  return cli.values_of(['check_paper', f'--preset={name}'])


def _free(name: str) -> set[str]:
  """Returns the flags in which runs of a preset may differ, and are pooled."""
  fixed = {'partition_seed'} & _preset_values(name).keys()
  return {*_FREE} - fixed  # if fixed, all seeds have the same partition


def _runs(folder: UPath) -> Iterator[_Run]:
  """Yields the runs below a folder that are over, and names the others.

  Raises:
    cli.ArgumentError: if one of them is damaged.
  """
  for path in sorted(folder.rglob('config.json')):
    place = path.parent
    try:
      config = dict(files.read_json(path)['config'])
      if 'program' in config:
        continue
      if (place / 'summary.json').exists():
        run = _Run(place, config, files.read_jsonl(place / 'metrics.jsonl'))
        int(run.rows[-1]['round'])
        yield run
      elif (place / folders.DIVERGED).exists():
        yield _Run(place, config, [])
      else:
        progress.say(f'{place} is not compared: it is not finished')
    except (OSError, ValueError, LookupError, TypeError) as error:
      raise cli.ArgumentError(
        place, f'is damaged ({type(error).__name__}: {error})'
      ) from error


def _groups(runs: Iterable[_Run], free: set[str]) -> dict[str, list[_Run]]:
  """Groups runs that differ in nothing but the seed; names repeated seeds."""
  groups: dict[str, dict[tuple, _Run]] = {}
  for run in runs:
    config = {k: v for k, v in run.config.items() if k not in free}
    group = groups.setdefault(repr(sorted(config.items())), {})
    seed = tuple(run.config.get(name) for name in _SEEDS)
    first = group.setdefault(seed, run)
    if first is not run:
      progress.say(
        f'{run.place} is not compared: it has the flags and the seed of '
        f'{first.place}'
      )
  return {key: [*group.values()] for key, group in groups.items()}


def _same(
  ours: Mapping[str, Any], theirs: Mapping[str, Any], names: Iterable[str]
) -> bool:
  """Returns whether two configurations have the same values of some flags."""
  return all(
    _comparable(name, ours[name]) == _comparable(name, theirs[name])
    for name in names
  )


def _comparable(flag: str, value: Any) -> Any:
  if flag != 'method':
    return value
  try:
    return recipes.parse(value)
  except ValueError:  # a method that there is not any more
    return value


def _differences(
  config: Configuration, preset: Configuration, without: set[str]
) -> dict[str, tuple[Any, Any]]:
  """Returns what runs and preset have for the flags in which they differ."""

  def value(of, flag):
    try:
      return of[flag]
    except KeyError:  # a flag that there is not any more
      return None

  pairs = {
    flag: (value(config, flag), value(preset, flag))
    for flag in sorted({*config, *preset} - without)
  }
  return {flag: pair for flag, pair in pairs.items() if pair[0] != pair[1]}


def _beside(
  runs: list[_Run],
  figure: Mapping[str, Any],
  preset: Configuration,
  free: set[str],
) -> Iterator[Compared]:
  """Compares runs that differ in nothing but the seed with their figure.

  It names the runs that have no value of what is published, and yields nothing
  if no run has one.

  Args:
    runs: a group.
    figure: of published.yaml.
    preset: the configuration that the figure is of.
    free: flags in which runs may differ.
  """
  config, flags = Configuration(runs[0].config), flags_of(figure)
  for flag, values in figure.get('best_of', {}).items():
    flags[flag] = config[flag]
    if config[flag] not in values:
      progress.say(
        f'{_named(flags)} is not compared: the figure is the best of '
        + ', '.join(map(statistics.value_text, values))
      )
      return
  ours = _figures(runs, figure['figure'])
  if ours:
    yield Compared(
      flags,
      figure['percent'],
      figure.get('deviation'),
      ours,
      sum(not run.rows for run in runs),
      next(run.rows[-1]['round'] for run in runs if run.rows),
      _differences(config, preset, {*free, *flags}),
      {},
    )


def _best(found: list[Compared], figure: Mapping[str, Any]) -> list[Compared]:
  """Chooses the best value of a flag, of runs that are alike in all others.

  Args:
    found: of a figure.
    figure: of published.yaml; if it is not of a best value, all are chosen.
  """
  for flag, values in figure.get('best_of', {}).items():
    alike: dict[str, list[Compared]] = {}
    for one in found:
      alike.setdefault(repr(one.differs), []).append(one)
    found = []
    for each in alike.values():
      seeds = {one.flags[flag]: len(one.ours) for one in each}
      tried = {
        f'{flag}={statistics.value_text(value)}': seeds.get(value, 0)
        for value in values
      }
      best = max(each, key=lambda one: np.mean(one.ours))
      found.append(best._replace(tried=tried))
  return found


def _figures(runs: list[_Run], what: str) -> list[float]:
  """Returns the figure of each run that has it, and names the others."""
  found = []
  for run in runs:
    if not run.rows:
      progress.say(f'{run.place} is not compared: it diverged')
      continue
    percent = _figure(run.rows, what)
    if percent is None:
      name = what.split()[1]
      needs = (
        ', which needs --evaluate_clients=every'
        if name.startswith('clients/')
        else ''
      )
      progress.say(f'{run.place} is not compared: no {name} in a row{needs}')
    else:
      found.append(percent)
  return found


def _figure(of: list[dict[str, Any]], what: str) -> float | None:
  """Returns the figure of a run in percent; None if a row does not have it."""
  when, _, name = what.partition(' ')
  if when == 'final':
    of = [r for r in of if r['round'] > of[-1]['round'] - rows.FINAL_ROUNDS]
  values = []
  for row in of:
    value: Any = row
    for key in name.split('/'):
      value = value.get(key) if isinstance(value, dict) else None
    if value is None:
      return None
    values.append(value)
  return 100 * float(np.mean(values) if when == 'final' else np.max(values))


def _cells(one: Compared) -> list[str]:
  published = f'{one.published:.2f}'
  if one.deviation is not None:
    published += f' ± {one.deviation:.2f}'
  ours = statistics.mean_and_std([percent / 100 for percent in one.ours])
  return [
    _named(one.flags),
    str(len(one.ours)),
    str(one.rounds),
    statistics.percent(ours),
    published,
    f'{one.difference:+.2f}',
    '' if one.deviations is None else f'{one.deviations:+.1f}',
  ]


def _named(flags: Mapping[str, Any]) -> str:
  method, *others = (
    str(v) if k == 'method' else f'{k}={statistics.value_text(v)}'
    for k, v in sorted(flags.items(), key=lambda item: item[0] != 'method')
  )
  return ':'.join([method, *others])


def _seeds(tried: Mapping[str, int]) -> str:
  """Names values and their seeds, as in 'mu=1 (2 seeds), mu=2 (not run)'."""
  words = {0: 'not run', 1: '1 seed'}
  return ', '.join(
    f'{value} ({words.get(seeds, f"{seeds} seeds")})'
    for value, seeds in tried.items()
  )


def _said(one: Compared) -> str:
  text = statistics.value_text
  return ', '.join(
    f'{flag}={text(ours)} ({text(preset)})'
    for flag, (ours, preset) in one.differs.items()
  )
