"""Opens the report in headless Chromium, as its readers will.

Run by `make test-report`.
"""

import itertools
import os
import pathlib
import shutil

from playwright import sync_api
import pytest

from modelstock_jax.data import corruptions
from modelstock_jax.report import comparison
from modelstock_jax.report import differences
from modelstock_jax.report import page as page_lib
from modelstock_jax.report import results

CHROMIUM = os.environ.get('CHROMIUM') or next(
  filter(
    None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))
  ),
  None,
)
# Where the pictures stay, to be looked at.
PICTURES = os.environ.get('PICTURES')
PHONE = dict(
  viewport={'width': 360, 'height': 780}, has_touch=True, is_mobile=True
)
DESKTOP = dict(viewport={'width': 1280, 'height': 900})


@pytest.fixture(scope='module')
def browser():
  if CHROMIUM is None:
    pytest.fail(
      'no chromium on the path; install it (Debian: apt-get install '
      'chromium) or set CHROMIUM'
    )
  root = hasattr(os, 'geteuid') and os.geteuid() == 0
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(
      executable_path=CHROMIUM, args=['--no-sandbox'] if root else []
    )
    yield browser
    browser.close()


@pytest.fixture(scope='module')
def written(tmp_path_factory, finished):
  workdir = tmp_path_factory.mktemp('report') / 'comparison'
  shutil.copytree(finished, workdir)
  path = workdir / 'results.json'
  rows = results.load(path)
  rows += [
    row._replace(benchmark=f'digits@{kind}')
    for kind in ('mean', *corruptions.CORRUPTIONS)
    for row in rows
    if row.benchmark == 'digits'
  ]
  paired = [
    # 93.5 - 92, of two seeds.
    differences.Difference(
      'model_stock_end', 'fine_tuned', name, 0.015, -0.021, 0.048, 2, 100
    )
    for name in ('digits', 'digits@mean')
  ]
  comparison.save(comparison.Measured(rows, paired), path)
  return page_lib.write(workdir)


@pytest.fixture
def address(written):
  return written.as_uri()


@pytest.fixture
def open_page(browser, address):
  """Opens the report and keeps note of requests and complaints."""
  contexts = []

  def opened(**settings):
    context = browser.new_context(**settings)
    contexts.append(context)
    page = context.new_page()
    page.requests, page.complaints = [], []
    page.on('request', lambda request: page.requests.append(request.url))
    page.on('console', lambda message: page.complaints.append(message.text))
    page.on('pageerror', lambda error: page.complaints.append(str(error)))
    page.goto(address)
    return page

  yield opened
  for context in contexts:
    context.close()


def _picture(page, tmp_path, name):
  folder = pathlib.Path(PICTURES or tmp_path)
  folder.mkdir(parents=True, exist_ok=True)
  page.screenshot(path=folder / f'{name}.png', full_page=True)
  from matplotlib import image

  return image.imread(folder / f'{name}.png')[..., :3]


@pytest.mark.parametrize(
  ('name', 'device', 'scheme'),
  [
    ('phone', PHONE, 'light'),
    ('phone_dark', PHONE, 'dark'),
    ('desktop', DESKTOP, 'light'),
    ('desktop_dark', DESKTOP, 'dark'),
  ],
)
def test_report_opens(open_page, address, tmp_path, name, device, scheme):
  page = open_page(**device, color_scheme=scheme)
  assert page.requests == [address]
  assert page.complaints == []
  sizes = page.evaluate('[document.documentElement.scrollWidth, innerWidth]')
  assert sizes[0] <= sizes[1] == device['viewport']['width']
  page.evaluate(
    "document.querySelectorAll('details').forEach((x) => { x.open = true; })"
  )
  assert page.evaluate('document.documentElement.scrollWidth') <= sizes[1]
  pixels = _picture(page, tmp_path, name)
  # Paper around the words: nearly white, or nearly black.
  border = pixels[:, :4].mean()
  assert border > 0.95 if scheme == 'light' else border < 0.15
  assert pixels.std() > 0.05


POINT = (
  'Model Stock (end), mean of 2 seeds: test 93.5 ± 2.1 %, mean of shifts 42.5 '
  '± 3.5 %'
)


def test_the_verdict_is_shown(open_page):
  page = open_page(**PHONE)
  sentence = page.get_by_text(
    'On digits (100 examples and 2 seeds), Model Stock'
  )
  assert sentence.is_visible()
  assert '95 % interval \N{MINUS SIGN}2.1 to +4.8' in sentence.inner_text()
  cell = page.get_by_text('[\N{MINUS SIGN}2.1, +4.8]').first
  assert cell.is_visible()
  header = page.get_by_role('columnheader', name='Jpeg compression')
  assert header.count() == 1


def test_points_have_titles(open_page):
  """A browser shows the title of what lies under the pointer."""
  page = open_page(**DESKTOP)
  titles = page.evaluate(
    """() => [...document.querySelectorAll('figure svg title')].map((title) => {
      title.parentNode.scrollIntoView({block: 'center'});
      const box = title.parentNode.getBoundingClientRect();
      const hit = document.elementFromPoint(box.x + box.width / 2,
                                            box.y + box.height / 2);
      return [title.textContent, title.parentNode.contains(hit)];
    })"""
  )
  assert [POINT, True] in titles
  # The mean of one method lies on a seed of another.
  assert [text for text, hit in titles if not hit and 'shifts' in text] == [
    'Model Stock (end), seed 0: test 92.0 %, mean of shifts 40.0 %'
  ]
  texts = [text for text, _ in titles]
  for quantity in ('cosine', 'ratio'):
    assert any(x.startswith(f'head/bias: {quantity} 0.') for x in texts)


def test_a_tap_shows_the_title(open_page):
  page = open_page(**PHONE)
  tip = page.locator('#tip')
  assert tip.is_hidden()
  point = page.locator('svg g', has=page.locator(f'> title:text-is("{POINT}")'))
  point = point.last
  point.scroll_into_view_if_needed()
  box = point.bounding_box()
  # Beside it: a finger is not that exact.
  page.touchscreen.tap(
    box['x'] + box['width'] / 2 + 4, box['y'] + box['height'] / 2 + 4
  )
  assert tip.is_visible()
  assert tip.inner_text() == POINT
  shown = tip.bounding_box()
  assert shown['x'] >= 0
  assert shown['x'] + shown['width'] <= PHONE['viewport']['width']
  page.evaluate('scrollTo(0, 0)')
  page.touchscreen.tap(20, 20)
  tip.wait_for(state='hidden')


def test_accessible(open_page):
  page = open_page(**DESKTOP)
  assert page.locator('html[lang=en]').count() == 1
  assert page.locator('h1').count() == 1
  levels = page.evaluate(
    "[...document.querySelectorAll('h1, h2, h3')].map((x) => +x.tagName[1])"
  )
  assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
  assert page.locator('svg:not([role=img][aria-label])').count() == 0
  assert page.locator('table:not(:has(caption))').count() == 0
  assert page.locator('tr:not(:has(th[scope]))').count() == 0


def test_printed_completely(open_page, tmp_path):
  page = open_page(**DESKTOP, color_scheme='dark')
  folder = pathlib.Path(PICTURES or tmp_path)
  page.pdf(path=folder / 'report.pdf', prefer_css_page_size=True)
  assert (folder / 'report.pdf').read_bytes().startswith(b'%PDF')
  page.emulate_media(media='print')
  paper = 'getComputedStyle(document.body).backgroundColor'
  assert page.evaluate(paper) == 'rgb(255, 255, 255)'
  # The folded parts are on paper as well.
  heights = page.evaluate(
    "[...document.querySelectorAll('details table')].map((x) => "
    'x.checkVisibility({contentVisibilityAuto: true}) * x.offsetHeight)'
  )
  assert heights
  assert min(heights) > 0


def test_small_and_fast(open_page, written):
  assert written.stat().st_size < 3e6
  page = open_page(**PHONE)
  times = []
  for _ in range(3):  # the machine may be busy with something else
    page.reload()
    times.append(
      page.evaluate(
        "performance.getEntriesByType('navigation')[0].loadEventEnd"
      )
    )
  assert 0 < min(times) < 1000  # milliseconds until all is there
