"""Makes matplotlib figures for files, without pyplot.

pyplot keeps a list of figures and shows them on a screen or in a notebook. That
state belongs to the user.
"""

from typing import Any

from etils import epy

with epy.lazy_imports():  # takes half a second
  import matplotlib
  from matplotlib import figure as figures


def subplots(
  nrows: int = 1,
  ncols: int = 1,
  *,
  figsize: tuple[float, float],
  layout: Any,
  **grid: Any,
) -> tuple[Any, Any]:
  """Makes a figure and its axes, as `pyplot.subplots` does."""
  figure = figures.Figure(figsize=figsize, layout=layout)
  return figure, figure.subplots(nrows, ncols, **grid)


def get_cmap(name: str) -> Any:
  """Returns the colour map of that name."""
  return matplotlib.colormaps[name]


def close(figure: Any) -> None:
  """Frees the memory of a figure."""
  figure.clear()
