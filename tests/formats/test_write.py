"""Files and folders that appear whole or not at all."""

import pytest

from modelstock_jax.formats import write


@pytest.mark.parametrize('kind', ['file', 'folder'])
def test_interrupted_the_old_one_stays(kind, tmp_path):
  path = tmp_path / 'name'
  if kind == 'file':
    path.write_text('old')

  def half(temporary):
    if kind == 'folder':
      temporary.mkdir()
      temporary = temporary / 'part'
    temporary.write_text('half of it')
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt), write.replacing(path) as temporary:
    half(temporary)
  assert list(tmp_path.iterdir()) == ([path] if kind == 'file' else [])
  assert kind == 'folder' or path.read_text() == 'old'


def test_a_file_is_renamed_not_written_over(tmp_path):
  path, link = tmp_path / 'name', tmp_path / 'link'
  path.write_text('old')
  link.hardlink_to(path)
  write.write_text(path, 'new')
  assert (path.read_text(), link.read_text()) == ('new', 'old')
  assert path.stat().st_mode & 0o777 == link.stat().st_mode & 0o777


def test_a_folder_replaces_an_empty_one(tmp_path):
  path = tmp_path / 'name'
  path.mkdir()
  with write.replacing(path) as temporary:
    temporary.mkdir()
    (temporary / 'part').write_text('whole')
  assert [file.name for file in path.iterdir()] == ['part']


def test_what_a_killed_process_left_is_removed(tmp_path):
  path = tmp_path / 'name'
  (tmp_path / '.name.partial' / 'name').mkdir(parents=True)
  (tmp_path / '.name.lock').write_text('process 1 on a since then')
  write.write_text(path, 'whole')
  assert list(tmp_path.iterdir()) == [path]
