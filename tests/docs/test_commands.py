"""Every command of the documentation runs, in its order, as a reader would.

The commands of a page share a folder, and a process of pytest.
"""

import pathlib

import pytest

from tests.docs import documented

ROOT = pathlib.Path(__file__).parents[2]


def cases():
  """Yield the commands that run here, and the pages that they are of."""
  for page in documented.pages():
    name = str(page.relative_to(ROOT))
    commands = documented.commands(page.read_text('utf-8'))
    for number, command in enumerate(commands):
      if command in documented.RUN and documented.RUN[command].here:
        yield pytest.param(
          page,
          command,
          id=f'{name}: {number}',
        )


@pytest.fixture(scope='session')
def folder_of(belongings, tmp_path_factory):
  """Makes the folder that the commands of a page run in, at the first."""
  folders = {}

  def make(page):
    if page not in folders:
      folder = folders[page] = tmp_path_factory.mktemp(page.stem)
      documented.furnish(folder)
      for path in belongings.iterdir():
        (folder / path.name).symlink_to(path)
      for name, content in documented.titled(page.read_text('utf-8')).items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_text(content)
    return folders[page]

  return make


@pytest.mark.parametrize(('page', 'command'), [*cases()])
def test_commands(page, command, folder_of):
  documented.run(command, folder_of(page))
