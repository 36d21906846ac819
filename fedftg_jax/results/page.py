"""The page of a run, a comparison, a sweep or of influence: report.html.

One page that needs nothing else: no network, no scripts, pictures inside. In
the folder report/ beside it is every table as CSV and every picture as SVG.
"""

from collections.abc import Iterator, Mapping
import contextlib
import pathlib
import re
from typing import Any, NamedTuple
from urllib import parse

import jinja2
import markupsafe
import numpy as np
from upath import UPath

from fedftg_jax.configuration import folders
from fedftg_jax.results import (
  crate,
  glossary,
  influence,
  pictures,
  plots,
  reader,
  sections,
  statistics,
  svg,
  tables,
  verdicts,
)
from fedftg_jax.results import rows as rows_lib
from fedftg_jax.results import styles as styles_lib
from fedftg_jax.system import cli, files

FOLDER = 'report'  # beside the page, with tables and pictures
_SHOWN_CONFIGURATIONS = 8  # of a sweep, with their curves
_UNNAMED = '', 'picture', 'table', 'animation'  # not in the names of files


def write(folder: UPath) -> UPath:
  """Writes report.html into the folder of a run or of several.

  Beside it, in report/, it writes the tables as CSV and the pictures as SVG;
  and ro-crate-metadata.json, which says what all files of the folder are and
  where they come from.

  Args:
    folder: as `train`, `compare`, `sweep` or `influence` left it.

  Returns:
    Where the page is.

  Raises:
    cli.ArgumentError: if the folder holds none of them, or a damaged file.
  """
  folder = UPath(folder)
  if not (folder / 'config.json').exists():
    raise cli.ArgumentError(
      folder,
      'must be a folder that train, compare, sweep or influence has written to',
    )
  beside = folder / FOLDER
  if files.is_link(beside):
    raise cli.ArgumentError(beside, 'must be a folder of its own, not a link')
  with _damage_named(folder):
    config = files.read_json(folder / 'config.json')['config']
    pages = {
      'compare': _of_comparison,
      'sweep': _of_sweep,
      'influence': _of_influence,
    }
    page = pages.get(config.get('program'), _of_run)(folder, config)
    shown, exported = _exported(page)
    text = render({**shown, 'terms': _terms(page)})
    text.encode()  # ValueError for half a character
  for name, content in exported.items():
    files.write_bytes(beside / name, content)
  for name in files.names(beside):
    if name not in exported and name.endswith(('.csv', '.svg', '.png')):
      (beside / name).unlink(missing_ok=True)  # of an earlier page
  path = folder / 'report.html'
  files.write_text(path, text)
  with _damage_named(folder):
    crate.write(
      folder, page['title'], f'{page["verdict"]} {page["conclusion"]}'.strip()
    )
  return path


@contextlib.contextmanager
def _damage_named(folder: UPath) -> Iterator[None]:
  """Turns what damaged files come to into a line that names the folder."""
  try:
    yield
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


def render(page: Mapping[str, Any]) -> str:
  """Renders the page as HTML; what is not marked as safe is escaped."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent / 'templates'),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters['breakable'] = _breakable
  environment.filters['parts'] = lambda text: _breakable(text, ':+,')
  return environment.get_template('report.html').render(page)


def _breakable(text: str, joints: str = '_:=+,/') -> markupsafe.Markup:
  """Makes HTML of a name that may be broken at its joints."""
  parts = re.split(f'(?<=[{re.escape(joints)}])', text)
  return markupsafe.Markup('<wbr>').join(parts)


def _terms(page: Mapping[str, Any]) -> dict[str, str]:
  """Explains the words that a page's tables and sections use."""
  words = {
    term
    for term, section in (
      ('Pareto front', 'fronts'),
      ('rounds to a target', 'targets'),
      ('accuracy of a class', 'by_class'),
      ('confusion', 'confusion'),
      ('personalised', 'fairness'),
    )
    if page[section]
  }
  words.update(page['curves'])

  def collect(value):
    if isinstance(value, tables.Table):
      words.update(re.sub(r'^seed \d+$', 'seed', word) for word in value.header)
    elif isinstance(value, dict):
      for one in value.values():
        collect(one)

  collect(dict(page))
  return {name: str(of) for name, of in glossary.of_terms(words).items()}


class Shown(NamedTuple):
  """A table, a picture or an animation on the page, and its file beside it.

  Attributes:
    content: the table, the picture or the animation.
    href: the file's address, from the page.
  """

  content: tables.Table | svg.Picture | pictures.Animation
  href: str


def _exported(
  page: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, bytes]]:
  """Gives every table and picture of a page a file.

  Files are called by the place on the page, as in curves-rounds.svg.

  Returns:
    The page, with `Shown` for them; and by name the contents of the files.
  """
  contents: dict[str, bytes] = {}

  def shown(value, *place):
    if isinstance(value, dict):
      return {key: shown(one, *place, key) for key, one in value.items()}
    if isinstance(value, list):
      return [shown(one, *place, i + 1) for i, one in enumerate(value)]
    if isinstance(value, tables.Table):
      suffix, content = '.csv', value.csv.encode()
    elif isinstance(value, svg.Picture):
      suffix, content = '.svg', value.file.encode()
    elif isinstance(value, pictures.Animation):
      suffix, content = '.png', value.file
    else:
      return value
    words = (str(word) for word in place if word not in _UNNAMED)
    name = folders.folder_name('-'.join(words))
    while name + suffix in contents:
      name += '-'
    contents[name + suffix] = content
    return Shown(value, parse.quote(f'{FOLDER}/{name}{suffix}'))

  return {key: shown(value, key) for key, value in page.items()}, contents


def _of_run(folder, config) -> dict[str, Any]:
  """Builds the page of one run: its models side by side."""
  del config
  run = reader.read(folder)
  method = run.config['method']
  entries = {
    title: [(run, model)]
    for title, model in rows_lib.different_models(run.rows).items()
  }
  clients = {
    '': {name: [(run, name)] for name in run.clients.get('accuracy', {})}
  }
  like = styles_lib.of_models([*entries, *clients['']], method)
  return {
    'title': f'{method} on {run.config["dataset"]}',
    'kind': 'Training run',
    'verdict': verdicts.of_run(run),
    'final': tables.final(entries, 'model'),
    'settings': tables.settings({method: run.config}),
    **sections.build(entries, clients, {method: [run]}, like=like),
  }


def _of_comparison(folder, config) -> dict[str, Any]:
  """Builds the page of a comparison: the methods' broadcast models."""
  summary = files.read_json(folder / 'summary.json')
  runs = _read_runs(
    folder,
    dict.fromkeys(summary['methods'], config['rounds']),
    summary['seeds'],
  )
  entries = _broadcast(runs)
  finals = {
    name: tables.final_accuracies(of_name) for name, of_name in entries.items()
  }
  compared = len(runs) > 1
  tested = compared and len(summary['seeds']) > 1
  return {
    'title': f'{len(runs)} methods on {config["dataset"]}'
    if compared
    else f'{next(iter(runs))} on {config["dataset"]}',
    'kind': 'Comparison',
    'verdict': verdicts.of_comparison(entries),
    'final': tables.final(entries, 'method', average=True),
    'settings': tables.settings(_configs(runs)),
    **sections.build(
      entries, _same_clients(runs), runs, summary['target_accuracy']
    ),
    'conclusion': verdicts.conclusion(
      finals, [run.config for of_name in runs.values() for run in of_name]
    ),
    'tests': tables.differences(statistics.against(finals)) if tested else None,
    'base': next(iter(runs)),
  }


def _configs(runs) -> dict[str, dict[str, Any]]:
  """Returns the first seed's configuration of each name."""
  return {name: of_name[0].config for name, of_name in runs.items()}


def _of_sweep(folder, config) -> dict[str, Any]:
  """Builds the page of a sweep: all configurations, the best few in detail."""
  del config
  summary = files.read_json(folder / 'summary.json')
  ended = [row for row in summary['configurations'] if not row['diverged']]
  rounds = {row['name']: row['rounds'] for row in ended[:_SHOWN_CONFIGURATIONS]}
  runs = _read_runs(folder, rounds, summary['seeds'])
  entries, swept = _broadcast(runs), summary['swept']
  configs = {
    row['name']: files.read_json(
      folder
      / folders.folder_name(row['name'])
      / f'seed{summary["seeds"][0]}'
      / 'config.json'
    )['config']
    for row in ended
  }
  page = sections.build(
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
    'picture': svg.draw(
      'sweep',
      f'Accuracy by {" and ".join(swept)}; numbers in the table.',
      plots.sweep,
      swept,
      statistics.sweep_points(summary),
      statistics.LABELS[summary['sorted_by']],
    )
    if len(swept) in plots.SWEPT
    else None,
    'note': f'Below, the best {len(runs)} of the {len(ended)} configurations.'
    if len(ended) > len(runs)
    else None,
    'settings': {
      **tables.settings(_configs(runs)),
      'same': tables.settings(configs, without=swept)['same'],
    },
  }


def _of_influence(folder, config) -> dict[str, Any]:
  """Builds the page of clients' influence.

  It compares the plain runs with those without the worst clients.
  """
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
    **sections.build(entries, _same_clients(runs), runs),
    'title': f'Influence of {len(summary["clients"])} clients: '
    f'{first["method"]} on {first["dataset"]}',
    'kind': 'Influence of clients',
    'verdict': verdicts.of_influence(summary),
    'final': tables.final(entries, 'trained with'),
    'settings': tables.settings({'': first}),
    'influence': _influence(summary),
  }


def _influence(summary) -> dict[str, Any]:
  """Pictures and tables of the section on influence."""
  panels, by_round = influence.panels(summary), influence.by_round(summary)
  styles = styles_lib.of(summary.get('by_round', ()))
  return {
    'tables': dict.fromkeys(influence.TABLES) | influence.tables_of(summary),
    'panels': {
      title.partition(':')[0]: svg.draw(
        f'influence{i}',
        'Estimated influence of each client on the loss against retraining '
        'without it; the table has the numbers.',
        plots.estimates,
        {title: points},
      )
      for i, (title, points) in enumerate(panels.items())
    },
    'by_round': {
      title: sections.small_curve(
        f'agreement{i}',
        f'{title} at each evaluation.',
        {
          name: statistics.band([[(t, t, value) for t, value in points]])
          for name, points in series.items()
        },
        styles,
      )
      for i, (title, series) in enumerate(by_round.items())
    },
    'legend': sections.legend(styles),
  }


def _read_runs(folder, rounds, seeds) -> dict[str, list[reader.Recorded]]:
  """Reads each seed's run of each name, up to its round in `rounds`."""
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
  """Groups the methods by the models of clients that they have."""
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
