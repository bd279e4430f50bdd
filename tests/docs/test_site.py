"""The site is built strictly, complete, and needs no network."""

import html.parser
import importlib
import importlib.util
import inspect
import json
import os
import pathlib
import re
import subprocess
import sys
import urllib.parse

import pytest

ROOT = pathlib.Path(__file__).parents[2]
EXPORTING = ('merging', 'clip', 'data', 'files', 'training')


def _build(folder, *flags, config=ROOT / 'mkdocs.yml'):
  return subprocess.run(
    [
      *(sys.executable, '-m', 'mkdocs', 'build', '--strict'),
      *('--config-file', config, '--site-dir', folder, *flags),
    ],
    cwd=ROOT,
    env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'},
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )


@pytest.fixture(scope='module')
def site(tmp_path_factory):
  folder = tmp_path_factory.mktemp('site')
  done = _build(folder)
  assert done.returncode == 0, done.stderr
  return folder


class _Links(html.parser.HTMLParser):
  """Collect what a page loads, links to, and can be linked to."""

  def __init__(self, text):
    super().__init__()
    self.loads, self.links, self.ids = [], [], set()
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    actual = dict(attrs)
    if 'id' in actual:
      self.ids.add(actual['id'])
    if tag == 'a' and actual.get('href'):
      self.links.append(actual['href'])
    elif tag == 'link' and actual.get('rel') not in ('canonical',):
      self.loads.append(actual['href'])
    elif actual.get('src'):
      self.loads.append(actual['src'])


@pytest.fixture(scope='module')
def parsed(site):
  return {
    path: _Links(path.read_text('utf-8'))
    for path in site.rglob('*.html')
    if path.name != '404.html'
  }


def test_nothing_is_loaded_from_elsewhere(site, parsed):
  assert len(parsed) > 15
  for page, actual in parsed.items():
    for url in actual.loads:
      parts = urllib.parse.urlsplit(url)
      if parts.scheme == 'data':
        continue
      assert not parts.scheme, (page, url)
      assert not parts.netloc, (page, url)
      assert (page.parent / urllib.parse.unquote(parts.path)).exists(), url
  for sheet in site.rglob('*.css'):
    urls = re.findall(r'url\(["\']?(\w+:)?//', sheet.read_text('utf-8'))
    assert not urls, sheet


def test_links_lead_somewhere(parsed):
  """Also those of docstrings and notebooks, which mkdocs does not see."""
  for page, actual in parsed.items():
    for url in actual.links:
      parts = urllib.parse.urlsplit(url)
      if parts.scheme:
        assert parts.scheme == 'https', (page, url)
        continue
      path = urllib.parse.unquote(parts.path)
      target = (page.parent / path).resolve() if path else page
      if target.is_dir():
        target /= 'index.html'
      assert target.exists(), (page, url)
      # '#__tabbed', and such, are made by the script of the theme.
      if parts.fragment and target in parsed:
        fragment = urllib.parse.unquote(parts.fragment)
        assert fragment in parsed[target].ids | {'__skip'}, (page, url)


def _public(package):
  """Functions and classes that a package exports, by both of their names."""
  module = importlib.import_module(f'modelstock_jax.{package}')
  return [
    {f'modelstock_jax.{package}.{name}', f'{value.__module__}.{name}'}
    for name, value in (
      (name, getattr(module, name)) for name in module.__all__
    )
    if inspect.isfunction(value) or inspect.isclass(value)
  ]


@pytest.mark.parametrize('package', EXPORTING)
def test_the_reference_is_complete(package, parsed, site):
  names = _public(package)
  assert len(names) > 2
  shown = parsed[site / 'api' / f'{package}.html'].ids
  assert [ids for ids in names if not ids & shown] == []


@pytest.mark.parametrize('words', ['own data', 'image folder', 'learning rate'])
def test_search_leads_to_the_guide(words, site):
  index = json.loads((site / 'search' / 'search_index.json').read_text('utf-8'))
  pages = [x['location'] for x in index['docs'] if words in x['text']]
  assert any(page.startswith('own_data.html') for page in pages)


def test_examples_are_shown_as_code(site):
  text = (site / 'api' / 'merging.html').read_text('utf-8')
  plain = re.sub(r'<[^>]+>', '', text)
  import modelstock_jax as ms

  shown = plain.count('&gt;&gt;&gt; ')
  written = sum(getattr(ms, name).__doc__.count('>>> ') for name in ms.__all__)
  assert shown >= written > 20
  assert '<blockquote>' not in text


def test_formulas_are_mathml(site):
  method = (site / 'method.html').read_text('utf-8')
  assert method.count('<math') > 30
  for page in site.rglob('*.html'):
    text = page.read_text('utf-8')
    assert 'arithmatex' not in text, page
    outside = re.sub(r'<(pre|code|script)\b.*?</\1>', '', text, flags=re.DOTALL)
    assert not re.search(r'\\(frac|theta|cos|bar)\b', outside), page


@pytest.mark.parametrize(
  ('broken', 'said'),
  [
    ('[gone](gone.md)', 'gone.md'),
    ('[gone](index.md#gone)', 'gone'),
    ('[gone][modelstock_jax.merging.gone]', 'modelstock_jax.merging.gone'),
    ('--8<-- "docs/examples/gone.py"', 'gone.py'),
    (r'$\gone$', 'unknown command'),
  ],
)
def test_what_is_broken_fails(broken, said, tmp_path):
  docs = tmp_path / 'docs'
  docs.mkdir()
  (docs / 'index.md').write_text(f'# Page\n\nA link\n\n{broken}\n')
  (docs / 'style.css').write_text('')
  text = (ROOT / 'mkdocs.yml').read_text('utf-8').partition('\nnav:')[0]
  text = text.replace('docs_dir: docs', f'docs_dir: {docs}')
  text = text.replace('paths: [.]', f'paths: [{ROOT}]')
  text = text.replace('- docs/hooks/formulas', f'- {ROOT}/docs/hooks/formulas')
  # The pages of these are not in it.
  text = re.sub(r'  - docs/hooks/(notebooks|others)\.py\n', '', text)
  text = text.replace('[docs/hooks/', f'[{ROOT}/docs/hooks/')
  config = tmp_path / 'mkdocs.yml'
  config.write_text(text)
  done = _build(tmp_path / 'site', config=config)
  assert done.returncode != 0
  assert said in done.stderr + done.stdout


def _drawn(path):
  """A picture's text, with its names in order of appearance, and its numbers.

  Matplotlib names a clip after its corners to the last bit, and the last bit
  of a cosine is the processor's.
  """
  names = {}
  text = re.sub(
    r'\b[a-z][0-9a-f]{10}\b',
    lambda actual: names.setdefault(actual[0], f'name {len(names)}'),
    path.read_text('utf-8'),
  )
  number = r'-?\d+\.\d+(?:e-?\d+)?'
  return re.sub(number, '#', text), [float(x) for x in re.findall(number, text)]


def test_pictures_are_those_of_the_script(tmp_path):
  """Drawn again, they are the committed ones: to a thousandth of a point."""
  spec = importlib.util.spec_from_file_location(
    'draw', ROOT / 'docs' / 'pictures' / 'draw.py'
  )
  draw = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(draw)
  draw.main(tmp_path)
  for path in sorted(tmp_path.iterdir()):
    text, numbers = _drawn(path)
    kept, committed = _drawn(ROOT / 'docs' / 'pictures' / path.name)
    assert text == kept, path.name
    assert numbers == pytest.approx(committed, abs=1e-3), path.name
    assert len(numbers) > 100
  assert len(list(tmp_path.iterdir())) == 4
