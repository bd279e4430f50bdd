"""The block and the kind of a layer, from its name in any network."""

import re


def layer_block(name: str) -> int | None:
  """Return the number of a layer's block, from its name.

  >>> layer_block('vision_model.encoder.layers.11.mlp.fc1.weight')
  11
  """
  match = re.search(r'(?:^|[._/])(\d+)(?=[._/])', name)
  return int(match[1]) if match else None


def layer_kind(name: str) -> str:
  """Return the kind of a layer of any network, from its name.

  >>> layer_kind('model.layers.0.self_attn.q_proj.weight')
  'attention'
  """
  lower = name.lower()
  return next(kind for kind, form in _KINDS if re.search(form, lower))


# The first that a name fits; what fits none is a head, or something else.
_KINDS = (
  ('norm', r'norm|(^|[._/])ln'),
  ('head', r'(^|[._/])head[._/]'),
  ('bias', r'bias$'),
  ('embedding', r'emb|wte|wpe|cls_token'),
  ('attention', r'att|[qkv]_proj|query|key|value'),
  ('mlp', r'mlp|ffn|fc\d?[._/]|feed_forward|dense|(gate|up|down)_proj'),
  ('head', r''),
)
