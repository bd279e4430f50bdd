from html import parser
import re

import pytest

from modelstock_jax.report import page

SVG = (
  '<svg xmlns="http://www.w3.org/2000/svg" '
  'xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 300 200" '
  'width="300pt" height="200pt">%s</svg>'
)
VOID = {'meta', 'link', 'wbr'}


class _Nesting(parser.HTMLParser):
  """Finds tags that are not closed, or closed by another."""

  def __init__(self):
    super().__init__()
    self.open = []
    self.problems = []

  def handle_starttag(self, tag, attrs):
    if tag not in VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    if not self.open or self.open.pop() != tag:
      self.problems.append((tag, self.getpos()))


def _problems(text):
  nesting = _Nesting()
  nesting.feed(text)
  return nesting.problems + nesting.open


@pytest.mark.parametrize(
  'part',
  [
    page.text,
    page.paragraph,
    page.note,
    lambda words: page.bullets([words]),
    lambda words: page.folded(words, ''),
    lambda words: page.section(words, words),
    lambda words: page.notice(words, [words]),
    lambda words: page.table(words, ['a', words], [[words, words]]),
    lambda words: page.table('a', ['a', 'b'], [['c', page.Bar(words, 0.5)]]),
    lambda words: page.inline(SVG % '', 'a', words),
    lambda words: page.document(words, words, []),
  ],
)
def test_words_are_no_markup(part):
  text = part('<script>alert("1")</script> " onload="x')
  assert 'alert(' in text
  assert '<script>alert' not in text
  assert '" onload' not in text
  assert not _problems(text)


def test_table_has_headings_and_its_numbers():
  text = page.table('Numbers', ['Method', 'x'], [['a', '**1.0 ± 0.5**']])
  assert '<caption><span>Numbers</span></caption>' in text
  assert '<th scope="col">x</th>' in text
  assert '<th scope="row">a</th>' in text
  assert '<td><strong>1.0</strong><small> ± 0.5</small></td>' in text
  with pytest.raises(ValueError, match='Numbers: 2 columns, but 1 lines'):
    page.table('Numbers', ['Method', 'x'], [['a', '1'], ['b']])


@pytest.mark.parametrize(
  ('share', 'drawn'), [(0.25, '0.250'), (-2.0, '0.000'), (1.5, '1.000')]
)
def test_bars_stay_in_their_cell(share, drawn):
  text = page.table('a', ['b', 'c'], [['d', page.Bar('e', share)]])
  assert f'--share: {drawn}' in text


def test_inline_keeps_figures_apart():
  shapes = (
    '<defs><path id="m1" d="M0 0"/><clipPath id="p1"/></defs>'
    '<g clip-path="url(#p1)"><use xlink:href="#m1"/></g>'
  )
  text = page.inline(SVG % shapes, 'one', 'Alt')
  assert set(re.findall(r'id="([^"]+)"', text)) == {'one-m1', 'one-p1'}
  assert 'href="#one-m1"' in text
  assert 'url(#one-p1)' in text
  assert 'width=' not in text  # as wide as there is room


def test_inline_takes_the_colours_of_the_page():
  shapes = (
    '<path style="fill: #000000; stroke: #d55e00"/><path stroke="#ffffff"/>'
  )
  text = page.inline(SVG % shapes, 'one', 'Alt')
  assert 'fill: var(--ink); stroke: #d55e00' in text
  assert 'stroke="var(--paper)"' in text


def test_inline_leaves_out_all_that_could_act():
  shapes = (
    '<script>1</script><style>*{}</style><foreignObject/><metadata/>'
    '<g onclick="x()"><use href="http://a.b/c"/><a href="javascript:x()"/></g>'
    '<image href="data:image/png;base64,AAAA"/>'
  )
  text = page.inline(SVG % shapes, 'one', 'Alt')
  for word in ('script', 'style>', 'foreign', 'metadata', 'onclick', 'a.b'):
    assert word not in text
  assert 'data:image/png' in text


@pytest.mark.parametrize(
  ('svg', 'message'),
  [('<svg', 'one: is not XML'), ('<p/>', 'one: is not SVG: its root is p')],
)
def test_inline_refuses(svg, message):
  with pytest.raises(ValueError, match=message):
    page.inline(svg, 'one', 'Alt')


def test_document_links_to_its_sections():
  parts = [page.section('a', 'First'), '', page.section('b', 'Second')]
  text = page.document('Title', 'sub', parts)
  assert '<a href="#a">First</a><a href="#b">Second</a>' in text
  assert "default-src 'none'" in text
  assert not _problems(text)
