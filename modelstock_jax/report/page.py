"""A page of a single file: HTML that asks the network for nothing."""

from collections.abc import Sequence
import html
import re
from typing import NamedTuple
from xml.etree import ElementTree

from modelstock_jax.report import page_style

_SVG = 'http://www.w3.org/2000/svg'
_XLINK = 'http://www.w3.org/1999/xlink'

# What a figure consists of; all else (styles, which would be those of the
# whole page, metadata, scripts) is left out.
_SHAPES = {
  *('svg', 'g', 'defs', 'clipPath', 'use', 'symbol', 'title', 'desc', 'image'),
  *('path', 'rect', 'circle', 'ellipse', 'line', 'polyline', 'polygon'),
  *('text', 'tspan', 'linearGradient', 'radialGradient', 'stop', 'pattern'),
}
# Colours that turn with the page's, in the dark.
_COLORS = {
  '#000000': 'ink',
  'black': 'ink',
  '#ffffff': 'paper',
  'white': 'paper',
  '#e6e6e6': 'grid',
  '#444444': 'soft',
  '#666666': 'soft',
  '#888888': 'axis',
  '#0072b2': 'blue',
}
_COLOR = re.compile(r'(?<=[:\s"])(#[0-9a-f]{6}|black|white)(?=[;"])')


class Bar(NamedTuple):
  """A number of a table, drawn as well as written.

  Attributes:
    text: as written.
    share: 0..1, of the width.
  """

  text: str
  share: float


def text(words: str) -> str:
  """Escape words; of Markdown it knows **bold** and `code`.

  >>> text('**Model Stock** is `t < 1`')
  '<strong>Model Stock</strong> is <code>t &lt; 1</code>'
  """
  escaped = html.escape(words)
  escaped = re.sub(r'\*\*(.+?)\*\*', r'<strong>\1</strong>', escaped)
  # A path may be broken after a slash.
  return re.sub(
    r'`(.+?)`',
    lambda match: f'<code>{match[1].replace("/", "/<wbr>")}</code>',
    escaped,
  )


def paragraph(words: str) -> str:
  """Return a paragraph of `text`.

  >>> paragraph('a')
  '<p>a</p>'
  """
  return f'<p>{text(words)}</p>'


def note(words: str) -> str:
  """Return a paragraph of `text` in small print.

  >>> note('a')
  '<p class="note">a</p>'
  """
  return f'<p class="note">{text(words)}</p>'


def bullets(items: Sequence[str]) -> str:
  """Return a list of `text`.

  >>> bullets(['a', 'b'])
  '<ul><li>a</li><li>b</li></ul>'
  """
  return f'<ul>{"".join(f"<li>{text(item)}</li>" for item in items)}</ul>'


def table(
  caption: str,
  header: Sequence[str],
  lines: Sequence[Sequence[str | Bar]],
  *,
  kind: str = 'numbers',
) -> str:
  """Return a table; the first cell of each line is its heading.

  Args:
    caption: shown above it.
    header: titles of the columns, as `text` takes them.
    lines: cells, likewise. What follows a ' ± ' is set below the number.
    kind: 'numbers', or 'words' for columns of text.

  Returns:
    HTML that scrolls by itself where it is wider than the page.

  Raises:
    ValueError: if a line has not as many cells as the header.
  """
  wrong = [line for line in lines if len(line) != len(header)]
  if wrong:
    raise ValueError(
      f'{caption}: {len(header)} columns, but {len(wrong)} lines with another '
      f'number of cells, the first is {wrong[0]}.'
    )
  heads = ''.join(f'<th scope="col">{text(title)}</th>' for title in header)
  body = []
  for first, *cells in lines:
    name = first.text if isinstance(first, Bar) else first
    body.append(
      f'<tr><th scope="row">{text(name)}</th>{"".join(map(_cell, cells))}</tr>'
    )
  label = html.escape(caption)
  return (
    f'<div class="scroll" role="region" aria-label="{label}" tabindex="0">'
    f'<table class="{kind}"><caption><span>{text(caption)}</span></caption>'
    f'<thead><tr>{heads}</tr></thead>'
    f'<tbody>{"".join(body)}</tbody></table></div>'
  )


def folded(summary: str, *parts: str) -> str:
  """Return parts that open on a click on their summary.

  >>> print(folded('More', paragraph('b')))
  <details><summary>More</summary>
  <p>b</p>
  </details>
  """
  inner = '\n'.join(parts)
  return f'<details><summary>{text(summary)}</summary>\n{inner}\n</details>'


def section(name: str, title: str, *parts: str) -> str:
  """Return a part of the page with a heading.

  Args:
    name: for links to it.
    title: as `text` takes it.
    *parts: HTML; empty ones are left out.

  Returns:
    HTML.

  >>> print(section('end', 'The end', paragraph('b'), ''))
  <section id="end">
  <h2>The end</h2>
  <p>b</p>
  </section>
  """
  inner = '\n'.join(part for part in parts if part)
  return (
    f'<section id="{html.escape(name)}">\n<h2>{text(title)}</h2>\n{inner}\n'
    '</section>'
  )


def notice(title: str, items: Sequence[str]) -> str:
  """Return a coloured box with a list."""
  return (
    f'<aside><h2>{text(title)}</h2>\n{bullets(items)}</aside>' if items else ''
  )


def figure(name: str, alt: str, svg: str) -> str:
  """Return a figure, inline; it scrolls where the screen is too narrow.

  Args:
    name: of no other figure of the page.
    alt: a description for those who do not see it.
    svg: an SVG document.

  Returns:
    HTML.

  Raises:
    ValueError: if the document is not SVG.
  """
  return f'<figure class="scroll">{inline(svg, name, alt)}</figure>'


def inline(svg: str, name: str, alt: str) -> str:
  """Make an SVG document part of a page.

  Shapes alone are kept; ids get the name in front, as another figure may have
  the same; black, white and greys become those of the page.

  Args:
    svg: the document.
    name: of no other figure of the page.
    alt: in place of the picture.

  Returns:
    An <svg> element.

  Raises:
    ValueError: if it is not SVG.

  >>> empty = '<svg xmlns="http://www.w3.org/2000/svg"><script/></svg>'
  >>> inline(empty, 'a', 'b')
  '<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="b" />'
  """
  try:
    root = ElementTree.fromstring(svg)
  except ElementTree.ParseError as error:
    raise ValueError(f'figure {name}: is not XML: {error}.') from error
  if root.tag != f'{{{_SVG}}}svg':
    raise ValueError(f'figure {name}: is not SVG: its root is {root.tag}.')
  _clean(root, f'{name}-')
  box = root.get('viewBox')
  if box:  # its size is that of the page's column, up to half as much again
    width = float(box.split()[2])
    root.set('style', f'--width: {width:.0f}px')
    for size in ('width', 'height'):
      root.attrib.pop(size, None)
  root.set('role', 'img')
  root.set('aria-label', alt)
  ElementTree.register_namespace('', _SVG)
  ElementTree.register_namespace('xlink', _XLINK)
  return ElementTree.tostring(root, encoding='unicode')


def document(title: str, subtitle: str, parts: Sequence[str]) -> str:
  """Return a whole page.

  Args:
    title: plain words.
    subtitle: as `text` takes it.
    parts: HTML; empty ones are left out.

  Returns:
    HTML, of which no part comes from elsewhere: a policy forbids it.

  >>> 'src=' in document('A run', '', [])
  False
  """
  body = '\n'.join(part for part in parts if part)
  links = re.findall(r'<section id="([^"]+)">\s*<h2>(.+?)</h2>', body)
  contents = ''.join(f'<a href="#{name}">{head}</a>' for name, head in links)
  return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>
{page_style.STYLE}</style>
</head>
<body>
<header>
<h1>{html.escape(title)}</h1>
<p>{text(subtitle)}</p>
<nav aria-label="Contents">{contents}</nav>
</header>
<main>
{body}
</main>
<script>
{page_style.SCRIPT}</script>
</body>
</html>
"""


def _cell(cell: str | Bar) -> str:
  if isinstance(cell, Bar):
    share = min(max(cell.share, 0.0), 1.0)
    return (
      f'<td class="bar" style="--share: {share:.3f}">{text(cell.text)}</td>'
    )
  number, sign, spread = cell.partition(' ± ')
  if not sign:
    return f'<td>{text(cell)}</td>'
  best = number.startswith('**') and spread.endswith('**')
  if best:
    number, spread = f'{number}**', spread.removesuffix('**')
  return f'<td>{text(number)}<small> ± {text(spread)}</small></td>'


def _clean(element: ElementTree.Element, prefix: str) -> None:
  for child in list(element):
    if child.tag.removeprefix(f'{{{_SVG}}}') not in _SHAPES:
      element.remove(child)
    else:
      _clean(child, prefix)
  for key, value in list(element.attrib.items()):
    name = key.rpartition('}')[2]
    if name.startswith('on') or '}' in key.removeprefix(f'{{{_XLINK}}}'):
      del element.attrib[key]
    elif name == 'href':
      if value.startswith('#'):
        element.set(key, f'#{prefix}{value[1:]}')
      elif not value.startswith('data:image/'):
        del element.attrib[key]
    elif name == 'id':
      element.set(key, prefix + value)
    else:
      value = re.sub(r'url\(#', f'url(#{prefix}', value)
      element.set(key, _turn(value))


def _turn(value: str) -> str:
  """Replace colours by those of the page."""
  found = _COLOR.sub(
    lambda match: (
      f'var(--{_COLORS[match[0]]})' if match[0] in _COLORS else match[0]
    ),
    f'"{value}"',
  )
  return found[1:-1]
