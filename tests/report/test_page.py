import html
from html import parser
import json
import os
import re

import matplotlib as mpl
from matplotlib import figure as mpl_figure
from matplotlib import image as mpl_image
import pytest

from modelstock_jax.report import page
from modelstock_jax.report import plots
from modelstock_jax.report import provenance
from modelstock_jax.report import results
from modelstock_jax.report import summary
from modelstock_jax.report import tables
from modelstock_jax.training import config as config_lib


def _without_figures(workdir):
  return page.render(summary.read(workdir), {}, {})


def _words(text):
  """Return the words that a reader sees, on one line."""
  body = text[text.index('<header>') : text.index('<script>')]
  return ' '.join(html.unescape(re.sub(r'<[^>]+>', ' ', body)).split())


def _row(text, name):
  """The cells of a line of a table, but for its heading."""
  actual = re.search(
    rf'<tr><th scope="row">{re.escape(name)}</th>(.*?)</tr>', text
  )
  return [
    _plain(cell) for cell in re.findall(r'<td[^>]*>(.*?)</td>', actual[1])
  ]


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
  row = 'Model Stock (end) against Fine-tuned'
  assert _row(text, row) == ['+1.5 ± 0.7', '+2.5 ± 3.5']
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
  assert '<td><strong>93.5<small>' in text
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
  session = {'Hardware': '8 x <TPU>', 'Started': '2001'}
  sessions = [*provenance.read(comparison), session]
  (comparison / 'run.json').write_text(json.dumps(sessions))
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
  run = 'The run with seed=3 and merge.every=end'
  assert f'What is missing {run} is not finished: 1 of 9 epochs' in words
  assert 'Merged' not in words
  assert 'How it was made' not in words
  assert '2 models, seed 3' in words
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
  assert _row(text, '<code>head/<wbr>bias</code>') == ['0.800', '0.889']


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


def test_figures_of_others_are_shown(comparison):
  """As pixels: nothing in them can act."""
  (comparison / 'plots').mkdir()
  with mpl.rc_context(plots.STYLE):
    plots.save(mpl_figure.Figure((3, 2)), comparison / 'plots' / 'thin_shell')
  svg = '<svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>'
  (comparison / 'plots' / 'active.svg').write_text(svg)
  (comparison / 'plots' / 'merge_7.png').write_text('of an earlier run')
  text = page.write(comparison).read_text('utf-8')
  assert '<h3>Thin shell</h3>' in text
  assert re.findall('<img alt="(.*?)" src="(data:image/png;base64,iVBOR)', text)
  assert text.count('<img ') == 1
  assert text.count('<svg ') == 3
  assert text.count('<script>') == 1


def test_report_is_replaced_at_once(comparison, monkeypatch):
  path = comparison / 'report.html'
  path.write_text('before')
  monkeypatch.setattr(os, 'replace', lambda *_: pytest.fail('replaced'))
  (comparison / 'results.json').write_text('[')
  with pytest.raises(ValueError, match=r'results\.json'):
    page.write(comparison)
  assert path.read_text() == 'before'


def test_number_of_models_is_that_of_the_run(comparison, rows):
  actual = summary.read(comparison)
  config = config_lib.override(actual.config, ['--config.merge.num_models=5'])
  text = page.render(actual._replace(config=config), {}, {})
  assert '5 models are fine-tuned' in text
  table = tables.accuracy(rows, num_models=5)
  assert _row(text, 'Model Stock (end)')[-1] == table.rows[1][-1] == '5'


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
  """Escape names, sessions, models of a grid and names of figures."""
  evil = '<script>alert("1")</script> " onload="x'
  actual = summary.read(comparison)
  actual = actual._replace(
    rows=[row._replace(method=evil, seed=9) for row in rows[:1]] + rows,
    sessions=[{evil: evil}],
    grid=[{evil: evil}],
    missing=[evil],
  )
  text = page.render(actual, {}, {evil: 'data:,'})
  assert text.count('alert(') == 8
  assert '<script>alert' not in text
  assert '" onload' not in text
  nesting = _Nesting(text)
  assert not nesting.problems + nesting.open


def test_links_to_sections(comparison):
  text = _without_figures(comparison)
  ids = re.findall(r'<section id="([^"]+)"', text)
  assert ids == re.findall(r'<a href="#([^"]+)"', text)
  assert ids[:3] == ['accuracy', 'method', 'merge-end']
  assert "default-src 'none'" in text


def test_negative_ratios_have_a_minus_sign(tmp_path, write_run, merge_line):
  lines = [merge_line(4, 0.6, head_bias=-0.5, head_kernel=1.5)]
  write_run(tmp_path, lines, 'merge.every=end', 'train.epochs=4')
  text = _without_figures(tmp_path)
  # 2 c / (1 + c): -2, 1.2 and 0.75; a minus sign is none of a hyphen.
  minus = '\N{MINUS SIGN}'
  assert _row(text, '<code>head/<wbr>bias</code>') == [
    f'{minus}0.500',
    f'{minus}2.000',
  ]
  assert _row(text, '<code>head/<wbr>kernel</code>') == ['1.500', '1.200']


def test_names_in_figures_are_no_markup(comparison, rows):
  evil = 'javascript:x\n"><script>alert(1)</script>$x$'
  rows += [row._replace(method=evil) for row in rows[:6]]
  results.save(rows, comparison / 'results.json')
  text = page.write(comparison).read_text('utf-8')
  assert text.count('<svg ') == 3
  assert '<script>alert' not in text
  assert not re.search(r'href="(?!#|data:)', text)
  nesting = _Nesting(text)
  assert not nesting.problems + nesting.open
