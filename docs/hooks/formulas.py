"""Turns formulas into MathML while the site is built: no script, no network."""

import html
import re

from latex2mathml import converter
from mkdocs import exceptions

# What pymdownx.arithmatex leaves of $...$ and $$...$$.
_FORMULA = re.compile(
  r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL
)
_ARG = re.compile(r'\\arg\b')  # which the converter does not know
# Spaces as in TeX: none inside of bars, some round functions and relations.
_SPACES = (
  (
    r'<mo( stretchy="false")?>&#x0007C;</mo>',
    r'<mo\1 lspace="0" rspace="0">|</mo>',
  ),
  (r'<mi>(cos|exp|log)</mi>', r'<mo lspace="0.17em" rspace="0.17em">\1</mo>'),
  (r'<mi>&#x027C2;</mi>', '<mo>&#x027C2;</mo>'),
)


def to_mathml(latex: str, display: str) -> str:
  """One formula, as all browsers draw it.

  Args:
    latex: without dollars.
    display: 'inline' or 'block'.

  Returns:
    A `<math>` element.

  Raises:
    PluginError: if a command is not known: it would stand there as text.
  """
  text = converter.convert(
    _ARG.sub(r'\\mathrm{arg}\\,', latex), display=display
  )
  if '\\' in text:
    raise exceptions.PluginError(f'A formula with an unknown command: {latex}')
  for found, spaced in _SPACES:
    text = re.sub(found, spaced, text)
  return text


def on_page_content(content: str, **_) -> str:
  """Called by mkdocs with each page as HTML."""

  def replace(match: re.Match[str]) -> str:
    display = 'inline' if match[1] == 'span' else 'block'
    formula = to_mathml(html.unescape(match[2]).strip(), display)
    return formula if display == 'inline' else f'<p>{formula}</p>'

  return _FORMULA.sub(replace, content)
