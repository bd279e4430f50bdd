import html
from html import parser
import json
import os
import re

import matplotlib as mpl
from matplotlib import figure as mpl_figure
from matplotlib import image as mpl_image
import pytest

from modelstock_jax.report import merge_tables
from modelstock_jax.report import merges
from modelstock_jax.report import page
from modelstock_jax.report import plots
from modelstock_jax.report import provenance
from modelstock_jax.report import summary
from modelstock_jax.report import tables
from modelstock_jax.training import config as config_lib


def _without_figures(workdir):
  return page.render(summary.read(workdir), {})


def _words(text):
  """What a reader sees, on one line."""
  body = text[text.index('<header>') : text.index('<script>')]
  return ' '.join(html.unescape(re.sub(r'<[^>]+>', ' ', body)).split())


def _row(text, name):
  """The cells of a line of a table, but for its heading."""
  found = re.search(
    rf'<tr><th scope="row">{re.escape(name)}</th>(.*?)</tr>', text
  )
  return [_plain(cell) for cell in re.findall(r'<td[^>]*>(.*?)</td>', found[1])]


def _plain(text):
  return html.unescape(re.sub(r'<[^>]+>', '', text))


def test_report_has_everything(comparison):
  path = page.write(comparison)
  assert path == comparison / 'report.html'
  text = path.read_text(encoding='utf-8')
  for name in ('scatter', 'merge_end', 'merge_epoch'):
    picture = mpl_image.imread(comparison / 'plots' / f'{name}.png')
    assert picture[..., :3].std() > 0.02
    assert (comparison / 'plots' / f'{name}.svg').is_file()
  assert text.count('<svg ') == 3
  assert page.write(comparison).read_text(encoding='utf-8') == text
  assert text.count('role="img" aria-label="') == 3
  words = _words(text)
  assert 'Model Stock on digits 2 models, 2 seeds' in words
  assert 'What is missing' not in words
  assert 'Highest on digits: Model Stock (end) (93.5 %).' in words
  assert _row(text, 'Hardware') == ['1 x abc']
  assert _row(text, '<code>merge.num_models</code>') == ['2']
  # Nothing but the files that are meant to be there.
  assert sorted(x.name for x in comparison.iterdir() if x.is_file()) == [
    'config.json',
    'metrics.jsonl',
    'report.html',
    'results.json',
    'run.json',
  ]


def test_accuracy_is_that_of_the_results(comparison):
  text = _without_figures(comparison)
  assert re.findall(r'<th scope="col">(.*?)</th>', text)[:6] == [
    'Method',
    'digits (test)',
    'Mean shift',
    'noise',
    'blur',
    'Cost',
  ]
  # Means of (92, 95), of (40, 45), of (70, 60) and of (10, 30), and their sd.
  assert _row(text, 'Model Stock (end)') == [
    '93.5 ± 2.1',
    '42.5 ± 3.5',
    '65.0 ± 7.1',
    '20.0 ± 14.1',
    '2',
  ]
  assert '<td><strong>93.5</strong>' in text
  assert '<td>92.0<small>' in text  # the fine-tuned model's is not bold


def test_nothing_is_asked_of_the_network(comparison):
  text = page.write(comparison).read_text('utf-8')
  # Names of XML, and of nothing else, look like addresses.
  assert set(re.findall(r'https?://[^"\' )]+', text)) == {
    'http://www.w3.org/2000/svg',
    'http://www.w3.org/1999/xlink',
  }
  assert set(re.findall(r'<link[^>]*>', text)) == {
    '<link rel="icon" href="data:,">'
  }
  assert not re.search(r'@import|url\((?!#)', text)
  ids = re.findall(r'\bid="([^"]+)"', text)
  assert len(ids) == len(set(ids))
  assert set(re.findall(r'href="#([^"]+)"', text)) <= set(ids)


def test_facts_are_those_of_the_run(comparison, monkeypatch):
  monkeypatch.setattr(
    provenance, 'here', lambda: pytest.fail('of this machine')
  )
  provenance.add(comparison, {'Hardware': '8 x <TPU>', 'Started': '2001'})
  text = _without_figures(comparison)
  assert '8 x &lt;TPU&gt;' in text
  assert 'Session 1' in text
  assert 'Session 2' in text


def test_unfinished_run(tmp_path, write_run, merge_line):
  lines = [
    {'step': 2, 'kind': 'train', 'loss': [1.5, 2.5], 'images_per_second': 30.0},
    {'step': 4, 'kind': 'validation', 'epoch': 1, 'accuracy': 0.5, 'n': 10},
    merge_line(1, 0.5),
  ]
  write_run(tmp_path, lines, 'merge.every=end', 'train.epochs=9', 'seed=3')
  text = page.write(tmp_path).read_text('utf-8')
  words = _words(text)
  assert 'What is missing The run is not finished: 1 of 9 epochs' in words
  assert 'Merged' not in words
  assert 'How it was made' not in words
  assert '2 models, seed 3' in words
  assert '30 images/s' in words
  assert _row(text, '1') == ['4', '50.00']
  assert [path.stem for path in (tmp_path / 'plots').glob('*.svg')] == [
    'training'
  ]


def test_periodic_run_has_its_merges(tmp_path, write_run, merge_line):
  lines = [merge_line(k, 0.2 * k, restarts=k < 4) for k in (2, 4)]
  write_run(tmp_path, lines, 'merge.every=2', 'train.epochs=4')
  text = _without_figures(tmp_path)
  assert 'Merged after every 2 epochs' in _words(text)
  # c = 0.4, 0.8: t = 0.8 / 1.4, 1.6 / 1.8.
  assert _row(text, '2')[-1] == '0.400 / 0.571'
  assert _row(text, '4')[-1] == '0.800 / 0.889'
  assert _row(text, '<code>head/<wbr>bias</code>') == [
    'head',
    'output',
    '0.800',
    '0.889',
  ]


def test_grid_lists_its_models(tmp_path, write_run):
  write_run(tmp_path, [], grid=True)
  models = [
    {'index': 0, 'learning_rate': 1.25e-5, 'status': 'finished'},
    {'index': 1, 'learning_rate': 0.5, 'status': 'diverged', 'mixup': 0.2},
  ]
  (tmp_path / 'grid.json').write_text(json.dumps({'models': models}))
  text = _without_figures(tmp_path)
  assert _row(text, '0') == ['1.25e-05', 'finished', '']
  assert _row(text, '1') == ['0.5', 'diverged', '0.2']


def test_figures_of_others_are_shown(comparison, monkeypatch):
  (comparison / 'plots').mkdir()
  svg = '<svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>'
  (comparison / 'plots' / 'thin_shell.svg').write_text(svg)
  (comparison / 'plots' / 'merge_7.svg').write_text(svg)  # of an earlier run
  with mpl.rc_context(plots.STYLE):
    plots.save(mpl_figure.Figure((3, 2)), comparison / 'plots' / 'wide')
  monkeypatch.setattr(page, '_LARGEST', len(svg))
  text = page.write(comparison).read_text('utf-8')
  assert '<h3>Thin shell</h3>' in text
  assert 'aria-label="Thin shell"' in text
  assert text.count('<svg ') == 4
  # Too large for an SVG.
  assert text.count('<img alt="Wide" src="data:image/png;base64,iVBOR') == 1
  assert text.count('<script>') == 1


def test_report_is_replaced_as_a_whole(comparison, monkeypatch):
  path = comparison / 'report.html'
  path.write_text('before')
  monkeypatch.setattr(os, 'replace', lambda *_: pytest.fail('replaced'))
  (comparison / 'results.json').write_text('[')
  with pytest.raises(ValueError, match=r'results\.json'):
    page.write(comparison)
  assert path.read_text() == 'before'


def _cells(table):
  """The cells of a table of the page, by the first of each row."""
  return {first: list(map(str, cells)) for first, *cells in table.rows}


def test_tables_of_merges(merge_line):
  end = merges.collect(
    [[merge_line(1, 0.5, head_bias=bias)] for bias in (0.2, 0.4)]
  )
  rows = _cells(merge_tables.by_kind(end))
  # Head: 0.5 (kernel) with 0.2 and with 0.4 (bias): 0.35 and 0.45, sd 0.07.
  # Ratios 2/3 with 1/3 and with 4/7: 0.5 and 0.619, 0.56 and sd 0.08; the
  # lowest is (1/3 + 4/7) / 2 = 0.45.
  assert rows['head'] == [
    '2',
    '0.40 ± 0.07',
    '0.56 ± 0.08',
    '0.45',
    '`head/bias`',
  ]
  attention = ['4', '0.50 ± 0.00', '0.67 ± 0.00', '0.67']
  assert rows['attention'] == [
    *attention,
    '`image/block_0/attention/qkv/kernel`',
  ]
  lines = [merge_line(k, 0.1 * k, restarts=True) for k in range(1, 8)]
  rows = _cells(merge_tables.by_epoch(merges.collect([lines]), short=True))
  # 0.2 / 1.1, 0.8 / 1.4, 1.4 / 1.7.
  for epoch, cell in (
    ('1', '0.100 / 0.182'),
    ('4', '0.400 / 0.571'),
    ('7', '0.700 / 0.824'),
  ):
    assert rows[epoch] == [cell] * 7


def test_number_of_models_is_that_of_the_run(comparison, rows):
  found = summary.read(comparison)
  config = config_lib.override(found.config, ['--config.merge.num_models=5'])
  text = page.render(found._replace(config=config), {})
  assert '5 models are fine-tuned' in text
  table = tables.accuracy(rows, num_models=5)
  assert _row(text, 'Model Stock (end)')[-1] == table.rows[1][-1] == '5'


SVG = (
  '<svg xmlns="http://www.w3.org/2000/svg" '
  'xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 300 200" '
  'width="300pt" height="200pt">%s</svg>'
)
VOID = {'meta', 'link', 'wbr', 'img'}


class _Nesting(parser.HTMLParser):
  """Finds tags that are not closed, or closed by another."""

  def __init__(self, text):
    super().__init__()
    self.open = []
    self.problems = []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    if tag not in VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    if not self.open or self.open.pop() != tag:
      self.problems.append((tag, self.getpos()))


def test_words_are_no_markup(comparison, rows):
  """Of names, sessions, models of a grid and titles of figures."""
  evil = '<script>alert("1")</script> " onload="x'
  found = summary.read(comparison)
  found = found._replace(
    rows=[row._replace(method=evil, seed=9) for row in rows[:1]] + rows,
    sessions=[{evil: evil}],
    grid=[{evil: evil}],
    missing=[evil],
  )
  figures = {evil: page.inline(SVG % '', evil, evil)}
  text = page.render(found, figures)
  assert text.count('alert(') == 8
  assert '<script>alert' not in text
  assert '" onload' not in text
  nesting = _Nesting(text)
  assert not nesting.problems + nesting.open


def test_links_to_sections(comparison):
  text = _without_figures(comparison)
  ids = re.findall(r'<section id="([^"]+)"', text)
  assert ids == re.findall(r'<a href="#([^"]+)"', text)
  assert ids[:3] == ['accuracy', 'findings', 'merge-end']
  assert "default-src 'none'" in text


def test_bars_stay_in_their_cell(tmp_path, write_run, merge_line):
  lines = [merge_line(4, 0.6, head_bias=-0.5, head_kernel=1.5)]
  write_run(tmp_path, lines, 'merge.every=end', 'train.epochs=4')
  text = _without_figures(tmp_path)
  # 2 c / (1 + c): -2, 1.2 and 0.75; a minus sign is none of a hyphen.
  for name, share, ratio in (
    ('bias', '0.000', '\N{MINUS SIGN}2.000'),
    ('kernel', '1.000', '1.200'),
  ):
    row = re.search(rf'<code>head/<wbr>{name}</code></th>(.*?)</tr>', text)
    assert f'--share: {share}">{ratio}</td>' in row[1]


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
