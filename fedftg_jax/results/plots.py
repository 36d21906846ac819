"""Pictures: curves, bars, who holds what, a grid of generated images."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epy
import numpy as np

from fedftg_jax.data import images as images_lib
from fedftg_jax.results import canvas as plt

# Half a second, which only a picture has to wait for.
with epy.lazy_imports():
  from matplotlib import colors as plt_colors
  from matplotlib import lines, ticker

_POINTS = 400  # of a curve over clients, at most
_PANEL = (5.4, 3.6)  # inches; a single picture that a phone shows well
_MANY_CLIENTS = 40  # from here on they are sorted
_MOST_ROWS = 500  # of a picture of clients; more are drawn as means of groups


def curves(
  path: Any,
  series: Mapping[str, Sequence[Sequence[tuple[int, float, float]]]],
  ylabel: str,
  title: str = '',
) -> None:
  """Draws each name's mean over seeds against rounds and against megabytes sent
  up and down, with a band of one standard deviation over several seeds.

  Args:
    path: where to write.
    series: by name, for each seed, the points (round, megabytes, value).
    ylabel: what the values are.
    title: of the picture.
  """
  figure, panels = plt.subplots(
    1, 2, figsize=(11, 4.2), sharey=True, layout='constrained'
  )
  for column, axes in enumerate(panels):
    _draw_curves(axes, series, column)
  panels[0].set(ylabel=ylabel, title=title)
  panels[1].legend(
    fontsize=8, loc='center left', bbox_to_anchor=(1.01, 0.5), frameon=False
  )
  figure.savefig(path, dpi=110)
  plt.close(figure)


def curve(path: Any, series: Mapping, ylabel: str, column: int) -> None:
  """Draws one panel of `curves`, without a legend: against rounds (column 0) or
  against megabytes (1)."""
  figure, axes = plt.subplots(figsize=_PANEL, layout='constrained')
  _draw_curves(axes, series, column)
  axes.set(ylabel=ylabel)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def metrics(path: Any, series: Mapping[str, Mapping[str, Sequence]]) -> None:
  """Draws a small panel for each metric, with a curve for each name.

  Args:
    path: where to write.
    series: by metric and name, the points (round, value); a mean over seeds.
  """
  columns = min(3, len(series))
  rows = -(-len(series) // columns)
  figure, panels = plt.subplots(
    rows,
    columns,
    figsize=(2.9 * columns, 1.9 * rows),
    squeeze=False,
    layout='constrained',
  )
  styles = line_styles(
    dict.fromkeys(name for curves_ in series.values() for name in curves_)
  )
  for axes, (title, curves_) in zip(panels.flat, series.items()):
    for name, points in curves_.items():
      color, dashes = styles[name]
      axes.plot(*np.array(points, float).T, dashes, color=color)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
  for axes in panels.flat[len(series) :]:
    axes.set_visible(False)
  for axes in panels[-1]:
    axes.set_xlabel('round')
  figure.savefig(path, dpi=110)
  plt.close(figure)


def effects(path: Any, rows: Sequence[tuple[str, str, float, float]]) -> None:
  """Draws effects with their intervals, one line each, a colour for each group.

  Args:
    path: where to write.
    rows: (group, name, mean, half of the interval; infinite for none).
  """
  color = {
    group: f'C{i}'
    for i, group in enumerate(dict.fromkeys(row[0] for row in rows))
  }
  figure, axes = plt.subplots(
    figsize=(7, 0.26 * len(rows) + 1), layout='constrained'
  )
  for i, (group, _, mean, half) in enumerate(rows):
    axes.errorbar(
      mean,
      i,
      xerr=half if np.isfinite(half) else None,
      fmt='o',
      color=color[group],
      markersize=4,
      capsize=2,
    )
  axes.axvline(0, color='0.5', linewidth=1)
  axes.set_yticks(range(len(rows)), [name for _, name, *_ in rows], fontsize=8)
  axes.legend(
    handles=[
      lines.Line2D([], [], color=c, marker='o', linestyle='', label=group)
      for group, c in color.items()
    ],
    fontsize=8,
  )
  axes.invert_yaxis()
  axes.grid(alpha=0.3, axis='x')
  axes.set(xlabel='effect of FedFTG on the final test accuracy, points')
  figure.savefig(path, dpi=110)
  plt.close(figure)


def scatters(
  path: Any, panels: Mapping[str, Sequence[tuple[float, float]]], ylabel: str
) -> None:
  """Draws a panel of points for each title."""
  columns = min(3, len(panels))
  rows = -(-len(panels) // columns)
  figure, grid = plt.subplots(
    rows,
    columns,
    figsize=(3.4 * columns, 2.6 * rows),
    squeeze=False,
    sharey=True,
    layout='constrained',
  )
  for axes, (title, points) in zip(grid.flat, panels.items()):
    axes.plot(*np.array(points).T, 'o', markersize=3, alpha=0.6)
    axes.axhline(0, color='0.5', linewidth=1)
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
  for axes in grid.flat[len(panels) :]:
    axes.set_visible(False)
  for axes in grid[:, 0]:
    axes.set_ylabel(ylabel)
  figure.savefig(path, dpi=110)
  plt.close(figure)


class Panel(NamedTuple):
  """One picture of several."""

  title: str
  ylabel: str
  series: Mapping[str, Sequence[tuple[float, float]]]  # points (x, y) by name
  levels: Mapping[str, float] = {}  # horizontal lines by name
  log: bool = False  # whether the y axis is logarithmic


def panels(path: Any, drawn: Sequence[Panel], xlabel: str) -> None:
  """Draws panels side by side, with one legend.

  Args:
    path: where to write.
    drawn: the panels; a name has the same style in all of them.
    xlabel: what their points are by.
  """
  columns = min(3, len(drawn))
  rows = -(-len(drawn) // columns)
  figure, grid = plt.subplots(
    rows,
    columns,
    figsize=(4 * columns + 1.5, 3.2 * rows),
    squeeze=False,
    layout='constrained',
  )
  names = dict.fromkeys(n for p in drawn for n in (*p.series, *p.levels))
  styles = line_styles(names)
  for axes, panel in zip(grid.flat, drawn):
    for name, points in panel.series.items():
      color, dashes = styles[name]
      axes.plot(*np.array(points).T, dashes, color=color, marker='.')
    for name, level in panel.levels.items():
      axes.axhline(level, color=styles[name][0], linestyle=':')
    axes.set(xlabel=xlabel, ylabel=panel.ylabel)
    axes.set_title(panel.title, fontsize=10)
    if panel.log:
      axes.set_yscale('log')
    axes.grid(alpha=0.3)
  for axes in grid.flat[len(drawn) :]:
    axes.set_visible(False)
  samples: list[Any] = []
  for name, (color, dashes) in styles.items():
    sample = lines.Line2D([], [], color=color, label=name)
    sample.set_linestyle(dashes)  # type: ignore[arg-type]
    samples.append(sample)
  place: Any = 'outside right center'
  figure.legend(handles=samples, loc=place, fontsize=8, frameon=False)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def estimates(
  path: Any, panels: Mapping[str, Sequence[tuple[float, float]]]
) -> None:
  """Draws a panel of points (true, estimate) for each title, with the line on
  which both are equal."""
  columns = min(3, len(panels))
  rows = -(-len(panels) // columns)
  figure, grid = plt.subplots(
    rows,
    columns,
    figsize=(max(3.4 * columns, 5), 3.2 * rows),
    squeeze=False,
    layout='constrained',
  )
  for axes, (title, points) in zip(grid.flat, panels.items()):
    true, estimate = np.array(points).T
    axes.axline((0, 0), slope=1, color='0.5', linewidth=1)
    axes.plot(true, estimate, 'o', markersize=4, alpha=0.6)
    low, high = np.min(true), np.max(true)
    edge = 0.1 * (high - low) or 1e-6
    axes.set(xlim=(low - edge, high + edge), xlabel='retrained without')
    if np.abs(estimate).max() < 3 * np.abs(true).max():
      axes.set_ylim(
        min(low, estimate.min()) - edge, max(high, estimate.max()) + edge
      )
    axes.set_title(title, fontsize=8)
    axes.grid(alpha=0.3)
  for axes in grid.flat[len(panels) :]:
    axes.set_visible(False)
  for axes in grid[:, 0]:
    axes.set_ylabel('estimated')
  figure.savefig(path, dpi=110)
  plt.close(figure)


def line_styles(names: Iterable[str]) -> dict[str, tuple[str, str]]:
  """Colour and dashes of each name, the same in all pictures of these names.

  A combination has the colour of its first part, dashed; where there is none,
  every second curve is dashed, since curves may lie on each other.
  """
  names = list(names)
  combined = any('+' in name for name in names)
  first_parts = list(dict.fromkeys(name.split('+')[0] for name in names))
  return {
    name: (
      f'C{first_parts.index(name.split("+")[0]) % 10}',
      '--' if ('+' in name if combined else i % 2) else '-',
    )
    for i, name in enumerate(names)
  }


def bar_styles(names: Iterable[str]) -> dict[str, tuple[str, float]]:
  """Colour and opacity of each name: as `line_styles`, paler where dashed if
  others have the colour."""
  styles = line_styles(names)
  colors = [color for color, _ in styles.values()]
  return {
    name: (color, 0.5 if dashes == '--' and colors.count(color) > 1 else 1.0)
    for name, (color, dashes) in styles.items()
  }


def _draw_curves(axes, series, column) -> None:
  """Means and bands against one column of the points."""
  styles = line_styles(series)
  for name, seeds in series.items():
    seeds = [{point[0]: point for point in seed} for seed in seeds]
    rounds = sorted(set.intersection(*map(set, seeds)))
    points = np.array([[seed[t] for t in rounds] for seed in seeds], float)
    mean, spread = (
      points.mean(0),
      points.std(0, ddof=1 if len(seeds) > 1 else 0),
    )
    color, dashes = styles[name]
    axes.plot(
      mean[:, column],
      mean[:, 2],
      dashes,
      color=color,
      label=name,
      marker='' if len(rounds) > 1 else 'o',
    )
    if len(seeds) > 1:
      axes.fill_between(
        mean[:, column],
        mean[:, 2] - spread[:, 2],
        mean[:, 2] + spread[:, 2],
        alpha=0.15,
        color=color,
        linewidth=0,
      )
  axes.set_xlabel(('round', 'megabytes, up and down')[column])
  if column == 0:
    axes.xaxis.set_major_locator(ticker.MaxNLocator(8, integer=True))
  axes.grid(alpha=0.3)


def clients(path: Any, values: Mapping[str, np.ndarray]) -> None:
  """Draws each name's clients from the worst to the best.

  Args:
    path: where to write.
    values: by name, [N] accuracies in percent; all seeds' in one.
  """
  figure, axes = plt.subplots(figsize=_PANEL, layout='constrained')
  styles = line_styles(values)
  for name, of_name in values.items():
    color, dashes = styles[name]
    share = 100 * (np.arange(len(of_name)) + 0.5) / len(of_name)
    if len(of_name) > _POINTS:  # more cannot be seen
      share = 100 * (np.arange(_POINTS) + 0.5) / _POINTS
      of_name = np.percentile(of_name, share)
    axes.plot(
      share,
      np.sort(of_name),
      dashes,
      color=color,
      drawstyle='steps-mid',
      marker='' if len(of_name) > 1 else 'o',
    )
  axes.set(
    xlabel='clients from worst to best, percent',
    ylabel='test accuracy, percent',
    xlim=(0, 100),
  )
  axes.grid(alpha=0.3)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def classes(path: Any, values: Mapping[str, Sequence[float]]) -> None:
  """Draws a group of bars per class, one for each name.

  Args:
    path: where to write.
    values: by name, [C] accuracies in percent; NaN for classes without
      examples.
  """
  figure, axes = plt.subplots(figsize=_PANEL, layout='constrained')
  styles, width = bar_styles(values), 0.8 / len(values)
  for i, (name, of_name) in enumerate(values.items()):
    color, opacity = styles[name]
    left = np.arange(len(of_name)) - 0.4 + i * width
    axes.bar(left, of_name, width, align='edge', color=color, alpha=opacity)
  axes.set(xlabel='class', ylabel='test accuracy, percent')
  axes.xaxis.set_major_locator(ticker.MaxNLocator(20, integer=True))
  axes.grid(alpha=0.3, axis='y')
  axes.set_axisbelow(True)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def class_changes(
  path: Any, rounds: Sequence[int], changes: np.ndarray
) -> None:
  """Draws which classes gain and which lose, round by round.

  Args:
    path: where to write.
    rounds: [R], of the evaluations.
    changes: [R, C] of accuracy, in points; NaN for classes without examples.
  """
  num_classes = changes.shape[1]
  figure, axes = plt.subplots(
    figsize=(_PANEL[0], min(max(1.2 + 0.16 * num_classes, 2.2), 6)),
    layout='constrained',
  )
  most = max(np.nanmax(np.abs(changes), initial=0), 1)
  image = axes.imshow(
    changes.T,
    aspect='auto',
    interpolation='nearest',
    vmin=-most,
    vmax=most,
    cmap=plt.get_cmap('RdBu').with_extremes(bad='white'),
  )
  axes.yaxis.set_major_locator(ticker.MaxNLocator(10, integer=True))
  places = np.unique(np.linspace(0, len(rounds) - 1, 10).astype(int))
  axes.set(
    xlabel='round',
    ylabel='class',
    xticks=places,
    xticklabels=[rounds[i] for i in places],
  )
  figure.colorbar(image, ax=axes, label='change, points')
  figure.savefig(path, dpi=110)
  plt.close(figure)


def heatmap(path: Any, counts: np.ndarray) -> None:
  """Draws how many examples of each class each client holds, and its size.

  Few clients stand in their order. Many are sorted by the class that they have
  most of, and by how large a part of theirs that is, so that the picture shows
  the skew whatever order they came in. Very many are then drawn as 500 groups
  of neighbours, each as the mean of its clients.

  Args:
    path: where to write.
    counts: [N, C] examples.
  """
  num_clients = len(counts)
  many = num_clients > _MANY_CLIENTS
  if many:
    part = counts.max(1) / np.maximum(counts.sum(1), 1)
    counts = counts[np.lexsort((-part, counts.argmax(1)))]
  if num_clients > _MOST_ROWS:
    edges = np.linspace(0, num_clients, _MOST_ROWS + 1).astype(int)
    sums = np.add.reduceat(counts, edges[:-1])
    counts = sums / np.diff(edges)[:, None]
  height = min(max(1.2 + 0.16 * num_clients, 2.4), 8)
  figure, (axes, beside) = plt.subplots(
    1,
    2,
    figsize=(_PANEL[0], height),
    width_ratios=(4, 1),
    sharey=True,
    layout='constrained',
  )
  most = max(counts.max(), 2)
  least = min(counts[counts > 0].min(initial=1), 1)
  image = axes.imshow(
    np.ma.masked_equal(counts, 0),
    aspect='auto',
    interpolation='nearest',
    cmap=plt.get_cmap('viridis_r').with_extremes(bad='white'),
    norm=plt_colors.LogNorm(least, most),
    extent=(-0.5, counts.shape[1] - 0.5, num_clients - 0.5, -0.5),
  )
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_locator(ticker.MaxNLocator(10, integer=True))
  axes.set(
    xlabel='class',
    ylabel='client' + (', sorted by the class it has most of' if many else ''),
  )
  beside.stairs(
    counts.sum(1),
    np.linspace(0, num_clients, len(counts) + 1) - 0.5,
    orientation='horizontal',
    fill=True,
    color='C0',
  )
  beside.xaxis.set_major_locator(ticker.MaxNLocator(2, integer=True))
  beside.set(xlabel='examples', xlim=(0, None))
  ticks = [d * 10**e for e in range(-2, 9) for d in (1, 2, 5)]
  ticks = [tick for tick in ticks if least <= tick <= most]
  bar = figure.colorbar(image, ax=[axes, beside], label='examples of a class')
  bar.set_ticks(ticks, labels=[f'{tick:,}' for tick in ticks])
  bar.minorticks_off()
  figure.savefig(path, dpi=110)
  plt.close(figure)


def generated(path: Any, images: np.ndarray) -> None:
  """Draws generated images [C, n, H, W, channels], one labelled row per
  class."""
  num_classes, per_class = images.shape[:2]
  images = images_lib.scaled(images.reshape(-1, *images.shape[2:]))
  if images.shape[-1] != 3:
    images = np.repeat(images.mean(-1, keepdims=True), 3, axis=-1)
  images = np.pad(images, ((0, 0), (0, 2), (0, 2), (0, 0)), constant_values=1)
  _, height, width, _ = images.shape
  mosaic = (
    images.reshape(num_classes, per_class, height, width, 3)
    .transpose(0, 2, 1, 3, 4)
    .reshape(num_classes * height, per_class * width, 3)
  )
  figure, axes = plt.subplots(
    figsize=(per_class * 0.7, num_classes * 0.7 + 0.4), layout='constrained'
  )
  axes.imshow(mosaic)
  axes.set(
    xticks=[], ylabel='class', yticks=(np.arange(num_classes) + 0.5) * height
  )
  axes.set_yticklabels(range(num_classes))  # type: ignore[arg-type]
  axes.tick_params(length=0)
  axes.spines[:].set_visible(False)
  axes.set_title('generated images, each scaled to its own range', fontsize=9)
  figure.savefig(path, dpi=100, bbox_inches='tight')
  plt.close(figure)


def bars(
  path: Any, groups: Mapping[str, Mapping[str, float]], xlabel: str
) -> None:
  """Draws a panel of horizontal bars per group.

  Args:
    path: where to write.
    groups: by group and name, the values.
    xlabel: what the values are.
  """
  figure, panels = plt.subplots(
    1,
    len(groups),
    figsize=(3.6 * len(groups) + 0.6, 3),
    squeeze=False,
    layout='constrained',
  )
  colors = {}
  for axes, (title, values) in zip(panels[0], groups.items()):
    for name, value in values.items():
      color = colors.setdefault(name, f'C{len(colors) % 10}')
      bar = axes.barh(name, value, color=color)
      axes.bar_label(bar, fmt=' %.3g', fontsize=8)
    axes.set(title=title, xlabel=xlabel)
    axes.margins(x=0.2)
    axes.invert_yaxis()
  figure.savefig(path, dpi=110)
  plt.close(figure)


SWEPT = 1, 2  # so many swept flags make a picture


def sweep(
  path: Any,
  swept: Sequence[str],
  points: Sequence[tuple[tuple, float, float]],
  label: str,
) -> None:
  """Draws a score by the values of one or two flags.

  Args:
    path: where to write.
    swept: the flags, one (points with bars of one standard deviation, joined
      where the values are numbers) or two (a map).
    points: (values of the flags, mean, standard deviation); a value is None
      where the flag does not matter, a mean NaN where there is none.
    label: what the score is.
  """
  axis_values = [
    _in_order({p[0][i] for p in points} - {None}) for i in range(len(swept))
  ]
  figure, axes = plt.subplots(figsize=_PANEL, layout='constrained')
  if len(swept) == 1:
    _draw_line(axes, axis_values[0], {p[0][0]: p[1:] for p in points})
    axes.set(xlabel=swept[0], ylabel=label)
  else:
    image = _draw_map(axes, axis_values, points)
    axes.set(ylabel=swept[0], xlabel=swept[1])
    figure.colorbar(image, label=label)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def _is_number(value) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _in_order(values: set) -> list:
  """Numbers ascending; else by name."""
  return sorted(values, key=lambda v: v if _is_number(v) else str(v))


def _draw_line(axes, values, scores) -> None:
  numbers = all(map(_is_number, values)) and len(values) > 1
  x = values if numbers else range(len(values))
  mean, spread = np.array([scores[v] for v in values], float).T
  axes.errorbar(
    x,
    mean,
    spread if spread.any() else None,
    capsize=3,
    marker='o',
    linestyle='-' if numbers else '',
  )
  for place in np.flatnonzero(np.isnan(mean)):
    axes.annotate(
      'diverged',
      (x[place], 0),
      xycoords=('data', 'axes fraction'),
      rotation=90,
      ha='center',
      va='bottom',
    )
  if numbers and min(values) > 0 and max(values) >= 8 * min(values):
    axes.set_xscale('log')
  _name_values(axes, x, values)
  axes.minorticks_off()
  axes.grid(alpha=0.3)


def _draw_map(axes, axis_values, points):
  """A cell per pair of values, with its score in it; the image is returned."""
  rows, columns = axis_values
  scores = np.full((len(rows), len(columns)), np.nan)
  diverged = np.zeros_like(scores, bool)
  for (row, column), mean, _ in points:
    # Where a flag does not matter the score is that of all its values.
    place = (
      slice(None) if row is None else rows.index(row),
      slice(None) if column is None else columns.index(column),
    )
    scores[place], diverged[place] = mean, np.isnan(mean)
  image = axes.imshow(scores, aspect='auto', cmap='viridis')
  for (i, j), score in np.ndenumerate(scores):
    text = '×' if diverged[i, j] else '' if np.isnan(score) else f'{score:.1f}'
    color = (
      None
      if np.isnan(score)
      else ('white' if image.norm(score) < 0.6 else 'black')
    )
    axes.text(j, i, text, ha='center', va='center', fontsize=8, color=color)
  _name_values(axes, range(len(columns)), columns)
  axes.set_yticks(range(len(rows)), labels=[str(v) for v in rows])
  return image


def _name_values(axes, places, values) -> None:
  """Values under the picture; long ones aslant."""
  labels = [str(v) for v in values]
  aslant = {'rotation': 25, 'ha': 'right'} if max(map(len, labels)) > 8 else {}
  axes.set_xticks(places, labels=labels, **aslant)
