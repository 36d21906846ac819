"""Compares finished runs with published figures.

  fedftg check_paper runs/niid_bench
  fedftg check_paper runs/mine --published=pfllib

The folder is that of a run, a comparison or a sweep. Its runs are compared with
the figures of the preset of the same name, or of --published. Figures are
published for cifar10_fed_mr, cifar10_fed_ntd, cifar100_fed_align,
mnist_fed_gen, niid_bench and pfllib; they are in
experiments/presets/published.yaml, with their sources. Each figure is compared
with all runs of its method and flags, as the mean over seeds; a figure of the
best value of a flag with the runs of the best value. The difference is also
given in standard deviations, of one seed here and of one published seed
together. A deviation that is not known, because there is one seed or none was
published, counts as 0; if neither is known, the column is empty. Flags in which
the runs differ from the preset are named, since they may explain a difference.
Not compared, but named, are runs that are not finished, and runs of a figure's
method that lack its flags. Writes check_paper.json.
"""

from collections.abc import Iterator, Mapping
import math
from typing import Any, NamedTuple

from absl import flags as absl_flags
import numpy as np
from upath import UPath
import yaml

from fedftg_jax import recipes
from fedftg_jax.configuration import resolve
from fedftg_jax.configuration.resolve import Configuration
from fedftg_jax.results import rows, tables
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

# Flags that differ between seeds, or that change no accuracy but by rounding.
_FREE = (
  'seed',
  'partition_seed',
  'schedule_seed',
  'eval_every',
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
  config: dict[str, Any]
  rows: list[dict[str, Any]]  # of metrics.jsonl


class Compared(NamedTuple):
  """A published figure beside runs that differ in nothing but the seed.

  Attributes:
    flags: the flags that the figure is of.
    published: in percent.
    deviation: standard deviation of the published seeds; None if unknown.
    ours: accuracy of each seed, in percent.
    rounds: of the runs.
    differs: what the runs and the preset have for the flags that differ.
  """

  flags: dict[str, Any]
  published: float
  deviation: float | None
  ours: list[float]
  rounds: int
  differs: dict[str, tuple[Any, Any]]

  @property
  def difference(self) -> float:
    """Mean of the runs less the published figure, in points."""
    return float(np.mean(self.ours)) - self.published

  @property
  def deviations(self) -> float | None:
    """The difference in standard deviations; None if neither is known."""
    own = np.std(self.ours, ddof=1) if len(self.ours) > 1 else 0.0
    both = math.hypot(own, self.deviation or 0.0)
    return self.difference / both if both else None


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
  free = {*_FREE}
  if 'partition_seed' in _preset_values(name):
    free.remove('partition_seed')  # all seeds have the same partition
  groups: dict[str, list[_Run]] = {}
  for run in _runs(folder):
    config = {k: v for k, v in run.config.items() if k not in free}
    groups.setdefault(repr(sorted(config.items())), []).append(run)
  found = []
  has_figure = set()  # groups
  for figure in published['figures']:
    wanted = {k: v for k, v in figure.items() if k not in _KEYS}
    preset = preset_config(name, wanted)
    chosen = figure.get('best_of')
    of_figure = []
    for key, runs in groups.items():
      config = Configuration(runs[0].config)
      if [_comparable(k, config[k]) for k in wanted] != [
        _comparable(k, preset[k]) for k in wanted
      ]:
        continue
      has_figure.add(key)
      what = figure.get('figure', published['figure'])
      found_here = [_figure(run.rows, what) for run in runs]
      ours = [percent for percent in found_here if percent is not None]
      if not ours:
        progress.say(
          f'{_named(wanted)}: no row has {what.split()[1]}, which needs '
          '--evaluate_clients=every'
        )
        continue
      best = {chosen: config[chosen]} if chosen else {}
      of_figure.append(
        Compared(
          {**wanted, **best},
          figure['percent'],
          figure.get('deviation'),
          ours,
          runs[0].rows[-1]['round'],
          {
            k: (config[k], preset[k])
            for k in sorted({*config, *preset} - {*free, *wanted, *best})
            if config[k] != preset[k]
          },
        )
      )
    if chosen and of_figure:
      of_figure = [max(of_figure, key=lambda one: np.mean(one.ours))]
    found += of_figure
  for key, runs in groups.items():
    method = runs[0].config['method']
    for figure in published['figures'] if key not in has_figure else ():
      if _comparable('method', figure['method']) == _comparable(
        'method', method
      ):
        wanted = {k: v for k, v in figure.items() if k not in _KEYS}
        progress.say(
          f'{method} is not compared: the figure is of {_named(wanted)}'
        )
  return found


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


def _runs(folder: UPath) -> Iterator[_Run]:
  """Yields the finished runs below a folder, and names the others.

  Raises:
    cli.ArgumentError: if one of them is damaged.
  """
  for path in sorted(folder.rglob('config.json')):
    place = path.parent
    try:
      config = dict(files.read_json(path)['config'])
      if 'program' in config:
        continue
      if not (place / 'summary.json').exists():
        progress.say(f'{place} is not compared: it is not finished')
      else:
        run = _Run(config, files.read_jsonl(place / 'metrics.jsonl'))
        int(run.rows[-1]['round'])
        yield run
    except (OSError, ValueError, LookupError, TypeError) as error:
      raise cli.ArgumentError(
        place, f'is damaged ({type(error).__name__}: {error})'
      ) from error


def _comparable(flag: str, value: Any) -> Any:
  return recipes.parse(value) if flag == 'method' else value


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
  ours = f'{np.mean(one.ours):.2f}'
  if len(one.ours) > 1:
    ours += f' ± {np.std(one.ours, ddof=1):.2f}'
  published = f'{one.published:.2f}'
  if one.deviation is not None:
    published += f' ± {one.deviation:.2f}'
  return [
    _named(one.flags),
    str(len(one.ours)),
    str(one.rounds),
    ours,
    published,
    f'{one.difference:+.2f}',
    '' if one.deviations is None else f'{one.deviations:+.1f}',
  ]


def _named(flags: Mapping[str, Any]) -> str:
  method, *others = (
    tables.text(v) if k == 'method' else f'{k}={tables.text(v)}'
    for k, v in sorted(flags.items(), key=lambda item: item[0] != 'method')
  )
  return ':'.join([method, *others])


def _said(one: Compared) -> str:
  return ', '.join(
    f'{flag}={tables.text(ours)} ({tables.text(preset)})'
    for flag, (ours, preset) in one.differs.items()
  )
