"""Models of the Hugging Face hub, by their id."""

import contextlib
import os
import pathlib
import re

from modelstock_jax.formats import text
from modelstock_jax.formats import torch

_ID = re.compile(r'([\w.-]+/[\w.-]+)(?:@([\w./-]+))?')
# Suffixes of files, which are no ids of the hub.
_FILES = ('.safetensors', '.npy', '.npz', '.msgpack', *torch.SUFFIXES)
# Configs and tokenizers.
_SMALL = ['*.json', '*.txt', '*.model', '*.jinja', '*.tiktoken', '*.py']
# Many repositories hold the same weights in several formats: one is enough.
_WEIGHTS = ('model*.safetensors', '*model.safetensors', '*model*.bin')


def model_id(path: text.PathLike) -> str | None:
  """Return the id of a model of the hub; None for any other path.

  Args:
    path: an id, or a path in the cache of the hub.

  >>> model_id('/home/me/.cache/hub/models--a--b/snapshots/0f3')
  'a/b'
  >>> model_id('openai/clip-vit-base-patch32@main')
  'openai/clip-vit-base-patch32'
  >>> model_id('/home/me/seed_0')
  """
  if cached := re.search(r'models--([^/]+?)--([^/]+)', str(path)):
    return '/'.join(cached.groups())
  matched = _ID.fullmatch(str(path))
  is_file = os.path.exists(path) or str(path).endswith(_FILES)
  return matched[1] if matched and not is_file else None


def push(folder: str | pathlib.Path, name: str) -> str:
  """Upload a folder to a model of the hub, which is created if it is new.

  Args:
    folder: all its files are uploaded.
    name: the id, 'user/name'.

  Returns:
    The address of the model.

  Raises:
    OSError: the hub cannot be reached, or refuses it.
  """
  import huggingface_hub

  api = huggingface_hub.HfApi()
  try:
    url = api.create_repo(name, repo_type='model', exist_ok=True)
    api.upload_folder(
      repo_id=name,
      folder_path=folder,
      commit_message='Upload with modelstock_jax',
    )
  except Exception as error:  # of the network, and of every layer above it
    raise OSError(
      f'--push={name}: the Hugging Face hub did not take it '
      f'({text.plain(text.line(error))}). Log in with `hf auth login`.'
    ) from error
  return str(url)


def local_path(path: text.PathLike) -> pathlib.Path:
  """Return a path, or that of the local copy of a model of the hub.

  Args:
    path: a file; a folder, also that of a model in the cache of the hub; or
      the id of a model on the Hugging Face hub, with `@revision` or without,
      which is downloaded if it has not been.

  Raises:
    FileNotFoundError: there is no such file, and no such model on the hub.

  >>> import tempfile
  >>> local_path(tempfile.gettempdir()).is_dir()
  True
  """
  local = pathlib.Path(path).expanduser()
  with contextlib.suppress(OSError, ValueError):  # it is no cache of the hub
    commit = (local / 'refs/main').read_text('utf-8').strip()
    if re.fullmatch(r'\w+', commit) and (local / 'snapshots' / commit).is_dir():
      return local / 'snapshots' / commit
  if os.path.exists(local):  # which may have no possible name
    return local
  absent = f'{text.plain(str(path))}: there is no such file or folder'
  matched = _ID.fullmatch(str(path))
  if not matched or local.suffix in _FILES:
    raise FileNotFoundError(f'{absent}.')
  name, revision = matched.groups()
  try:
    import huggingface_hub

    for weights in _WEIGHTS:
      folder = huggingface_hub.snapshot_download(
        name, revision=revision, allow_patterns=[*_SMALL, weights]
      )
      if any(pathlib.Path(folder).glob(weights)):
        break
    return pathlib.Path(folder)
  except Exception as error:  # of the network, and of every layer above it
    at = f' --revision {revision}' if revision else ''
    raise FileNotFoundError(
      f'{absent}, and the Hugging Face hub did not give a model of that id '
      f'({text.plain(text.line(error))}). Where there is a network: '
      f'`hf download {name}{at} --local-dir FOLDER`, and give FOLDER.'
    ) from error
