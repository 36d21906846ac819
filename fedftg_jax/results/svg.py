"""matplotlib pictures as SVG that is part of an HTML page.

They take the page's font and its text colour, light or dark, and scale with it.
"""

from collections.abc import Callable
import io
import re
from typing import Any
from xml.etree import ElementTree

from etils import epy
import markupsafe

with epy.lazy_imports():
  import matplotlib

_NAMESPACE = 'http://www.w3.org/2000/svg'
_LINK = 'http://www.w3.org/1999/xlink'
_INK = '#0a0b0c'  # stands for the page's text colour; no picture uses it else
_STYLE = {
  'savefig.format': 'svg',
  'svg.fonttype': 'none',
  'svg.hashsalt': 'fedftg_jax',
  'savefig.transparent': True,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'font.size': 10,
  'grid.color': _INK,
  **{
    name: _INK
    for name in (
      'text.color',
      'axes.labelcolor',
      'axes.edgecolor',
      'xtick.color',
      'ytick.color',
    )
  },
}
ElementTree.register_namespace('', _NAMESPACE)
ElementTree.register_namespace('xlink', _LINK)


def inline(
  name: str, label: str, draw: Callable, *args: Any
) -> markupsafe.Markup:
  """A picture as an <svg> element.

  Args:
    name: of the picture, a word that no other on the page has.
    label: what it shows, for those who do not see it.
    draw: draws into a file, such as `plots.curve`: (file, *args).
    *args: the other arguments of `draw`.

  Returns:
    The element, safe to put into a page.
  """
  file = io.BytesIO()
  with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
    draw(file, *args)
  root = ElementTree.fromstring(file.getvalue())
  for parent in list(root.iter()):
    for child in list(parent):  # a <style> here would be one for the whole page
      if child.tag in (f'{{{_NAMESPACE}}}metadata', f'{{{_NAMESPACE}}}style'):
        parent.remove(child)
  _rename(root, name)
  for size in ('width', 'height', 'version'):
    root.attrib.pop(size, None)
  root.attrib |= {'role': 'img', 'aria-label': label}
  text = ElementTree.tostring(root, encoding='unicode')
  return markupsafe.Markup(text.replace(_INK, 'currentColor'))


def _rename(root, name) -> None:
  """Makes ids that are referred to unique on the page; the rest go."""
  text = ElementTree.tostring(root, encoding='unicode')
  used = set(re.findall(r'(?:url\(|href=")#([\w.-]+)', text))
  for element in root.iter():
    if element.get('id') in used:
      element.set('id', f'{name}-{element.get("id")}')
    else:
      element.attrib.pop('id', None)
    for key, value in element.attrib.items():
      if key == 'style':
        value = re.sub(r'font-family: [^;]*;? *', '', value)
        element.set(key, value)
      if key == f'{{{_LINK}}}href' and value.startswith('#'):
        element.set(key, f'#{name}-{value[1:]}')
      elif 'url(#' in value:
        element.set(key, value.replace('url(#', f'url(#{name}-'))
