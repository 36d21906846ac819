"""Pictures as SVG: part of an HTML page, and a file beside it.

On the page they take its font and its text colour, light or dark, and scale
with it.
"""

from collections.abc import Callable
import io
import re
from typing import Any, NamedTuple
from xml.etree import ElementTree

from etils import epy
import markupsafe

from fedftg_jax.results import styles

with epy.lazy_imports():
  import matplotlib

_NAMESPACE = 'http://www.w3.org/2000/svg'
_LINK = 'http://www.w3.org/1999/xlink'
INK = '#0a0b0c'  # stands for the page's text colour; no picture uses it else
_STYLE = {
  'savefig.format': 'svg',
  'svg.fonttype': 'none',
  'svg.hashsalt': 'fedftg_jax',
  'savefig.transparent': True,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'font.size': 10,
  'grid.color': INK,
  **{
    name: INK
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


class Picture(NamedTuple):
  """One picture.

  Attributes:
    inline: an <svg> element, safe to put into a page.
    file: the text of an SVG file.
  """

  inline: markupsafe.Markup
  file: str

  def __html__(self) -> str:
    return str(self.inline)


def draw(name: str, label: str, into: Callable, *args: Any) -> Picture:
  """Draws a picture with matplotlib.

  Args:
    name: of the picture, a word that no other on the page has.
    label: what it shows, for those who do not see it.
    into: draws into a file, such as `plots.curve`: (file, *args).
    *args: the other arguments of `into`.
  """
  file = io.BytesIO()
  with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
    into(file, *args)
  root = ElementTree.fromstring(file.getvalue())
  _remove(root, 'metadata')  # it has the time
  text = ElementTree.tostring(root, encoding='unicode', xml_declaration=True)
  _remove(root, 'style')  # it would be one for the whole page
  _rename(root, name)
  for size in ('width', 'height', 'version'):
    root.attrib.pop(size, None)
  root.attrib |= {'role': 'img', 'aria-label': label}
  return Picture(themed(ElementTree.tostring(root, encoding='unicode')), text)


def themed(text: str) -> markupsafe.Markup:
  """Makes an SVG element take the colours of the page.

  Args:
    text: the element, safe; its colours are in attributes `style`.
  """
  return markupsafe.Markup(styles.themed(text).replace(INK, 'currentColor'))


def _remove(root, tag) -> None:
  for parent in list(root.iter()):
    for child in list(parent):
      if child.tag == f'{{{_NAMESPACE}}}{tag}':
        parent.remove(child)


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
