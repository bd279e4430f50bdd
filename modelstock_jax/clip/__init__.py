"""CLIP: towers, tokenizer, classification heads, checkpoints in and out."""

from modelstock_jax.clip.config import SIZES
from modelstock_jax.clip.config import CLIPConfig
from modelstock_jax.clip.config import TextConfig
from modelstock_jax.clip.config import VisionConfig
from modelstock_jax.clip.heads import zero_shot_head
from modelstock_jax.clip.layers import clip_layers
from modelstock_jax.clip.layers import layer_depth
from modelstock_jax.clip.loading import Pretrained
from modelstock_jax.clip.loading import load_pretrained
from modelstock_jax.clip.model import CLIP
from modelstock_jax.clip.model import Model
from modelstock_jax.clip.model import classifier
from modelstock_jax.clip.model import create
from modelstock_jax.clip.probe import linear_probe
from modelstock_jax.clip.prompts import Prompts
from modelstock_jax.clip.prompts import captions
from modelstock_jax.clip.prompts import check_labels
from modelstock_jax.clip.prompts import imagenet_prompts
from modelstock_jax.clip.prompts import read_prompts
from modelstock_jax.clip.saving import load_head
from modelstock_jax.clip.saving import save_pretrained
from modelstock_jax.clip.tokenizer import Tokenizer
from modelstock_jax.clip.tokenizer import load_tokenizer
from modelstock_jax.clip.weights import load_safetensors
from modelstock_jax.clip.weights import read_metadata
from modelstock_jax.clip.weights import save_safetensors

__all__ = [
  'CLIP',
  'SIZES',
  'CLIPConfig',
  'Model',
  'Pretrained',
  'Prompts',
  'TextConfig',
  'Tokenizer',
  'VisionConfig',
  'captions',
  'check_labels',
  'classifier',
  'clip_layers',
  'create',
  'imagenet_prompts',
  'layer_depth',
  'linear_probe',
  'load_head',
  'load_pretrained',
  'load_safetensors',
  'load_tokenizer',
  'read_metadata',
  'read_prompts',
  'save_pretrained',
  'save_safetensors',
  'zero_shot_head',
]
