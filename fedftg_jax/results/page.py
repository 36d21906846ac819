"""The page of a run, a comparison, a sweep or of influence: report.html.

One page that needs nothing else: no network, no scripts, pictures inside.
"""

import base64
from collections.abc import Iterable, Mapping
import io
import json
import pathlib
import re
from typing import Any

from etils import epy
import jinja2
import markupsafe
import numpy as np
from PIL import Image
from upath import UPath

from fedftg_jax.configuration import folders
from fedftg_jax.data import images as images_lib
from fedftg_jax.results import (
  influence,
  plots,
  reader,
  statistics,
  svg,
  tables,
  verdicts,
)
from fedftg_jax.results import rows as rows_lib
from fedftg_jax.system import cli, files

with epy.lazy_imports():
  from matplotlib import colors as plt_colors

_STRIP_ROUNDS = 6  # rounds whose generated images are shown, at most
_SHOWN_CONFIGURATIONS = 8  # of a sweep, with their curves; colours are ten
_DRAWN_CLIENTS = 300  # of more the partition is shown in pixels
_GRID_CLASSES = 10  # of which all images are shown, at most
_STRIP_PIXELS = 64  # at least so many across an image


def write(folder: UPath) -> UPath:
  """Writes report.html into the folder of a run or of several.

  Args:
    folder: as `train`, `compare`, `sweep` or `influence` left it.

  Returns:
    Where the page is.

  Raises:
    cli.ArgumentError: if the folder holds none of them, or a damaged file.
  """
  if not (folder / 'config.json').exists():
    raise cli.ArgumentError(
      folder,
      'must be a folder that train, compare, sweep or influence has written to',
    )
  try:
    config = files.read_json(folder / 'config.json')['config']
    pages = {
      'compare': _of_comparison,
      'sweep': _of_sweep,
      'influence': _of_influence,
    }
    page = pages.get(config.get('program'), _of_run)(folder, config)
    text = render(page)
    text.encode()  # ValueError for half a character
  except (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    StopIteration,
    jinja2.TemplateError,
  ) as error:  # what files that somebody changed can come to
    raise cli.ArgumentError(
      folder,
      'has no evaluation yet, or a damaged file '
      f'({type(error).__name__}: {" ".join(str(error).split())})',
    ) from error
  path = folder / 'report.html'
  files.write_text(path, text)
  return path


def render(page: Mapping[str, Any]) -> str:
  """The page as HTML; what is not marked as safe is escaped."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent / 'templates'),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters['breakable'] = _breakable
  return environment.get_template('report.html').render(page)


def _breakable(text: str) -> markupsafe.Markup:
  """Text as HTML that may be broken where a name has its joints."""
  return markupsafe.Markup('<wbr>').join(re.split(r'(?<=[_:=+,/])', text))


def _of_run(folder, config) -> dict[str, Any]:
  """The page of one run: its models side by side."""
  del config
  run = reader.read(folder)
  entries = {
    title: [(run, model)]
    for title, model in rows_lib.different_models(run.rows).items()
  }
  clients = {
    '': {name: [(run, name)] for name in run.clients.get('accuracy', {})}
  }
  return {
    'title': f'{run.config["method"]} on {run.config["dataset"]}',
    'kind': 'Training run',
    'verdict': verdicts.of_run(run),
    'final': tables.final(entries, 'model'),
    'configuration': _configuration([run.config]),
    'differences': None,
    **_sections(entries, clients, {run.config['method']: [run]}),
  }


def _of_comparison(folder, config) -> dict[str, Any]:
  """The page of a comparison: the methods' broadcast models side by side."""
  summary = files.read_json(folder / 'summary.json')
  runs = _read_runs(
    folder,
    dict.fromkeys(summary['methods'], config['rounds']),
    summary['seeds'],
  )
  entries = _broadcast(runs)
  first = [of_name[0].config for of_name in runs.values()]
  return {
    'title': f'{len(runs)} methods on {config["dataset"]}'
    if len(runs) > 1
    else f'{next(iter(runs))} on {config["dataset"]}',
    'kind': 'Comparison',
    'verdict': verdicts.of_comparison(entries),
    'final': tables.final(entries, 'method', average=True),
    'configuration': _configuration(first),
    'differences': _differences(runs),
    **_sections(entries, _same_clients(runs), runs, summary['target_accuracy']),
  }


def _of_sweep(folder, config) -> dict[str, Any]:
  """The page of a sweep: all configurations, and the best few side by side."""
  del config
  summary = files.read_json(folder / 'summary.json')
  ended = [row for row in summary['configurations'] if not row['diverged']]
  rounds = {row['name']: row['rounds'] for row in ended[:_SHOWN_CONFIGURATIONS]}
  runs = _read_runs(folder, rounds, summary['seeds'])
  entries, swept = _broadcast(runs), summary['swept']
  configs = [
    files.read_json(
      folder
      / folders.folder_name(row['name'])
      / f'seed{summary["seeds"][0]}'
      / 'config.json'
    )['config']
    for row in ended
  ]
  page = _sections(
    entries, _same_clients(runs), runs, summary['target_accuracy']
  )
  counts = [of_name[0].counts.get('train') for of_name in runs.values()]
  if any(not np.array_equal(counts[0], other) for other in counts):  # type: ignore[arg-type]
    page['partition'] = None  # each has its own
  return {
    **page,
    'title': f'{len(summary["configurations"])} configurations: '
    + ', '.join(swept),
    'kind': 'Sweep',
    'verdict': verdicts.of_sweep(summary, len(ended)),
    'final': tables.Table(*statistics.sweep_table(summary)),
    'picture': svg.inline(
      'sweep',
      f'Accuracy by {" and ".join(swept)}; numbers in the table.',
      plots.sweep,
      swept,
      statistics.sweep_points(summary),
      statistics.LABELS[summary['sorted_by']],
    )
    if len(swept) in plots.SWEPT
    else None,
    'note': f'Below, of the {len(ended)} configurations the best {len(runs)}.'
    if len(ended) > len(runs)
    else None,
    'configuration': _configuration(configs, without=swept),
    'differences': _differences(runs),
  }


def _of_influence(folder, config) -> dict[str, Any]:
  """The page of clients' influence: the plain run, those without the worst
  clients, and what was estimated."""
  del config
  summary = files.read_json(folder / 'influence.json')
  shown = {influence.PLAIN: 'all clients'} | {
    f'{influence.WITHOUT}{name}': f'without the worst by {name}'
    for name in summary.get('cleansing', {})
    if name != influence.NOBODY
  }
  runs = {
    shown[name]: of_name
    for name, of_name in _read_runs(
      folder, dict.fromkeys(shown, summary['rounds']), summary['seeds']
    ).items()
  }
  entries, first = _broadcast(runs), next(iter(runs.values()))[0].config
  return {
    **_sections(entries, _same_clients(runs), runs),
    'title': f'Influence of {len(summary["clients"])} clients: '
    f'{first["method"]} on {first["dataset"]}',
    'kind': 'Influence of clients',
    'verdict': verdicts.of_influence(summary),
    'final': tables.final(entries, 'trained with'),
    'configuration': _configuration([first]),
    'differences': None,
    'influence': _influence(summary),
  }


def _influence(summary) -> dict[str, Any]:
  """Pictures and tables of the section on influence."""
  panels, by_round = influence.panels(summary), influence.by_round(summary)
  return {
    'tables': dict.fromkeys(influence.TABLES) | influence.tables_of(summary),
    'picture': panels
    and svg.inline(
      'influence',
      'Estimated influence of each client on the loss against retraining '
      'without it; the table has the numbers.',
      plots.estimates,
      panels,
    ),
    'by_round': by_round
    and svg.inline(
      'influence_by_round',
      'Agreement of the estimates with retraining, round by round.',
      plots.metrics,
      by_round,
    ),
    'legend': _legend(summary.get('by_round', ())),
  }


def _read_runs(folder, rounds, seeds) -> dict[str, list[reader.Recorded]]:
  """Each seed's run of each name in `rounds`, up to its round."""
  return {
    name: [
      reader.read(folder / folders.folder_name(name) / f'seed{seed}', t)
      for seed in seeds
    ]
    for name, t in rounds.items()
  }


def _broadcast(runs) -> tables.Entries:
  return {
    name: [(run, 'broadcast') for run in of_name]
    for name, of_name in runs.items()
  }


def _same_clients(runs) -> dict[str, tables.Entries]:
  """By model of clients the methods that have it, in all their seeds."""
  models = [
    model
    for of_name in runs.values()
    for run in of_name
    for model in run.clients.get('accuracy', {})
  ]
  return {
    model: {
      name: [(run, model) for run in of_name]
      for name, of_name in runs.items()
      if all(model in run.clients.get('accuracy', {}) for run in of_name)
    }
    for model in dict.fromkeys(models)
  }


def _sections(entries, clients, runs, target=None) -> dict[str, Any]:
  """What runs and comparisons have in common; None for what there is not."""
  series = {
    name: [rows_lib.curve(run.rows, model) for run, model in of_name]
    for name, of_name in entries.items()
  }
  first = next(iter(runs.values()))[0]
  ylabel = 'test accuracy, percent'
  return {
    'picture': None,
    'note': None,
    'influence': None,
    'several': len(runs) > 1,
    'legend': _legend(entries),
    'curves': [
      svg.inline(
        f'curve{column}',
        f'Test accuracy against {what}; numbers in the tables.',
        plots.curve,
        series,
        ylabel,
        column,
      )
      for column, what in enumerate(('rounds', 'megabytes'))
    ],
    'seeds': len(next(iter(entries.values()))),
    'targets': tables.targets(entries, target),
    **_clients(clients),
    **_classes(entries),
    'partition': _partition_picture(first.counts),
    'partition_note': _partition_note(first),
    **_own_metrics(runs),
    'class_changes': _class_changes(runs),
    'strips': [
      (
        name,
        strip(run.images),
        nearest(run.nearest),
        grid(run.of_classes.get('x')),
      )
      for name, (run, *_) in runs.items()
      if run.images
    ],
    'curvature': tables.curvature(runs),
    'tensors': [
      (name, tables.curvature_by_tensor(run.hessian))
      for name, (run, *_) in runs.items()
      if run.hessian
    ],
    'times': tables.times(runs),
    'versions': first.versions,
  }


def _clients(groups: Mapping[str, tables.Entries]) -> dict[str, Any]:
  """A table for all, and for each group a picture of clients in order; of those
  whose clients have test examples."""
  groups = {
    group: {
      name: of_name
      for name, of_name in entries.items()
      if all(run.clients['summary'][model]['clients'] for run, model in of_name)
    }
    for group, entries in groups.items()
  }
  groups = {group: entries for group, entries in groups.items() if entries}
  return {
    'fairness': groups
    and tables.fairness(
      {
        ', '.join(filter(None, (name, group))): of_name
        for group, entries in groups.items()
        for name, of_name in entries.items()
      }
    ),
    'clients': [
      (
        group,
        _legend(entries),
        svg.inline(
          f'clients{i}',
          f'Accuracy of each client, from the worst to the best. {group}',
          plots.clients,
          _client_values(entries),
        ),
      )
      for i, (group, entries) in enumerate(groups.items())
    ],
  }


def _client_values(clients) -> dict[str, np.ndarray]:
  """By name all clients' accuracies in percent, of all seeds."""
  values = {
    name: np.concatenate(
      [
        np.array(run.clients['accuracy'][model], float)
        for run, model in of_name
      ]
    )
    for name, of_name in clients.items()
  }
  return {name: 100 * v[np.isfinite(v)] for name, v in values.items()}


def _classes(entries) -> dict[str, Any]:
  """Picture and table of the accuracy on each class, means over seeds."""
  values = {}
  for name, of_name in entries.items():
    found = [
      run.classes.get('accuracy', {}).get(model) for run, model in of_name
    ]
    if all(found):
      values[name] = 100 * np.mean(np.array(found, float), axis=0)
  if len({len(of_name) for of_name in values.values()}) != 1:  # none, or unlike
    return {'classes': None, 'classes_table': None, 'classes_legend': []}
  num_classes = len(next(iter(values.values())))
  return {
    'classes': svg.inline(
      'classes',
      'Accuracy on each class; the table has the numbers.',
      plots.classes,
      values,
    ),
    'classes_legend': _bar_legend(values),
    'classes_table': tables.Table(
      ['class', *values],
      [
        [
          str(c),
          *(
            f'{v[c]:.1f}' if np.isfinite(v[c]) else '–' for v in values.values()
          ),
        ]
        for c in range(num_classes)
      ],
    ),
  }


def _class_changes(runs) -> list[tuple[str, markupsafe.Markup]]:
  """By name what fine-tuning changes in each class, means over seeds."""
  pictures = []
  for i, (name, of_name) in enumerate(runs.items()):
    by_round = [
      {
        row['round']: row['class_change']
        for row in run.rows
        if 'class_change' in row
      }
      for run in of_name
    ]
    rounds = [t for t in by_round[0] if all(t in of_run for of_run in by_round)]
    if rounds:
      changes = 100 * np.mean(
        [np.array([of_run[t] for t in rounds], float) for of_run in by_round],
        axis=0,
      )
      pictures.append(
        (
          name,
          svg.inline(
            f'change{i}',
            f'{name}: what fine-tuning changes in the accuracy on each '
            'class, round by round.',
            plots.class_changes,
            rounds,
            changes,
          ),
        )
      )
  return pictures


def _own_metrics(runs) -> dict[str, Any]:
  """What is measured in each round beside accuracy, means over seeds."""
  names = dict.fromkeys(
    key
    for of_name in runs.values()
    for key in rows_lib.measures(of_name[0].rows[-1])
  )
  series = {}
  for key in names:
    curves = {
      name: _mean_points(of_name, key) for name, of_name in runs.items()
    }
    series[key] = {name: points for name, points in curves.items() if points}
  series = {key: curves for key, curves in series.items() if curves}
  if not series:
    return {'own': None, 'own_legend': []}
  shown = dict.fromkeys(name for curves in series.values() for name in curves)
  return {
    'own': svg.inline(
      'own',
      'What is measured beside accuracy, round by round.',
      plots.metrics,
      series,
    ),
    'own_legend': _legend(shown) if len(runs) > 1 else [],
  }


def _mean_points(of_name, key) -> list[tuple[int, float]]:
  """(round, mean over seeds) where every seed has a value."""
  values = [{row['round']: row.get(key) for row in run.rows} for run in of_name]
  return [
    (t, float(np.mean([v[t] for v in values])))
    for t in values[0]
    if all(v.get(t) is not None for v in values)
  ]


def strip(images: Mapping[int, np.ndarray]) -> list[tuple[int, str]]:
  """Some of the rounds, evenly spread, each with its images as a data URI.

  Args:
    images: [C, H, W, channels] uint8 by round.

  Returns:
    (round, image of all classes side by side), at most `_STRIP_ROUNDS`.
  """
  rounds = sorted(images)
  places = np.linspace(0, len(rounds) - 1, min(len(rounds), _STRIP_ROUNDS))
  return [
    (rounds[i], _side_by_side(images[rounds[i]]))
    for i in np.round(places).astype(int)
  ]


def nearest(found: Mapping[str, np.ndarray]) -> dict[str, str] | None:
  """What `scoring.nearest_real` found, as data URIs and a sentence."""
  if not found:
    return None
  return {
    'generated': _side_by_side(found['generated']),
    'real': _side_by_side(found['real']),
    'note': 'Labels of the real ones: '
    + ', '.join(map(str, found['label']))
    + (
      f'. Distances: {found["distance"].min():.2f} to '
      f'{found["distance"].max():.2f}; of a real image from the nearest other '
      f'one {float(found["between_real"]):.2f} (root mean square over pixels, '
      'normalised as for the model).'
    ),
  }


def grid(images: np.ndarray | None) -> str | None:
  """Images [C, n, H, W, channels] of any range as a data URI, a row for each of
  the first classes; None where there are none."""
  if images is None:
    return None
  images = np.nan_to_num(images[:_GRID_CLASSES], posinf=0, neginf=0)
  num_classes, per_class, height, width, channels = images.shape
  scaled = images_lib.scaled(images.reshape(-1, height, width, channels))
  rows = np.round(255 * scaled).astype(np.uint8).reshape(images.shape)
  return _side_by_side(
    rows.transpose(1, 0, 2, 3, 4).reshape(
      per_class, num_classes * height, width, channels
    )
  )


def _side_by_side(images) -> str:
  if images.shape[-1] != 3:
    images = images.mean(-1, keepdims=True).repeat(3, -1).astype(np.uint8)
  times = -(-_STRIP_PIXELS // images.shape[2])  # so that pixels stay sharp
  images = images.repeat(times, 1).repeat(times, 2)
  file = io.BytesIO()
  Image.fromarray(np.concatenate(list(images), axis=1)).save(
    file, 'PNG', optimize=True
  )
  return _data_uri(file.getvalue())


def _data_uri(png: bytes) -> str:
  return 'data:image/png;base64,' + base64.b64encode(png).decode()


def _legend(names: Iterable[str]) -> list[tuple[str, str]]:
  """(name, CSS of its sample) of lines."""
  return [
    (
      name,
      f'border-top: 3px {"dashed" if dashes == "--" else "solid"} '
      f'{plt_colors.to_hex(color)}',
    )
    for name, (color, dashes) in plots.line_styles(names).items()
  ]


def _bar_legend(names: Iterable[str]) -> list[tuple[str, str]]:
  """(name, CSS of its sample) of bars."""
  return [
    (
      name,
      f'height: .8rem; opacity: {opacity:g}; '
      f'background: {plt_colors.to_hex(color)}',
    )
    for name, (color, opacity) in plots.bar_styles(names).items()
  ]


def _partition_picture(counts) -> markupsafe.Markup | None:
  """Who holds what; of many clients in pixels, a line each is too much."""
  if not counts:
    return None
  counts, label = (
    counts['train'],
    ('Training examples of each class that each client holds.'),
  )
  if len(counts) <= _DRAWN_CLIENTS:
    return svg.inline('partition', label, plots.heatmap, counts)
  file = io.BytesIO()
  plots.heatmap(file, counts)
  return markupsafe.Markup('<img src="{}" alt="{}">').format(
    _data_uri(file.getvalue()), label
  )


def _partition_note(run) -> str:
  config = run.config
  kind = config['partition']
  if kind == 'dirichlet':
    kind = f'Dirichlet({config["dirichlet_alpha"]:g})'
  seed = config.get('partition_seed')
  return kind + ('' if seed is None else f', seed {seed}')


def _configuration(configs, without=()) -> list[tables.Table]:
  """What all of `configs` have in common, in two halves."""
  rows = [
    [name, _text(value)]
    for name, value in sorted(configs[0].items())
    if name not in without
    and all(config.get(name) == value for config in configs)
  ]
  half = -(-len(rows) // 2)
  return [
    tables.Table(['flag', 'value'], part)
    for part in (rows[:half], rows[half:])
    if part
  ]


def _differences(runs) -> tables.Table | None:
  """The flags in which methods differ; None if there is one method."""
  configs = {name: of_name[0].config for name, of_name in runs.items()}
  names = sorted({k for config in configs.values() for k in config})
  rows = [
    [
      name,
      *(
        _text(config[name]) if name in config else '–'
        for config in configs.values()
      ),
    ]
    for name in names
    if len({json.dumps(config.get(name)) for config in configs.values()}) > 1
  ]
  return tables.Table(['flag', *configs], rows) if rows else None


def _text(value) -> str:
  return f'{value:g}' if isinstance(value, float) else str(value)
