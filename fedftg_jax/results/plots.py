"""Pictures: curves, bars, maps, and a grid of generated images.

Each function draws one picture into a file: a path, or a binary file. Pictures
of several names take their styles from `styles.of`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import contextlib
from typing import Any, NamedTuple

from etils import epy
import numpy as np

from fedftg_jax.data import images as images_lib
from fedftg_jax.results import statistics
from fedftg_jax.results import styles as styles_lib
from fedftg_jax.results.statistics import Band
from fedftg_jax.results.styles import Style

# Half a second, which only a picture has to wait for.
with epy.lazy_imports():
  import matplotlib
  from matplotlib import colors as plt_colors
  from matplotlib import figure as plt_figure
  from matplotlib import lines, ticker

_POINTS = 400  # of a curve over clients, at most
_PANEL = (4.1, 3.1)  # inches; a picture that fits a phone and a column
_SMALL = (4.1, 2.3)
_WIDE_RANGE = 30  # costs that are so many times as high as others: logarithmic
_MANY_CLIENTS = 40  # from here on they are sorted
_ROWS = 500  # of a map of clients, at most; of more, neighbours are averaged
_TICKS = 8  # at most, of rounds
_MARKED = 10  # points of a curve, at most, that have a marker
_NUMBERED = 12  # classes, at most, whose confusions are written as numbers
_LABEL = 14  # letters of a class name, at most
_STYLE = {
  'text.parse_math': False,  # names are text
  'axes.axisbelow': True,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'grid.alpha': 0.18,
  'grid.linewidth': 0.7,
  'lines.linewidth': 1.8,
  'lines.markersize': 4.5,
  'hatch.linewidth': 0.6,
}


@contextlib.contextmanager
def _drawn(
  path: Any,
  size: tuple[float, float],
  rows: int = 1,
  columns: int = 1,
  dpi: int = 110,
  tight: bool = False,
  **layout: Any,
) -> Iterator[np.ndarray]:
  """Yields the axes [rows, columns] of a picture, which is then written.

  No state of matplotlib is changed, and no window is opened. With `tight`
  empty margins are cut off.
  """
  with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
    figure = plt_figure.Figure(figsize=size, layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False, **layout)
    yield axes
    figure.savefig(path, dpi=dpi, bbox_inches='tight' if tight else None)


def _grid(num: int, width: float, height: float) -> dict[str, Any]:
  """Arguments of `_drawn` for `num` panels of a size, three in a row."""
  columns = min(3, num)
  rows = -(-num // columns)
  return {
    'size': (width * columns, height * rows),
    'rows': rows,
    'columns': columns,
  }


def _hide(axes: Iterable[Any]) -> None:
  for one in axes:
    one.set_visible(False)


def curves(
  path: Any,
  series: Mapping[str, Sequence[Sequence[tuple[int, float, float]]]],
  ylabel: str,
  title: str = '',
  styles: Mapping[str, Style] | None = None,
) -> None:
  """Draws means over seeds against rounds and against megabytes.

  With several seeds a band reaches from the lowest to the highest.

  Args:
    path: where to write.
    series: by name, for each seed, the points (round, megabytes sent up and
      down, value).
    ylabel: what the values are.
    title: of the picture.
    styles: by name; None for those of `styles.of`.
  """
  styles = styles or styles_lib.of(series)
  by_round = {
    name: statistics.band([[(t, t, v) for t, _, v in seed] for seed in seeds])
    for name, seeds in series.items()
  }
  by_megabytes = {
    name: statistics.band(seeds)  # type: ignore[arg-type]
    for name, seeds in series.items()
  }
  with _drawn(path, (11, 4.2), 1, 2, sharey=True) as axes:
    left, right = axes[0]
    _draw_curves(left, by_round, styles)
    _draw_curves(right, by_megabytes, styles)
    _round_ticks(left, by_round.values())
    left.set(xlabel='round', ylabel=ylabel, title=title)
    right.set(xlabel='megabytes, up and down')
    right.legend(
      fontsize=8, loc='center left', bbox_to_anchor=(1.01, 0.5), frameon=False
    )


def curve(
  path: Any,
  bands: Mapping[str, Band],
  styles: Mapping[str, Style],
  xlabel: str,
  ylabel: str = '',
  front: Sequence[tuple[str, float, float]] = (),
) -> None:
  """Draws one quantity of each name, without a legend.

  Args:
    path: where to write.
    bands: by name.
    styles: by name.
    xlabel: what `Band.x` is; with 'round', ticks are where evaluations are.
    ylabel: what the values are; '' for a small picture whose caption says it.
    front: the Pareto front, see `statistics.front`; () to draw none.
  """
  with _drawn(path, _PANEL if ylabel else _SMALL) as axes:
    (one,) = axes.flat
    if front:
      _, x, y = zip(*front)
      right = max(curve.x.max() for curve in bands.values())
      one.plot(
        [*x, right],
        [*y, y[-1]],
        drawstyle='steps-post',
        color=matplotlib.rcParams['text.color'],
        linewidth=6,
        alpha=0.15,
        solid_joinstyle='round',
      )
    _draw_curves(one, bands, styles)
    if xlabel == 'round':
      _round_ticks(one, bands.values())
    elif _is_wide(np.concatenate([curve.x for curve in bands.values()])):
      one.set_xscale('log')
      one.xaxis.set_major_formatter('{x:g}')
    one.set(xlabel=xlabel, ylabel=ylabel)


def _is_wide(costs: np.ndarray) -> bool:
  return bool(0 < _WIDE_RANGE * costs.min() < costs.max())


def _draw_curves(axes, bands, styles) -> None:
  """Means with their markers, and bands where seeds differ."""
  for name, of_name in bands.items():
    style = styles[name]
    axes.plot(
      of_name.x,
      of_name.mean,
      style.dashes,
      color=style.color,
      label=name,
      marker=style.marker,
      markevery=max(1, -(-len(of_name.x) // _MARKED)),
      zorder=2.1 if style.dashes == '-' else 2.2,  # what is below is seen
    )
    if (of_name.low < of_name.high).any():
      axes.fill_between(
        of_name.x,
        of_name.low,
        of_name.high,
        alpha=0.15,
        color=style.color,
        linewidth=0,
      )
  axes.grid()


def _round_ticks(axes, bands) -> None:
  """Puts ticks where evaluations are."""
  axes.set_xticks(
    ticks_of(sorted({int(t) for curve in bands for t in curve.rounds}))
  )


def ticks_of(rounds: Sequence[int]) -> list[int]:
  """Chooses at most 8 of the evaluated rounds as ticks.

  All, if they are few; else multiples of a round number; and if there are too
  few of those, every second one, every third, and so on.
  """
  if len(rounds) <= _TICKS:
    return list(rounds)
  for step in (d * 10**e for e in range(9) for d in (1, 2, 5)):
    ticks = [t for t in rounds if t % step == 0]
    if _TICKS // 2 <= len(ticks) <= _TICKS:
      return ticks
  every = -(-len(rounds) // _TICKS)
  return list(rounds[every - 1 :: every])


def effects(path: Any, rows: Sequence[tuple[str, str, float, float]]) -> None:
  """Draws effects with their intervals, one line each, a colour for each group.

  Args:
    path: where to write.
    rows: (group, name, mean, half of the interval; infinite for none).
  """
  styles = styles_lib.of(row[0] for row in rows)
  with _drawn(path, (7, 0.26 * len(rows) + 1)) as grid:
    (axes,) = grid.flat
    for i, (group, _, mean, half) in enumerate(rows):
      axes.errorbar(
        mean,
        i,
        xerr=half if np.isfinite(half) else None,
        fmt=styles[group].marker,
        color=styles[group].color,
        markersize=4,
        capsize=2,
      )
    axes.axvline(0, color='0.5', linewidth=1)
    axes.set_yticks(
      range(len(rows)), [name for _, name, *_ in rows], fontsize=8
    )
    axes.legend(
      handles=[
        lines.Line2D(
          [],
          [],
          color=style.color,
          marker=style.marker,
          linestyle='',
          label=group,
        )
        for group, style in styles.items()
      ],
      fontsize=8,
    )
    axes.invert_yaxis()
    axes.grid(axis='x')
    axes.set(xlabel='effect of FedFTG on the final test accuracy, points')


def scatters(
  path: Any, panels: Mapping[str, Sequence[tuple[float, float]]], ylabel: str
) -> None:
  """Draws a panel of points for each title."""
  with _drawn(path, **_grid(len(panels), 3.4, 2.6), sharey=True) as grid:
    for axes, (title, points) in zip(grid.flat, panels.items()):
      axes.plot(
        *np.array(points).T,
        'o',
        markersize=3,
        alpha=0.6,
        color=styles_lib.COLORS[0],
      )
      axes.axhline(0, color='0.5', linewidth=1)
      axes.set_title(title, fontsize=9)
      axes.grid()
    _hide(grid.flat[len(panels) :])
    for axes in grid[:, 0]:
      axes.set_ylabel(ylabel)


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
  styles = styles_lib.of(n for p in drawn for n in (*p.series, *p.levels))
  layout = _grid(len(drawn), 4, 3.2)
  layout['size'] = (layout['size'][0] + 1.5, layout['size'][1])
  with _drawn(path, **layout) as grid:
    for axes, panel in zip(grid.flat, drawn):
      for name, points in panel.series.items():
        style = styles[name]
        axes.plot(
          *np.array(points).T,
          style.dashes,
          color=style.color,
          marker=style.marker,
        )
      for name, level in panel.levels.items():
        axes.axhline(level, color=styles[name].color, linestyle=':')
      axes.set(xlabel=xlabel, ylabel=panel.ylabel)
      axes.set_title(panel.title, fontsize=10)
      if panel.log:
        axes.set_yscale('log')
      axes.grid()
    _hide(grid.flat[len(drawn) :])
    samples: list[Any] = []
    for name, style in styles.items():
      sample = lines.Line2D(
        [], [], color=style.color, marker=style.marker, label=name
      )
      sample.set_linestyle(style.dashes)  # type: ignore[arg-type]
      samples.append(sample)
    place: Any = 'outside right center'
    grid[0, 0].figure.legend(
      handles=samples, loc=place, fontsize=8, frameon=False
    )


def estimates(
  path: Any, panels: Mapping[str, Sequence[tuple[float, float]]]
) -> None:
  """Draws estimates against true values, a panel for each title.

  A line shows where both are equal.

  Args:
    path: where to write.
    panels: by title, the points (true, estimate).
  """
  with _drawn(path, **_grid(len(panels), 3.4, 3.2)) as grid:
    for axes, (title, points) in zip(grid.flat, panels.items()):
      true, estimate = np.array(points).T
      axes.axline((0, 0), slope=1, color='0.5', linewidth=1)
      axes.plot(
        true, estimate, 'o', markersize=4, alpha=0.6, color=styles_lib.COLORS[0]
      )
      low, high = np.min(true), np.max(true)
      edge = 0.1 * (high - low) or 1e-6
      axes.set(xlim=(low - edge, high + edge), xlabel='retrained without')
      if np.abs(estimate).max() < 3 * np.abs(true).max():
        axes.set_ylim(
          min(low, estimate.min()) - edge, max(high, estimate.max()) + edge
        )
      axes.set_title(title, fontsize=8)
      axes.grid()
    _hide(grid.flat[len(panels) :])
    for axes in grid[:, 0]:
      axes.set_ylabel('estimated')


def clients(
  path: Any,
  values: Mapping[str, np.ndarray],
  styles: Mapping[str, Style] | None = None,
) -> None:
  """Draws each name's clients from the worst to the best.

  Args:
    path: where to write.
    values: by name, [N] accuracies in percent; those of all seeds together.
    styles: by name; None for those of `styles.of`.
  """
  styles = styles or styles_lib.of(values)
  with _drawn(path, _PANEL) as grid:
    (axes,) = grid.flat
    for name, of_name in values.items():
      style = styles[name]
      share = 100 * (np.arange(len(of_name)) + 0.5) / len(of_name)
      if len(of_name) > _POINTS:  # more cannot be seen
        share = 100 * (np.arange(_POINTS) + 0.5) / _POINTS
        of_name = np.percentile(of_name, share)
      axes.plot(
        share,
        np.sort(of_name),
        style.dashes,
        color=style.color,
        drawstyle='steps-mid',
        marker=style.marker,
        markevery=max(1, -(-len(of_name) // _MARKED)),
      )
    axes.set(
      xlabel='clients from worst to best, percent',
      ylabel='test accuracy, percent',
      xlim=(0, 100),
    )
    axes.grid()


def classes(
  path: Any,
  values: Mapping[str, Sequence[float]],
  names: Sequence[str],
  styles: Mapping[str, Style] | None = None,
  ylabel: str = 'test accuracy, percent',
) -> None:
  """Draws a group of bars for each class, one for each name.

  Args:
    path: where to write.
    values: by name, [C] in percent; NaN for classes without examples.
    names: [C] of the classes.
    styles: by name; None for those of `styles.of`.
    ylabel: what the values are.
  """
  styles, width = styles or styles_lib.of(values), 0.8 / len(values)
  with _drawn(path, _PANEL) as grid:
    (axes,) = grid.flat
    for i, (name, of_name) in enumerate(values.items()):
      style = styles[name]
      axes.bar(
        np.arange(len(of_name)) - 0.4 + i * width,
        of_name,
        width,
        align='edge',
        facecolor=plt_colors.to_rgba(style.color, 0.35 if style.hatch else 1),
        edgecolor=style.color,
        hatch=style.hatch,
        linewidth=0.5,
      )
    axes.axhline(0, color='0.5', linewidth=0.8)
    axes.set(ylabel=ylabel)
    _class_ticks(axes, names)
    axes.grid(axis='y')


def _class_ticks(axes, names, vertical: bool = False) -> None:
  """Writes the names of classes along an axis; of many, some numbers."""
  axis = axes.yaxis if vertical else axes.xaxis
  numbers = list(names) == [str(c) for c in range(len(names))]
  if numbers or len(names) > 20:
    axis.set_label_text('class')
  if len(names) > 20:
    axis.set_major_locator(ticker.MaxNLocator(10, integer=True))
    return
  short = [_short(name) for name in names]
  aslant = not vertical and max(map(len, short), default=0) > 3
  turned = {'rotation': 40, 'ha': 'right', 'rotation_mode': 'anchor'}
  axis.set_ticks(range(len(short)), short, **(turned if aslant else {}))


def _short(name: str) -> str:
  return name if len(name) <= _LABEL else name[: _LABEL - 1] + '…'


def class_changes(
  path: Any, rounds: Sequence[int], changes: np.ndarray, names: Sequence[str]
) -> None:
  """Draws which classes gain and which lose, round by round.

  Args:
    path: where to write.
    rounds: [R], of the evaluations.
    changes: [R, C] of accuracy, in points; NaN for classes without examples.
    names: [C] of the classes.
  """
  size = _PANEL[0], min(max(1.2 + 0.16 * len(names), 2.2), 5)
  most = max(np.nanmax(np.abs(changes), initial=0), 1)
  with _drawn(path, size) as grid:
    (axes,) = grid.flat
    image = axes.imshow(
      changes.T,
      aspect='auto',
      interpolation='nearest',
      vmin=-most,
      vmax=most,
      cmap=matplotlib.colormaps['RdBu'].with_extremes(bad='white'),
    )
    _class_ticks(axes, names, vertical=True)
    ticks = ticks_of(rounds)
    axes.set_xticks([list(rounds).index(t) for t in ticks], ticks)
    axes.set(xlabel='round')
    axes.figure.colorbar(image, ax=axes, label='change, points')


def confusion(path: Any, counts: np.ndarray, names: Sequence[str]) -> None:
  """Draws which classes are taken for which.

  Args:
    path: where to write.
    counts: [C, C] examples of each class (rows) by predicted class (columns).
    names: [C] of the classes.
  """
  shares, numbered = percent_of_rows(counts), len(names) <= _NUMBERED
  with _drawn(path, (4.1, 4.0)) as grid:
    (axes,) = grid.flat
    image = axes.imshow(
      shares,
      vmin=0,
      vmax=100,
      interpolation='nearest',
      cmap=matplotlib.colormaps['Blues'].with_extremes(bad='white'),
    )
    _class_ticks(axes, names)
    _class_ticks(axes, names, vertical=True)
    axes.set(xlabel='predicted class', ylabel='true class')
    if not numbered:
      axes.figure.colorbar(
        image, ax=axes, label='percent of the true class', shrink=0.8
      )
    else:
      for (row, column), share in np.ndenumerate(shares):
        if share >= 0.5:
          axes.text(
            column,
            row,
            f'{share:.0f}',
            ha='center',
            va='center',
            fontsize=8,
            color='white' if share > 55 else '#0a0b0d',
          )


def percent_of_rows(counts: np.ndarray) -> np.ndarray:
  """Shares [C, C] of each row in percent; NaN for a class without examples."""
  total = counts.sum(1, keepdims=True)
  return np.divide(
    100.0 * counts, total, out=np.full(counts.shape, np.nan), where=total > 0
  )


def heatmap(path: Any, counts: np.ndarray, names: Sequence[str] = ()) -> None:
  """Draws how many examples of each class each client holds, and its size.

  Few clients stand in their order. Many are sorted by the class that they have
  most of, and by how large a part of theirs that is, so that the picture shows
  the skew whatever order they came in. Of very many, a row is the mean of
  neighbours.

  Args:
    path: where to write.
    counts: [N, C] examples.
    names: [C] of the classes; () for numbers.
  """
  num_clients, num_classes = counts.shape
  many = num_clients > _MANY_CLIENTS
  if many:
    part = counts.max(1) / np.maximum(counts.sum(1), 1)
    counts = counts[np.lexsort((-part, counts.argmax(1)))]
  edges = np.linspace(0, num_clients, min(num_clients, _ROWS) + 1).astype(int)
  sums = np.add.reduceat(counts, edges[:-1])
  counts = sums / np.diff(edges)[:, None]
  height = min(max(1.2 + 0.12 * num_clients, 2.4), 4.6)
  most, least = max(counts.max(), 2), min(counts[counts > 0].min(initial=1), 1)
  layout: dict[str, Any] = {'width_ratios': (4, 1), 'sharey': True}
  with _drawn(path, (_PANEL[0], height), 1, 2, **layout) as grid:
    axes, beside = grid[0]
    image = axes.imshow(
      np.ma.masked_equal(counts, 0),
      aspect='auto',
      interpolation='nearest',
      cmap=matplotlib.colormaps['viridis_r'].with_extremes(bad='white'),
      norm=plt_colors.LogNorm(least, most),
      extent=(-0.5, num_classes - 0.5, num_clients - 0.5, -0.5),
    )
    _class_ticks(axes, names or [str(c) for c in range(num_classes)])
    axes.yaxis.set_major_locator(ticker.MaxNLocator(10, integer=True))
    axes.set(
      ylabel='client' + (', sorted by the class it has most of' if many else '')
    )
    beside.stairs(
      counts.sum(1),
      edges - 0.5,
      orientation='horizontal',
      fill=True,
      color='0.5',
    )
    beside.xaxis.set_major_locator(ticker.MaxNLocator(2, integer=True))
    beside.set(xlabel='examples', xlim=(0, None))
    ticks = [d * 10**e for e in range(-2, 9) for d in (1, 2, 5)]
    ticks = [tick for tick in ticks if least <= tick <= most]
    bar = axes.figure.colorbar(
      image, ax=[axes, beside], label='examples of a class'
    )
    bar.set_ticks(ticks, labels=[f'{tick:,}' for tick in ticks])
    bar.minorticks_off()


def generated(path: Any, images: np.ndarray, names: Sequence[str] = ()) -> None:
  """Draws generated images [C, n, H, W, channels], a row for each class.

  Args:
    path: where to write.
    images: of any range; each is scaled to its own.
    names: [C] of the classes; () for numbers.
  """
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
  size = per_class * 0.7 + 0.4, num_classes * 0.7 + 0.4
  with _drawn(path, size, dpi=100, tight=True) as grid:
    (axes,) = grid.flat
    axes.imshow(mosaic)
    axes.set_xticks([])
    axes.set_yticks(
      (np.arange(num_classes) + 0.5) * height,
      [*map(_short, names)] or [str(c) for c in range(num_classes)],
    )
    if not names:
      axes.set_ylabel('class')
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title('generated images, each scaled to its own range', fontsize=9)


def bars(
  path: Any, groups: Mapping[str, Mapping[str, float]], xlabel: str
) -> None:
  """Draws a panel of horizontal bars for each group.

  Args:
    path: where to write.
    groups: by group and name, the values.
    xlabel: what the values are.
  """
  styles = styles_lib.of(name for values in groups.values() for name in values)
  most = max(map(len, groups.values()), default=0)
  size = 3.6 * len(groups) + 0.6, max(3, 0.35 * most + 0.8)
  with _drawn(path, size, 1, len(groups)) as grid:
    for axes, (title, values) in zip(grid[0], groups.items()):
      for name, value in values.items():
        bar = axes.barh(name, value, color=styles[name].color)
        axes.bar_label(bar, fmt=' %.3g', fontsize=8)
      axes.set(title=title, xlabel=xlabel)
      axes.margins(x=0.2)
      axes.invert_yaxis()


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
  with _drawn(path, _PANEL) as grid:
    (axes,) = grid.flat
    if len(swept) == 1:
      _draw_line(axes, axis_values[0], {p[0][0]: p[1:] for p in points})
      axes.set(xlabel=swept[0], ylabel=label)
    else:
      image = _draw_map(axes, axis_values, points)
      axes.set(ylabel=swept[0], xlabel=swept[1])
      axes.figure.colorbar(image, label=label)


def _is_number(value) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _in_order(values: set) -> list:
  """Numbers ascending; else by name."""
  return sorted(
    values, key=lambda v: (not _is_number(v), v if _is_number(v) else str(v))
  )


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
    color=styles_lib.COLORS[0],
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
  axes.grid()


def _draw_map(axes, axis_values, points):
  """Draws a cell with its score for each pair of values."""
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
