"""CLIP: image and text towers, classification heads, weights in files."""

from modelstock_jax.clip.config import SIZES
from modelstock_jax.clip.config import CLIPConfig
from modelstock_jax.clip.config import TextConfig
from modelstock_jax.clip.config import VisionConfig
from modelstock_jax.clip.heads import zero_shot_head
from modelstock_jax.clip.layers import clip_layers
from modelstock_jax.clip.layers import layer_depth
from modelstock_jax.clip.layers import layer_kind
from modelstock_jax.clip.loading import Pretrained
from modelstock_jax.clip.loading import load_pretrained
from modelstock_jax.clip.model import CLIP
from modelstock_jax.clip.model import Model
from modelstock_jax.clip.model import classifier
from modelstock_jax.clip.model import create
from modelstock_jax.clip.saving import load_head
from modelstock_jax.clip.saving import save_pretrained
from modelstock_jax.clip.weights import load_safetensors
from modelstock_jax.clip.weights import read_metadata
from modelstock_jax.clip.weights import save_safetensors

__all__ = [
  'CLIP',
  'SIZES',
  'CLIPConfig',
  'Model',
  'Pretrained',
  'TextConfig',
  'VisionConfig',
  'classifier',
  'clip_layers',
  'create',
  'layer_depth',
  'layer_kind',
  'load_head',
  'load_pretrained',
  'load_safetensors',
  'read_metadata',
  'save_pretrained',
  'save_safetensors',
  'zero_shot_head',
]
