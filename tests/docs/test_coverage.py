"""No command of the documentation escapes the tests; its Python runs."""

import pathlib
import textwrap

import pytest

from tests.docs import documented

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted((ROOT / 'docs').rglob('*.md'))


def test_all_commands_are_covered():
  pages = documented.pages()
  assert len(pages) == len(PAGES) + 1
  actual = {
    str(page.relative_to(ROOT)): documented.problems(page.read_text('utf-8'))
    for page in pages
  }
  assert not {page: problems for page, problems in actual.items() if problems}


def test_no_command_of_the_tables_is_gone():
  written = {
    command
    for page in documented.pages()
    for command in documented.commands(page.read_text('utf-8'))
  }
  listed = {*documented.RUN, *documented.NOT_RUN}
  assert listed == written
  assert not {*documented.RUN} & {*documented.NOT_RUN}


def test_what_is_not_run_is_little_and_checked():
  assert len(documented.NOT_RUN) < len(documented.RUN) / 2
  for text, (reason, check) in documented.NOT_RUN.items():
    assert reason
    check(text)


@pytest.mark.parametrize(
  ('text', 'problem'),
  [
    ('```sh\nmodelstock trian\n```\n', 'modelstock trian: is neither'),
    ('=== "A"\n\n    ```sh\n    rm -rf all\n    ```\n', 'rm -rf all: is'),
    ('```sh\nmake demo \\\n  twice\n```\n', 'make demo twice: is neither'),
    ('```bash\nmake demo\n```\n', "kind 'bash'"),
    ('```\nmake demo\n```\n', "kind ''"),
    ('``` { .bash }\nmake demo\n```\n', 'kind'),
  ],
)
def test_a_new_command_is_seen(text, problem):
  (actual,) = documented.problems(text)
  assert problem in actual


def test_commands_are_read_without_comments():
  text = "```sh\n# first\nmake demo   # a minute\n\nmake 'a#b' \\\n  c\n```\n"
  assert documented.commands(text) == ['make demo', "make 'a#b' c"]


@pytest.mark.parametrize(
  'page', PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES]
)
def test_python_blocks_run(page, tmp_path, monkeypatch):
  """From top to bottom; examples shown from files have tests of their own."""
  monkeypatch.chdir(tmp_path)
  names = {'__name__': 'page'}
  for block in documented.FENCE.finditer(page.read_text('utf-8')):
    if block['kind'] == 'python':
      body = textwrap.dedent(block['body'])
      exec(compile(body, str(page), 'exec'), names)
