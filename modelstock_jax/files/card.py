"""The model card of a merged folder: Markdown for its README.md."""

from collections.abc import Mapping
import json
import pathlib
from typing import Any

from modelstock_jax.files import methods
from modelstock_jax.formats import hub
from modelstock_jax.formats import text


def card(
  settings: dict[str, Any],
  verdicts: Mapping[str, str],
  alpha: float,
  companions: Mapping[str, bytes],
  stem: str,
) -> dict[str, bytes]:
  """Describe a merged folder: what was merged, and how.

  Args:
    settings: arguments of `files.merge`.
    verdicts: words on the merge.
    alpha: of this folder.
    companions: contents of the files next to the tensors, by name.
    stem: of the files of the tensors.

  Returns:
    'README.md': Markdown, after the YAML that the Hugging Face hub reads. Empty
    for a folder without a config, which no library loads.
  """
  if 'config.json' not in companions and not stem.startswith('open_clip'):
    return {}
  library = []
  if stem.startswith('open_clip'):
    library = ['library_name: open_clip']
  elif b'"model_type"' in companions['config.json']:
    library = ['library_name: transformers']
  method = {key: x for key, x in settings['method'].items() if x is not None}
  if 'alphas' in method:
    method['alphas'] = [alpha]
  paper = methods.METHODS[method['name']][-1]
  models = [hub_name(model) for model in settings['models']]
  anchor = settings['anchor'] and hub_name(settings['anchor'])
  recipe = settings | {'method': method, 'anchor': anchor, 'models': models}
  sources = [anchor, *models] if anchor else models
  lines = [
    *('---', 'base_model:', *(f'- {json.dumps(name)}' for name in sources)),
    *(*library, 'tags:', '- merge', f'- {method["name"]}', '---', ''),
    *(f'# Merge of {", ".join(models)}', ''),
    f'Merged by `{method["name"]}` of modelstock_jax (arXiv:{paper}).',
    *(*verdicts.values(), '', '## Recipe', ''),
    *('```json', json.dumps(recipe, indent=2), '```', ''),
  ]
  return {'README.md': '\n'.join(lines).encode()}


def hub_name(path: str) -> str:
  """Return how a card names a checkpoint: its hub id, or its own name.

  >>> hub_name('/home/me/.cache/hub/models--a--b/snapshots/0f3')
  'a/b'
  >>> hub_name('/home/me/seed_0/')
  'seed_0'
  """
  return text.plain(hub.model_id(path) or pathlib.Path(path).name)
