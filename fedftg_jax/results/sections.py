"""The sections that all pages have in common: tables and pictures of runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedftg_jax.results import (
  flow,
  glossary,
  pictures,
  plots,
  statistics,
  svg,
  tables,
)
from fedftg_jax.results import rows as rows_lib
from fedftg_jax.results import styles as styles_lib

_CONFUSIONS = 3  # most frequent ones that are named
_OPEN = 6  # two rows; of more pictures of a kind the rest is folded away


def build(
  entries, clients, runs, target=None, like: Mapping[str, str] = {}
) -> dict[str, Any]:
  """Builds what all pages have in common; None for what a page lacks.

  Args:
    entries: what is compared.
    clients: by group what is compared client by client.
    runs: by method, those of all seeds.
    target: an accuracy that is shown in any case.
    like: by name the method whose style it has.
  """
  first = next(iter(runs.values()))[0]
  styles = styles_lib.of(
    [*entries, *runs, *(name for group in clients.values() for name in group)],
    like,
  )
  return {
    'conclusion': '',
    'tests': None,
    'base': None,
    'picture': None,
    'note': None,
    'influence': None,
    'several': len(runs) > 1,
    'open': _OPEN,
    'colors': [*zip(styles_lib.COLORS, styles_lib.DARK)],
    'legend': legend(_chosen(styles, entries)),
    **_curves(entries, styles),
    'seeds': len(next(iter(entries.values()))),
    'targets': tables.targets(entries, target),
    'flow': _flows(runs, styles),
    **_clients(clients, styles),
    'by_class': {
      name: found
      for name, found in (
        ('accuracy', _classes(entries, styles)),
        ('change', _class_change(entries, styles)),
      )
      if found
    },
    'confusion': _confusions(runs),
    'partition': _partition_picture(first),
    'partition_note': _partition_note(first),
    'own': _own_metrics(runs, styles),
    'own_legend': legend(_chosen(styles, runs)) if len(runs) > 1 else [],
    'class_changes': _class_changes(runs),
    'generated': _generated(runs),
    'curvature': tables.curvature(runs),
    'tensors': {
      name: tables.curvature_by_tensor(run.hessian)
      for name, (run, *_) in runs.items()
      if run.hessian
    },
    'times': tables.times(runs),
    'versions': first.versions,
  }


def _chosen(styles, names) -> dict[str, styles_lib.Style]:
  return {name: styles[name] for name in names}


_AXES = {
  'rounds': 'round',
  'megabytes': 'megabytes, up and down',
  'seconds': 'seconds of training',
}


def _curves(entries, styles) -> dict[str, Any]:
  """Draws accuracy against rounds, megabytes and seconds.

  Against costs, it finds the Pareto fronts, too.
  """
  bands = {
    axis: {
      name: statistics.band([_points(run, model, axis) for run, model in seeds])
      for name, seeds in entries.items()
    }
    for axis in _AXES
    if axis != 'seconds'
    or all(
      rows_lib.seconds(run.rows, run.timings)
      for seeds in entries.values()
      for run, _ in seeds
    )
  }
  fronts = {
    axis: statistics.front(of_axis)
    for axis, of_axis in bands.items()
    if axis != 'rounds' and _several_runs(entries)
  }
  return {
    'curves': {
      axis: svg.draw(
        f'curve-{axis}',
        f'Test accuracy against {_AXES[axis]}; numbers in the tables.',
        plots.curve,
        of_axis,
        styles,
        _AXES[axis],
        'test accuracy, percent',
        fronts.get(axis, ()),
      )
      for axis, of_axis in bands.items()
    },
    'fronts': {
      axis: tables.fronts(of_axis, axis) for axis, of_axis in fronts.items()
    },
  }


def _several_runs(entries) -> bool:
  """Tells whether these are several runs, or models of one run."""
  first = {id(seeds[0][0]) for seeds in entries.values()}
  return len(first) > 1


def _points(run, model, axis) -> list[tuple[int, float, float]]:
  """Lists points (round, place on an axis, accuracy in percent)."""
  points = rows_lib.curve(run.rows, model)
  if axis == 'megabytes':
    return points
  x = (
    [t for t, _, _ in points]
    if axis == 'rounds'
    else rows_lib.seconds(run.rows, run.timings)
  )
  return [(t, place, value) for (t, _, value), place in zip(points, x or ())]


def small_curve(name, label, bands, styles) -> svg.Picture:
  return svg.draw(name, label, plots.curve, bands, styles, 'round')


def _flows(runs, styles) -> dict[str, svg.Picture]:
  """Draws a round of each method; leaves out methods that are not known."""
  drawings: dict[str, svg.Picture] = {}
  for name, (run, *_) in runs.items():
    last = run.rows[-1]
    traffic = tuple(
      last[f'bytes_{way}'] / max(last['round'], 1) / 1e6
      for way in ('down', 'up')
    )
    try:
      steps = flow.of_config(run.config, traffic)
    except ValueError:  # a method of one's own, or of another version
      continue
    drawings[name] = flow.draw(steps, styles[name].color)
  return drawings


def _clients(groups: Mapping[str, tables.Entries], styles) -> dict[str, Any]:
  """Makes a table of all clients, and a picture of each group.

  What has no clients with test examples is left out.
  """
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
    'fairness': tables.fairness(
      {
        ', '.join(filter(None, (name, group))): of_name
        for group, entries in groups.items()
        for name, of_name in entries.items()
      }
    )
    if groups
    else None,
    'clients': {
      group: {
        'legend': legend(_chosen(styles, entries)),
        'picture': svg.draw(
          f'clients{i}',
          f'Accuracy of each client, from the worst to the best. {group}',
          plots.clients,
          _client_values(entries),
          styles,
        ),
      }
      for i, (group, entries) in enumerate(groups.items())
    },
  }


def _client_values(clients) -> dict[str, np.ndarray]:
  """Collects all clients' accuracies in percent, of all seeds, by name."""
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


def _classes(entries, styles) -> dict[str, Any] | None:
  """Shows the accuracy on each class, mean over seeds."""
  values = {}
  for name, of_name in entries.items():
    found = [
      run.classes.get('accuracy', {}).get(model) for run, model in of_name
    ]
    if all(found):
      values[name] = 100 * np.mean(np.array(found, float), axis=0)
  return _by_class(
    entries,
    styles,
    values,
    'accuracy',
    'Test accuracy on each class in percent, last evaluation',
    'test accuracy, percent',
  )


def _by_class(
  entries, styles, values, name, caption, ylabel, signed=False
) -> dict[str, Any] | None:
  """Makes legend, picture and table of a percentage of each class.

  None if there are no values, or if the numbers of classes differ.
  """
  if len({len(of_name) for of_name in values.values()}) != 1:
    return None
  first, _ = next(iter(entries.values()))[0]
  names = first.class_names(len(next(iter(values.values()))))
  label = f'{caption}; the table has the numbers.'
  return {
    'caption': caption,
    'legend': legend(_chosen(styles, values), area=True),
    'picture': svg.draw(
      f'class-{name}', label, plots.classes, values, names, styles, ylabel
    ),
    'table': tables.classes(values, names, signed),
  }


def _class_change(entries, styles) -> dict[str, Any] | None:
  """Shows how the accuracy on each class has changed.

  With several runs it is compared with that of the first entry, and with one
  run with that of its first evaluation.
  """
  (base_name, base), *others = entries.items()
  values, caption = {}, ''
  if _several_runs(entries):
    caption = f'Change of the accuracy on each class against {base_name}'
    for name, seeds in others:
      found = [
        [run.classes.get('accuracy', {}).get(model) for run, model in both]
        for both in zip(seeds, base)
      ]
      if all(all(pair) for pair in found):
        change = [np.subtract(*np.array(pair, float)) for pair in found]
        values[name] = 100 * np.mean(change, axis=0)
  else:
    rows = [row for row in base[0][0].rows if 'class_accuracy' in row]
    if len(rows) > 1:
      first, last = rows[0], rows[-1]
      caption = (
        f'Change of the accuracy on each class from round {first["round"]} to '
        f'{last["round"]}'
      )
      before, after = (
        np.array(row['class_accuracy'], float) for row in (first, last)
      )
      values[base_name] = 100 * (after - before)
  return _by_class(
    entries,
    styles,
    values,
    'change',
    f'{caption}, in points',
    'change, points',
    signed=True,
  )


def _confusions(runs) -> dict[str, dict[str, Any]]:
  """Shows which classes are taken for which, all seeds together."""
  found = {}
  for i, (name, of_name) in enumerate(runs.items()):
    counts = [run.classes.get('confusion') for run in of_name]
    if not all(counts):
      continue
    total = np.sum(np.array(counts, int), axis=0)
    names = of_name[0].class_names(len(total))
    found[name] = {
      'picture': svg.draw(
        f'confusion{i}',
        f'{name}: which classes are taken for which.',
        plots.confusion,
        total,
        names,
      ),
      'table': tables.confusion(total, names),
      'note': _most_confused(total, names),
    }
  return found


def _most_confused(counts: np.ndarray, names: Sequence[str]) -> str:
  """Names the most frequent confusions in a sentence."""
  shares = np.nan_to_num(plots.percent_of_rows(counts))
  np.fill_diagonal(shares, 0)
  order = np.argsort(-shares, axis=None, kind='stable')[:_CONFUSIONS]
  pairs = [np.unravel_index(place, shares.shape) for place in order]
  said = [
    f'{names[true]} as {names[taken]} ({shares[true, taken]:.1f} %)'
    for true, taken in pairs
    if shares[true, taken] > 0
  ]
  return f'Most often it classifies {", ".join(said)}.' if said else ''


def _class_changes(runs) -> dict[str, svg.Picture]:
  """Draws what fine-tuning changes in each class, mean over seeds."""
  drawn = {}
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
      drawn[name] = svg.draw(
        f'change{i}',
        f'{name}: what fine-tuning changes in the accuracy on each class, '
        'round by round.',
        plots.class_changes,
        rounds,
        changes,
        of_name[0].class_names(changes.shape[1]),
      )
  return drawn


def _own_metrics(runs, styles) -> dict[str, dict[str, Any]]:
  """Draws and explains what is measured in each round beside accuracy."""
  names = dict.fromkeys(
    key
    for of_name in runs.values()
    for key in rows_lib.measures(of_name[0].rows[-1])
  )
  found = {}
  for i, key in enumerate(names):
    bands = {
      name: statistics.band(
        [
          [
            (row['round'], row['round'], row[key])
            for row in run.rows
            if row.get(key) is not None
          ]
          for run in of_name
        ]
      )
      for name, of_name in runs.items()
    }
    bands = {name: of for name, of in bands.items() if len(of.rounds)}
    if bands:
      meaning = str(glossary.of_metric(key))
      found[key] = {
        'picture': small_curve(
          f'own{i}', f'{key}, round by round. {meaning}', bands, styles
        ),
        'meaning': meaning,
      }
  return found


def _generated(runs) -> dict[str, dict[str, Any]]:
  """Shows the images of the first seed's generator."""
  found = {}
  for name, (run, *_) in runs.items():
    if run.images:
      last = run.images[max(run.images)]
      names = run.class_names(run.data.get('num_classes') or len(last))
      found[name] = {
        'animation': pictures.animation(run.images),
        'names': ', '.join(names[: len(last)]),
        'strip': pictures.strip(run.images),
        'nearest': pictures.nearest(run.nearest, names),
        'grid': pictures.grid(run.of_classes.get('x')),
      }
  return found


def legend(styles: Mapping[str, styles_lib.Style], area: bool = False):
  """Lists names with samples of their lines, or of their areas."""
  return [(name, style.sample(area)) for name, style in styles.items()]


def _partition_picture(run) -> svg.Picture | None:
  """Draws how many examples of each class each client holds."""
  if 'train' not in run.counts:
    return None
  counts = run.counts['train']
  return svg.draw(
    'partition',
    'Training examples of each class that each client holds.',
    plots.heatmap,
    counts,
    run.class_names(counts.shape[1]),
  )


def _partition_note(run) -> str:
  config = run.config
  kind = config['partition']
  if kind == 'dirichlet':
    kind = f'Dirichlet({config["dirichlet_alpha"]:g})'
  seed = config.get('partition_seed')
  return kind + ('' if seed is None else f', seed {seed}')
