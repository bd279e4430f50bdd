"""Every command of the documentation runs, page by page, as a reader would."""

import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# Those with the most commands first, or the last would run alone.
PAGES = sorted(
  [ROOT / 'README.md', *(ROOT / 'docs').rglob('*.md')],
  key=lambda page: (-page.read_text('utf-8').count('--workdir'), str(page)),
)


@pytest.mark.parametrize(
  'page', PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES]
)
def test_commands(page, documented, belongings, tmp_path):
  text = page.read_text('utf-8')
  commands = [
    command
    for command in documented.commands(text)
    if command in documented.RUN and documented.RUN[command].here
  ]
  if not commands:
    return
  documented.furnish(tmp_path)
  for path in belongings.iterdir():
    (tmp_path / path.name).symlink_to(path)
  for name, content in documented.titled(text).items():
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).write_text(content)
  for command in commands:
    documented.run(command, tmp_path)
