"""Colours, line styles and markers: a method looks the same in every picture.

The colours are those of Petroff, Accessible Color Sequences for Data
Visualization, arXiv:2107.02270 (eight colours). They are told apart with each
kind of colour blindness; those for dark paper were chosen by the same measure.
Where there are more methods than colours, markers tell them apart.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import markupsafe

COLORS = (
  '#1845fb',
  '#ff5e02',
  '#c849a9',
  '#c91f16',
  '#656364',
  '#578dff',
  '#adad7d',
  '#86c8dd',
)
# The same on dark paper.
DARK = (
  '#5a68f5',
  '#f28230',
  '#bd7cae',
  '#e01510',
  '#7d6e74',
  '#52acff',
  '#e0d384',
  '#86eafc',
)
# As matplotlib calls them, and as paths of an SVG around the origin.
_MARKERS = {
  'o': 'M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0',
  's': 'M-3-3h6v6h-6z',
  '^': 'M0-4L4 3H-4z',
  'D': 'M0-4L4 0L0 4L-4 0z',
  'v': 'M0 4L4-3H-4z',
  'P': 'M-1.3-4h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7v-2.6h2.7z',
}
_HATCHES = {'s': '\\\\\\\\', '^': '||||', 'D': '----', 'v': '++++', 'P': 'oo'}
_DASHES = {'-': '', '--': '7 4', ':': '2 3', '-.': '8 3 2 3'}
# The place of a method decides its colour and its marker. The first ones have a
# colour of their own; the later ones share one, but not that of FedAvg.
_METHODS = (
  'fed_avg',
  'fed_ftg',
  'scaffold',
  'fed_dyn',
  'fed_prox',
  'moon',
  'fed_df',
  'fed_nova',
  'fed_gen',
  'fed_ntd',
  'ditto',
  'p_fed_me',
  'q_fed_avg',
  'fed_df_public',
  'fed_mr',
  'fed_dm',
  'fed_zdas',
  'fed_lsd',
  'fed_align',
  'p_fed_bred',
  'fed_zdac',
  'kd_lwof',
  'running_average',
)
# What refines the model of another method changes the line, not the colour.
_REFINED = {'fed_ftg': '--', 'fed_df': ':', 'fed_df_public': ':'}


class Style(NamedTuple):
  """The look of a name in pictures.

  Attributes:
    color: as '#rrggbb'.
    dashes: of lines: '-', '--', ':' or '-.'.
    marker: of points, as matplotlib calls it.
  """

  color: str
  dashes: str
  marker: str

  @property
  def hatch(self) -> str | None:
    """The hatch of bars, if lines are not solid or markers not circles."""
    lines = {'-': '', '--': '////', ':': '....', '-.': 'xxxx'}[self.dashes]
    return (lines or _HATCHES.get(self.marker, '')) or None

  def sample(self, area: bool = False) -> markupsafe.Markup:
    """Draws a sample for the legend of a page, of a line or of an area."""
    dashes, color = _DASHES[self.dashes], themed(self.color)
    shape = (
      f'<line x1="1" x2="35" y1="7" y2="7" style="stroke: {color}" '
      f'stroke-width="2.5" stroke-dasharray="{dashes}"/>'
      f'<path d="{_MARKERS[self.marker]}" transform="translate(18 7)" '
      f'style="fill: {color}"/>'
    )
    if area:
      shape = (
        '<rect x="1" y="1" width="34" height="12" rx="2" '
        f'style="fill: {color}; stroke: {color}" '
        f'fill-opacity="{0.35 if self.hatch else 1}" '
        f'stroke-dasharray="{dashes}"/>'
      )
      if self.hatch and not dashes:
        shape += (
          f'<path d="{_MARKERS[self.marker]}" transform="translate(18 7)" '
          f'style="fill: {color}"/>'
        )
    return markupsafe.Markup(
      f'<svg class="sample" viewBox="0 0 36 14" aria-hidden="true">{shape}'
      '</svg>'
    )


def themed(text: str) -> str:
  """Replaces the colours in a text by variables of the page.

  The first is 'var(--c0)'; in the dark a page gives them other values.
  """
  for i, color in enumerate(COLORS):
    text = text.replace(color, f'var(--c{i})')
  return text


def of(names: Iterable[str], like: Mapping[str, str] = {}) -> dict[str, Style]:
  """Gives each name its style.

  A method has the same style whatever it is compared with, and so has a method
  with another one behind it ('scaffold+fed_ftg': the colour of SCAFFOLD,
  dashed). Names that are no methods, and a method that is there a second time
  with other flags, get the styles that are left, in their order.

  Args:
    names: all that are shown together.
    like: by name the method whose style it has, such as that of a run for its
      broadcast model.

  Returns:
    Styles by name, in the order of `names`; no two names have the same, but for
    those that `like` gives the same.
  """
  called = {name: like.get(name, name) for name in names}
  found: dict[str, Style] = {}
  # First come plain methods, whose style is nobody else's.
  for name in sorted(dict.fromkeys(called.values()), key=lambda n: ':' in n):
    style = _of_method(name.split(':')[0])
    if style and style not in found.values():
      found[name] = style
  for name in called.values():
    if name not in found:
      found[name] = _left(found.values())
  return {name: found[of_name] for name, of_name in called.items()}


def of_models(names: Iterable[str], method: str) -> dict[str, str]:
  """Maps the broadcast model to its method, as the argument `like` of `of`.

  Args:
    names: of the models of a run, such as 'broadcast = fine_tuned'.
    method: that of the run.
  """
  return {name: method for name in names if name.split(' = ')[0] == 'broadcast'}


def _of_method(text: str) -> Style | None:
  """Returns the style of a method or of several joined with +."""
  first, *more = text.split('+')
  if first not in _METHODS:
    return None
  dashes = '-'
  if more:
    dashes = next((_REFINED[part] for part in more if part in _REFINED), '-.')
  return _slot(_METHODS.index(first), dashes)


def _slot(place: int, dashes: str = '-') -> Style:
  """Returns the style at a place.

  First come all colours, then again and again all but the first, each time with
  the next marker.
  """
  markers, num = list(_MARKERS), len(COLORS)
  if place < num:
    return Style(COLORS[place], dashes, markers[0])
  turn, color = divmod(place - num, num - 1)
  marker = markers[(turn + 1) % len(markers)]
  return Style(COLORS[1 + color], dashes, marker)


def _left(taken: Iterable[Style]) -> Style:
  """Returns the first style that is not taken, of a free colour if any."""
  taken = list(taken)
  colors = {style.color for style in taken}
  if len(colors) < len(COLORS):
    return next(
      style for style in map(_slot, range(8)) if style.color not in colors
    )
  free = (
    _slot(place, dashes)
    for dashes in _DASHES
    for place in range(len(COLORS) + (len(COLORS) - 1) * (len(_MARKERS) - 1))
  )
  return next((style for style in free if style not in taken), taken[0])
