"""Which classes occur in a split, found once and remembered."""

import hashlib
import json
import logging
import os
import re

from etils import epath

from modelstock_jax.data import sources

_log = logging.getLogger(__name__)


def present(source: sources.Source) -> tuple[int, ...]:
  """The labels that occur in a split, in order.

  All records are read the first time, and the answer is kept: beside the data
  or, where that cannot be written, in $XDG_CACHE_HOME/modelstock_jax.

  Args:
    source: the split, of labels that are `int`.

  Returns:
    Labels, ascending.

  >>> import shutil, tempfile
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   _ = shutil.copytree(sources.BUNDLED_DIR / 'digits', f'{folder}/digits')
  ...   present(sources.open_source('digits', 'test[:3]', data_dir=folder))
  (0, 1, 2)
  """
  # What is remembered of other records is not believed.
  about = {'name': source.name, 'records': len(source)}
  places = _places(source)
  for place in places:
    try:
      found = json.loads(place.read_text())
      if {key: found[key] for key in about} == about:
        return tuple(map(int, found['classes']))
    except (OSError, ValueError, KeyError, TypeError):
      continue
  _log.info('Reading %s for the classes in it.', source.name)
  labels = sorted({record['label'] for record in source})
  for place in places:
    try:
      place.parent.mkdir(parents=True, exist_ok=True)
      # A reader sees all of it or nothing, whichever process wrote it last.
      temporary = place.with_name(f'{place.name}.{os.getpid()}.tmp')
      temporary.write_text(json.dumps({**about, 'classes': labels}))
      temporary.replace(place)
      break
    except OSError as error:
      _log.info('The classes cannot be kept in %s: %s', place, error)
  return tuple(labels)


def _places(source: sources.Source) -> list[epath.Path]:
  split = re.sub(r'\W+', '_', source.name.rpartition('/')[2])
  digest = hashlib.sha256(str(source.path).encode()).hexdigest()[:16]
  cache = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return [
    epath.Path(source.path) / f'classes_{split}.json',
    epath.Path(cache).expanduser()
    / 'modelstock_jax'
    / f'classes_{split}_{digest}.json',
  ]
