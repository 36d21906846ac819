"""Converts the formulas of pages to MathML, for `mkdocs build`.

A formula is written in LaTeX, as GitHub shows it too: between dollar signs in a
line, or as a block fenced as `math`. MathML needs no script, no font and no
network.
"""

import html
import re

from latex2mathml import converter

_FORMULA = re.compile(
  r'<(?P<tag>span|div) class="arithmatex">'
  r'\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>',
  re.S,
)


def mathml(latex: str, display: str = 'block') -> str:
  """Converts a formula; a command that is not known stays in it as it is."""
  return converter.convert(latex.strip(), display=display)


def _replace(found: re.Match) -> str:
  tag = found['tag']
  display = {'span': 'inline', 'div': 'block'}[tag]
  made = mathml(html.unescape(found['latex']), display)
  if '\\' in made:
    raise ValueError(f'latex2mathml does not know all of {found["latex"]!r}')
  return f'<{tag} class="math">{made}</{tag}>'


def on_page_content(text: str, **kwargs) -> str:
  """Replaces the formulas of a page."""
  del kwargs
  return _FORMULA.sub(_replace, text)
