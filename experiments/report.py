"""Makes report.html of a run, comparison or sweep, from the files in its folder.

  python -m experiments.report runs/demo

One page that needs nothing else: no network, no scripts, pictures inside. It is
written by `train`, `compare` and `sweep`; this makes it anew, also while a run
goes on.
"""

import base64
import io
import json
import pathlib
import re
from typing import Any, Iterable, Mapping, NamedTuple, Sequence

from etils import epy
import jinja2
import markupsafe
import numpy as np
from PIL import Image
from upath import UPath

from experiments import cli
from experiments import figures
from experiments import files
from experiments import folders
from experiments import plots
from experiments import records
from experiments import svg

with epy.lazy_imports():
  from matplotlib import colors as plt_colors

_STRIP_ROUNDS = 6  # rounds whose generated images are shown, at most
_TARGETS = (.5, .7, .8, .9, .95, .97, .98, .99)  # accuracies that count rounds
_SHOWN_TARGETS = 4
_SHOWN_CONFIGURATIONS = 8  # of a sweep, with their curves; colours are ten
_DRAWN_CLIENTS = 300  # of more the partition is shown in pixels
_STRIP_PIXELS = 64  # at least so many across an image


class Run(NamedTuple):
  """What a run's folder says, up to some round; {} where a file is missing."""
  config: dict[str, Any]
  versions: dict[str, str]
  rows: list[dict[str, Any]]  # metrics.jsonl, at least one
  timings: list[dict[str, Any]]
  clients: dict[str, Any]
  classes: dict[str, Any]
  counts: dict[str, np.ndarray]
  images: dict[int, np.ndarray]  # by round
  nearest: dict[str, np.ndarray]  # see `scoring.nearest_real`


class Table(NamedTuple):
  """Text: the first column names its row, the others are numbers."""
  header: Sequence[str]
  rows: Sequence[Sequence[str]]


# What is compared, by name: of each seed its run, and which of its models.
Entries = Mapping[str, Sequence[tuple[Run, str]]]


def main(folder: str) -> None:
  try:
    place = UPath(folder)
  except (ValueError, ImportError) as error:  # a store that is not known here
    raise cli.ArgumentError(folder, str(error)) from error
  print(f'written: {write(place)}')


def write(folder: UPath) -> UPath:
  """Writes report.html into the folder of a run, a comparison or a sweep.

  Args:
    folder: as `train`, `compare` or `sweep` left it.

  Returns:
    Where the page is.

  Raises:
    cli.ArgumentError: if the folder holds none of them.
  """
  try:
    config = files.read_json(folder / 'config.json')['config']
    pages = {'compare': _of_comparison, 'sweep': _of_sweep}
    page = pages.get(config.get('program'), _of_run)(folder, config)
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise cli.ArgumentError(
        folder, 'must be a folder that train, compare or sweep has written to, '
        f'with at least one evaluation ({" ".join(str(error).split())})') from error
  path = folder / 'report.html'
  files.write_text(path, render(page))
  return path


def render(page: Mapping[str, Any]) -> str:
  """The page as HTML; what is not marked as safe is escaped."""
  environment = jinja2.Environment(
      loader=jinja2.FileSystemLoader(
          pathlib.Path(__file__).parent / 'templates'),
      autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
      lstrip_blocks=True)
  environment.filters['breakable'] = _breakable
  return environment.get_template('report.html').render(page)


def _breakable(text: str) -> markupsafe.Markup:
  """Text as HTML that may be broken where a name has its joints."""
  return markupsafe.Markup('<wbr>').join(re.split(r'(?<=[_:=+,/])', text))


def read_run(folder: UPath, rounds: int | None = None) -> Run:
  """A run's files, up to `rounds` (None: all).

  Raises:
    OSError, ValueError, KeyError: if config.json or metrics.jsonl cannot be read.
  """
  saved = files.read_json(folder / 'config.json')

  def lines(name):
    path = folder / name
    rows = files.read_jsonl(path) if path.exists() else []
    return [row for row in rows if rounds is None or row['round'] <= rounds]

  rows = lines('metrics.jsonl')
  if not rows:
    raise ValueError(f'{folder}: no evaluation yet')

  def last(name):
    path = folder / name
    value = files.read_json(path) if path.exists() else {}
    return value if value.get('round') == rows[-1]['round'] else {}

  nearest_real = _arrays(folder / 'nearest.npz')
  if nearest_real and nearest_real['round'] != rows[-1]['round']:
    nearest_real = {}
  images = {int(name.removeprefix('round_')): a
            for name, a in _arrays(folder / 'generated.npz').items()}
  return Run(
      saved['config'], saved['versions'], rows, lines('timings.jsonl'),
      last('clients.json'), last('classes.json'), _arrays(folder / 'counts.npz'),
      {t: a for t, a in images.items() if t <= rows[-1]['round']},
      nearest_real)


def _arrays(path):
  return files.read_arrays(path) if path.exists() else {}


def _of_run(folder, config) -> dict[str, Any]:
  """The page of one run: its models side by side."""
  del config
  run = read_run(folder)
  entries = {name: [(run, model)] for name, model in _models(run).items()}
  clients = {'': {
      name: [(run, name)] for name in run.clients.get('accuracy', {})}}
  return {
      'title': f'{run.config["method"]} on {run.config["dataset"]}',
      'kind': 'Training run', 'verdict': _verdict_of_run(run),
      'final': final_table(entries, 'model'),
      'configuration': _configuration([run.config]), 'differences': None,
      **_sections(entries, clients, {run.config['method']: [run]})}


def _models(run) -> dict[str, str]:
  """A run's models by what to call them: those that are one have one name."""
  alike = {}
  for name in run.rows[-1]['accuracy']:
    values = json.dumps([row['accuracy'][name] for row in run.rows])
    alike.setdefault(values, []).append(name)
  return {' = '.join(names): 'broadcast' if 'broadcast' in names else names[0]
          for names in alike.values()}


def _of_comparison(folder, config) -> dict[str, Any]:
  """The page of a comparison: the methods' broadcast models side by side."""
  summary = files.read_json(folder / 'summary.json')
  runs = _read_runs(
      folder, dict.fromkeys(summary['methods'], config['rounds']), summary['seeds'])
  entries = _broadcast(runs)
  first = [of_name[0].config for of_name in runs.values()]
  return {
      'title': f'{len(runs)} methods on {config["dataset"]}' if len(runs) > 1
               else f'{next(iter(runs))} on {config["dataset"]}',
      'kind': 'Comparison', 'verdict': _verdict_of_comparison(entries),
      'final': final_table(entries, 'method', average=True),
      'configuration': _configuration(first),
      'differences': _differences(runs),
      **_sections(entries, _broadcast_clients(runs), runs,
                  summary['target_accuracy'])}


def _of_sweep(folder, config) -> dict[str, Any]:
  """The page of a sweep: all configurations, and the best few side by side."""
  del config
  summary = files.read_json(folder / 'summary.json')
  ended = [row for row in summary['configurations'] if not row['diverged']]
  rounds = {row['name']: row['rounds'] for row in ended[:_SHOWN_CONFIGURATIONS]}
  runs = _read_runs(folder, rounds, summary['seeds'])
  entries, swept = _broadcast(runs), summary['swept']
  configs = [files.read_json(
      folder / folders.folder_name(row['name']) / f'seed{summary["seeds"][0]}'
      / 'config.json')['config'] for row in ended]
  page = _sections(entries, _broadcast_clients(runs), runs,
                   summary['target_accuracy'])
  counts = [of_name[0].counts.get('train') for of_name in runs.values()]
  if any(not np.array_equal(counts[0], other) for other in counts):
    page['partition'] = None  # each has its own
  return {
      **page,
      'title': f'{len(summary["configurations"])} configurations: '
               + ', '.join(swept),
      'kind': 'Sweep', 'verdict': _verdict_of_sweep(summary, len(ended)),
      'final': Table(*figures.sweep_table(summary)),
      'picture': svg.inline(
          'sweep', f'Accuracy by {" and ".join(swept)}; numbers in the table.',
          plots.sweep, swept, figures.sweep_points(summary),
          figures.LABELS[summary['sorted_by']])
                 if len(swept) in plots.SWEPT else None,
      'note': f'Below, of the {len(ended)} configurations the best {len(runs)}.'
              if len(ended) > len(runs) else None,
      'configuration': _configuration(configs, without=swept),
      'differences': _differences(runs)}


def _verdict_of_sweep(summary, num_ended) -> str:
  """The best, and what its rank says."""
  best = summary['configurations'][0]
  final = figures.percent(best['final_accuracy'])
  if summary['sorted_by'] != 'final_accuracy':
    chosen = figures.percent(best[summary['sorted_by']])
    return (f'{best["name"]} ends highest on what is kept apart, at {chosen} %; '
            f'on the test set it has {final} %.')
  text = f'{best["name"]} ends highest, at {final} % test accuracy.'
  return text if num_ended == 1 else (
      f'{text} It was chosen on the test set, as the best of {num_ended}, which '
      'flatters it; --validation_share keeps data apart to choose on.')


def _read_runs(folder, rounds, seeds) -> dict[str, list[Run]]:
  """Each seed's run of each name in `rounds`, up to its round."""
  return {name: [read_run(folder / folders.folder_name(name) / f'seed{seed}', t)
                 for seed in seeds] for name, t in rounds.items()}


def _broadcast(runs) -> Entries:
  return {name: [(run, 'broadcast') for run in of_name]
          for name, of_name in runs.items()}


def _broadcast_clients(runs) -> dict[str, Entries]:
  return {model: {
      name: [(run, model) for run in of_name] for name, of_name in runs.items()
      if all(model in run.clients.get('accuracy', {}) for run in of_name)}
          for model in ('broadcast', 'personalised')}


def _sections(entries, clients, runs, target=None) -> dict[str, Any]:
  """What runs and comparisons have in common; None for what there is not."""
  series = {name: [[(row['round'], records.megabytes(row),
                     100 * row['accuracy'][model]) for row in run.rows]
                   for run, model in of_name] for name, of_name in entries.items()}
  first = next(iter(runs.values()))[0]
  ylabel = 'test accuracy, percent'
  return {
      'picture': None, 'note': None, 'several': len(runs) > 1,
      'legend': _legend(entries),
      'curves': [svg.inline(
          f'curve{column}', f'Test accuracy against {what}; numbers in the tables.',
          plots.curve, series, ylabel, column)
                 for column, what in enumerate(('rounds', 'megabytes'))],
      'seeds': len(next(iter(entries.values()))),
      'targets': targets_table(entries, target),
      **_clients(clients),
      **_classes(entries),
      'partition': _partition_picture(first.counts),
      'partition_note': _partition_note(first),
      **_own_metrics(runs),
      'class_changes': _class_changes(runs),
      'strips': [(name, strip(of_name[0].images), nearest(of_name[0].nearest))
                 for name, of_name in runs.items() if of_name[0].images],
      'times': times_table(runs),
      'versions': first.versions}


def final_table(entries: Entries, kind: str, average: bool = False) -> Table:
  """Accuracies in percent: final with every seed's, best, `average` the plain
  average of the models, and of broadcast models that on validation data."""
  validated = any('validation_accuracy' in run.rows[-1]
                  for of_name in entries.values() for run, _ in of_name)
  rows = []
  for name, of_name in entries.items():
    final = _final(of_name)
    row = [name, *([_on_validation(of_name)] if validated else []), _spread(final)]
    if average:
      row.append(_spread(_final([(run, 'average') for run, _ in of_name])))
    row.append(_spread([max(r['accuracy'][model] for r in run.rows)
                        for run, model in of_name]))
    rows.append([*row, *map(_percent, final)] if len(final) > 1 else row)
  seeds = [run.config['seed'] for run, _ in next(iter(entries.values()))]
  return Table(
      [kind, *(['on validation data'] if validated else []), 'final',
       *(['plain average'] if average else []), 'best',
       *([f'seed {seed}' for seed in seeds] if len(seeds) > 1 else [])], rows)


def targets_table(entries: Entries, target: float | None = None) -> Table | None:
  """Rounds and megabytes to the first evaluation at each target.

  Args:
    entries: what to compare.
    target: one that is shown in any case.

  Returns:
    The table, with the highest few targets that some run reaches; None if no
    run reaches any.
  """
  best = max(row['accuracy'][model] for of_name in entries.values()
             for run, model in of_name for row in run.rows)
  reached = [t for t in _TARGETS if t <= best][-_SHOWN_TARGETS:]
  targets = sorted({*reached, *([target] if target else [])})
  if not targets:
    return None
  return Table(
      ['', *(f'{100 * t:g} %' for t in targets)],
      [[name, *(_to_target(of_name, t) for t in targets)]
       for name, of_name in entries.items()])


def _to_target(of_name, target) -> str:
  """'14 (182 MB)': means over the seeds that get there, and how many do not."""
  found = [next(((row['round'], records.megabytes(row)) for row in run.rows
                 if row['accuracy'][model] >= target), None)
           for run, model in of_name]
  there = [point for point in found if point is not None]
  if not there:
    return 'never'
  rounds, megabytes = np.mean(there, axis=0)
  missed = len(found) - len(there)
  return f'{rounds:.1f}'.removesuffix('.0') + f' ({megabytes:.0f} MB)' + (
      f', {missed} of {len(found)} never' if missed else '')


def fairness_table(clients: Entries) -> Table:
  """How evenly accuracy falls to clients, means over seeds."""
  rows = []
  for name, of_name in clients.items():
    figures = [run.clients['summary'][model] for run, model in of_name]

    def mean(key, figures=figures):
      return np.mean([f[key] for f in figures])

    rows.append([name, *(_percent(mean(k)) for k in ('mean', 'worst', 'best')),
                 f'{1e4 * mean("variance"):.1f}', f'{mean("jain"):.3f}',
                 f'{mean("clients"):.4g}'])
  return Table(['', 'mean', 'worst 10 %', 'best 10 %', 'variance', 'Jain index',
                'clients'], rows)


def _clients(groups: Mapping[str, Entries]) -> dict[str, Any]:
  """A table for all, and for each group a picture of clients in order; of those
  whose clients have test examples."""
  groups = {group: {
      name: of_name for name, of_name in entries.items()
      if all(run.clients['summary'][model]['clients'] for run, model in of_name)}
            for group, entries in groups.items()}
  groups = {group: entries for group, entries in groups.items() if entries}
  return {
      'fairness': groups and fairness_table({
          ', '.join(filter(None, (name, group))): of_name
          for group, entries in groups.items()
          for name, of_name in entries.items()}),
      'clients': [(group, _legend(entries), svg.inline(
          f'clients{i}', f'Accuracy of each client, from the worst to the best. '
          f'{group}', plots.clients, _client_values(entries)))
                  for i, (group, entries) in enumerate(groups.items())]}


def _client_values(clients) -> dict[str, np.ndarray]:
  """By name all clients' accuracies in percent, of all seeds."""
  values = {name: np.array([x for run, model in of_name
                            for x in run.clients['accuracy'][model]], float)
            for name, of_name in clients.items()}
  return {name: 100 * v[np.isfinite(v)] for name, v in values.items()}


def _classes(entries) -> dict[str, Any]:
  """Picture and table of the accuracy on each class, means over seeds."""
  values = {}
  for name, of_name in entries.items():
    found = [run.classes.get('accuracy', {}).get(model) for run, model in of_name]
    if all(found):
      values[name] = 100 * np.mean(np.array(found, float), axis=0)
  if len({len(of_name) for of_name in values.values()}) != 1:  # none, or unlike
    return {'classes': None, 'classes_table': None, 'classes_legend': []}
  num_classes = len(next(iter(values.values())))
  return {
      'classes': svg.inline('classes', 'Accuracy on each class; the table has the '
                            'numbers.', plots.classes, values),
      'classes_legend': _bar_legend(values),
      'classes_table': Table(['class', *values], [
          [str(c), *(f'{v[c]:.1f}' if np.isfinite(v[c]) else '–'
                     for v in values.values())] for c in range(num_classes)])}


def _class_changes(runs) -> list[tuple[str, markupsafe.Markup]]:
  """By name what fine-tuning changes in each class, means over seeds."""
  pictures = []
  for i, (name, of_name) in enumerate(runs.items()):
    by_round = [{row['round']: row['class_change'] for row in run.rows
                 if 'class_change' in row} for run in of_name]
    rounds = [t for t in by_round[0] if all(t in of_run for of_run in by_round)]
    if rounds:
      changes = 100 * np.mean([np.array(
          [of_run[t] for t in rounds], float) for of_run in by_round], axis=0)
      pictures.append((name, svg.inline(
          f'change{i}', f'{name}: what fine-tuning changes in the accuracy on each '
          'class, round by round.', plots.class_changes, rounds, changes)))
  return pictures


def _own_metrics(runs) -> dict[str, Any]:
  """What methods measure of themselves in each round, means over seeds."""
  names = dict.fromkeys(key for of_name in runs.values()
                        for key in of_name[0].rows[-1] if '/' in key)
  series = {}
  for key in names:
    curves = {name: _mean_points(of_name, key) for name, of_name in runs.items()}
    series[key] = {name: points for name, points in curves.items() if points}
  series = {key: curves for key, curves in series.items() if curves}
  if not series:
    return {'own': None, 'own_legend': []}
  shown = dict.fromkeys(name for curves in series.values() for name in curves)
  return {
      'own': svg.inline('own', 'What the methods measure of themselves, round by '
                        'round.', plots.metrics, series),
      'own_legend': _legend(shown) if len(runs) > 1 else []}


def _mean_points(of_name, key) -> list[tuple[int, float]]:
  """(round, mean over seeds) where every seed has a value."""
  values = [{row['round']: row.get(key) for row in run.rows} for run in of_name]
  return [(t, float(np.mean([v[t] for v in values]))) for t in values[0]
          if all(v.get(t) is not None for v in values)]


def times_table(runs: Mapping[str, Sequence[Run]]) -> Table:
  """Seconds per stage and rounds per second, means over seeds."""
  rows = []
  for name, of_name in runs.items():
    stages = [[sum(row.get(f'{stage}_seconds', 0.) for row in run.timings)
               for stage in ('train', 'evaluate', 'checkpoint', 'compile')]
              for run in of_name]
    seconds = np.mean(stages, axis=0)
    rounds = np.mean([run.rows[-1]['round'] for run in of_name])
    rows.append([name, *(f'{s:.1f}' for s in seconds),
                 f'{rounds / max(seconds[0], 1e-9):.3g}'])
  return Table(
      ['', 'train, s', 'evaluate, s', 'checkpoints, s', 'compile, s',
       'rounds per s'], rows)


def strip(images: Mapping[int, np.ndarray]) -> list[tuple[int, str]]:
  """Some of the rounds, evenly spread, each with its images as a data URI.

  Args:
    images: [C, H, W, channels] uint8 by round.

  Returns:
    (round, image of all classes side by side), at most `_STRIP_ROUNDS`.
  """
  rounds = sorted(images)
  places = np.linspace(0, len(rounds) - 1, min(len(rounds), _STRIP_ROUNDS))
  return [(rounds[i], _side_by_side(images[rounds[i]]))
          for i in np.round(places).astype(int)]


def nearest(found: Mapping[str, np.ndarray]) -> dict[str, str] | None:
  """What `scoring.nearest_real` found, as data URIs and a sentence."""
  if not found:
    return None
  return {
      'generated': _side_by_side(found['generated']),
      'real': _side_by_side(found['real']),
      'note': 'Labels of the real ones: ' + ', '.join(map(str, found['label'])) + (
          f'. Distances: {found["distance"].min():.2f} to '
          f'{found["distance"].max():.2f}; of a real image from the nearest other '
          f'one {float(found["between_real"]):.2f} (root mean square over pixels, '
          'normalised as for the model).')}


def _side_by_side(images) -> str:
  if images.shape[-1] != 3:
    images = images.mean(-1, keepdims=True).repeat(3, -1).astype(np.uint8)
  times = -(-_STRIP_PIXELS // images.shape[2])  # so that pixels stay sharp
  images = images.repeat(times, 1).repeat(times, 2)
  file = io.BytesIO()
  Image.fromarray(np.concatenate(list(images), axis=1)).save(
      file, 'PNG', optimize=True)
  return _data_uri(file.getvalue())


def _data_uri(png: bytes) -> str:
  return 'data:image/png;base64,' + base64.b64encode(png).decode()


def _legend(names: Iterable[str]) -> list[tuple[str, str]]:
  """(name, CSS of its sample) of lines."""
  return [(name, f'border-top: 3px {"dashed" if dashes == "--" else "solid"} '
           f'{plt_colors.to_hex(color)}')
          for name, (color, dashes) in plots.line_styles(names).items()]


def _bar_legend(names: Iterable[str]) -> list[tuple[str, str]]:
  """(name, CSS of its sample) of bars."""
  return [(name, f'height: .8rem; opacity: {opacity:g}; '
           f'background: {plt_colors.to_hex(color)}')
          for name, (color, opacity) in plots.bar_styles(names).items()]


def _partition_picture(counts) -> markupsafe.Markup | None:
  """Who holds what; of many clients in pixels, a line each is too much."""
  if not counts:
    return None
  counts, label = counts['train'], (
      'Training examples of each class that each client holds.')
  if len(counts) <= _DRAWN_CLIENTS:
    return svg.inline('partition', label, plots.heatmap, counts)
  file = io.BytesIO()
  plots.heatmap(file, counts)
  return markupsafe.Markup('<img src="{}" alt="{}">').format(
      _data_uri(file.getvalue()), label)


def _partition_note(run) -> str:
  config = run.config
  kind = config['partition']
  if kind == 'dirichlet':
    kind = f'Dirichlet({config["dirichlet_alpha"]:g})'
  seed = config.get('partition_seed')
  return kind + ('' if seed is None else f', seed {seed}')


def _verdict_of_run(run) -> str:
  final = {name: _final([(run, name)])[0] for name in run.rows[-1]['accuracy']}
  last = run.rows[-1]
  text = (f'{_percent(final["broadcast"])} % test accuracy (mean over the last '
          f'{records.FINAL_ROUNDS} rounds) after {last["round"]} rounds and '
          f'{records.megabytes(last):,.0f} MB.')
  if 'fine_tuned' in final:
    gain = 100 * (final['broadcast'] - final['average'])
    text += (f' The plain average of the clients\' models has '
             f'{_percent(final["average"])} %: what the server adds to it is worth '
             f'{gain:+.2f} points.'.replace('-', '−'))
  return text


def _verdict_of_comparison(entries) -> str:
  """Who ends highest, and whether that is more than the spread over seeds."""
  finals = {name: _final(of_name) for name, of_name in entries.items()}
  order = sorted(finals, key=lambda name: -np.mean(finals[name]))
  best = finals[order[0]]
  text = f'{order[0]} ends highest, at {_spread(best)} % test accuracy'
  if len(order) == 1:
    return f'{order[0]} ends at {_spread(best)} % test accuracy.'
  second = finals[order[1]]
  gap = 100 * (np.mean(best) - np.mean(second))
  text += f', {gap:.2f} points above {order[1]}'
  if len(best) == 1:
    return text + '. One seed each: whether that is chance cannot be said.'
  spread = 100 * max(np.std(best, ddof=1), np.std(second, ddof=1))
  return text + (
      f', {"more" if gap > spread else "no more"} than the spread over '
      f'{len(best)} seeds ({spread:.2f}).')


def _configuration(configs, without=()) -> list[Table]:
  """What all of `configs` have in common, in two halves."""
  rows = [[name, _text(value)] for name, value in sorted(configs[0].items())
          if name not in without
          and all(config.get(name) == value for config in configs)]
  half = -(-len(rows) // 2)
  return [Table(['flag', 'value'], part) for part in (rows[:half], rows[half:])
          if part]


def _differences(runs) -> Table | None:
  """The flags in which methods differ; None if there is one method."""
  configs = {name: of_name[0].config for name, of_name in runs.items()}
  names = sorted({k for config in configs.values() for k in config})
  rows = [[name, *(_text(config[name]) if name in config else '–'
                   for config in configs.values())]
          for name in names
          if len({json.dumps(config.get(name)) for config in configs.values()}) > 1]
  return Table(['flag', *configs], rows) if rows else None


def _on_validation(of_name) -> str:
  """As `_final`, which only the broadcast model is measured for."""
  values = [records.summarise(run.rows).get('final_validation_accuracy')
            if model == 'broadcast' else None for run, model in of_name]
  return '–' if None in values else _spread(values)


def _final(of_name) -> list[float]:
  """Each seed's mean over the last rounds, of one of its models."""
  return [records.summarise(run.rows)['final_accuracy_of'][model]
          for run, model in of_name]


def _spread(values) -> str:
  """Mean and, over several seeds, standard deviation, in percent."""
  text = _percent(np.mean(values))
  return text if len(values) == 1 else (
      f'{text} ± {_percent(np.std(values, ddof=1))}')


def _percent(value) -> str:
  return f'{100 * value:.2f}'


def _text(value) -> str:
  return f'{value:g}' if isinstance(value, float) else str(value)


if __name__ == '__main__':
  cli.run(main, argument='FOLDER')
