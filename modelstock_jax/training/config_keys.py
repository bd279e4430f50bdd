"""The keys of a config: types, ranges, defaults and what they mean.

Sizes of a network are checked by `clip`, augmentation by `data.Augment`.
"""

from collections.abc import Callable
import functools
from typing import Annotated
from typing import Any
from typing import Literal

import pydantic

from modelstock_jax import data as data_lib
from modelstock_jax.clip import config as clip_config
from modelstock_jax.clip import saving
from modelstock_jax.formats import text as text_lib
from modelstock_jax.merging import options
from modelstock_jax.training import section

Positive = Annotated[int, pydantic.Field(ge=1, le=2**31 - 1)]
NotNegative = Annotated[int, pydantic.Field(ge=0, le=2**31 - 1)]
Section = section.Section


def _check_float32(value: float) -> float:
  if 0 < value < 1e-30:
    raise ValueError('must be 0 or at least 1e-30, as float32 may not hold it')
  return value


_FLOAT32 = pydantic.AfterValidator(_check_float32)
NotNegativeFloat = Annotated[float, pydantic.Field(ge=0, le=1e30), _FLOAT32]
Strength = Annotated[float, pydantic.Field(ge=0, le=1000), _FLOAT32]
Share = Annotated[float, pydantic.Field(ge=0, le=1), _FLOAT32]
Pixels = Annotated[int, pydantic.Field(ge=1, le=clip_config.MAX_IMAGE_SIZE)]
Size = Annotated[int, pydantic.Field(ge=1, le=clip_config.MAX_SIZE)]
Seconds = Annotated[int, pydantic.Field(ge=1, le=10**6)]


# Constants of the channels: one for all, or one for each.
Mean = tuple[Share, ...]
Std = tuple[Annotated[float, pydantic.Field(ge=1e-6, le=1000)], ...]


def _usual(sizes: Section) -> dict[str, Any]:
  """Return the sizes of a tower; CLIP's usual ones if not set."""
  usual = {'channels': 3, 'context_length': 77, 'vocab_size': 49408}
  return {k: usual.get(k) if size is None else size for k, size in sizes}


class Image(Section):
  """Sizes of the image tower, see `clip.VisionConfig`.

  Attributes:
    image_size: side of an image, pixels
    patch_size: side of a patch, pixels
    channels: channels of an image
    width: features of a token
    depth: residual blocks
    heads: attention heads of a block
  """

  image_size: Pixels | None = None
  patch_size: Size | None = None
  channels: Size | None = None
  width: Size | None = None
  depth: Size | None = None
  heads: Size | None = None

  def tower(self) -> clip_config.VisionConfig:
    """Return the tower; of 3 channels if they are not set."""
    return clip_config.VisionConfig(**_usual(self))


class Text(Section):
  """Sizes of the text tower, see `clip.TextConfig`.

  Attributes:
    context_length: most tokens of a text
    vocab_size: token ids
    width: features of a token
    depth: residual blocks
    heads: attention heads of a block
  """

  context_length: Size | None = None
  vocab_size: Size | None = None
  width: Size | None = None
  depth: Size | None = None
  heads: Size | None = None

  def tower(self) -> clip_config.TextConfig | None:
    """Return the tower, None if its width is not set; of CLIP's tokens."""
    return clip_config.TextConfig(**_usual(self)) if self.width else None


class Model(Section):
  """The network, see `clip.CLIPConfig`.

  `modelstock train` takes sizes that are not set from `anchor.weights`, and
  compares the others with it. Other commands read no weights: they require
  sizes, except for the usual 3 channels and 77 tokens of 49,408 ids.

  Attributes:
    embed_dim: features of an embedding
    activation: of the MLPs
    dtype: of computation; weights are float32
  """

  embed_dim: Size | None = None
  image: Image = Image()
  text: Text = Text()
  activation: Literal['quick_gelu', 'gelu'] = 'quick_gelu'
  dtype: Literal['bfloat16', 'float16', 'float32'] = 'bfloat16'

  @pydantic.field_validator('image', 'text')
  @classmethod
  def _check(cls, sizes: Image | Text, info: pydantic.ValidationInfo) -> Any:
    if None not in _usual(sizes).values():
      with text_lib.explained(f'model.{info.field_name}.*: '):
        sizes.tower()
    return sizes

  def network(self) -> clip_config.CLIPConfig:
    """Return the network of these sizes.

    Raises:
      ValueError: sizes are missing.
    """
    embed_dim: Any = self.embed_dim  # which CLIPConfig checks
    with text_lib.explained(
      'model.*: ',
      ' Set the sizes of the network; `modelstock train` alone takes those of '
      'anchor.weights.',
    ):
      image, text = self.image.tower(), self.text.tower()
      return clip_config.CLIPConfig(embed_dim, image, text, self.activation)


class Anchor(Section):
  """The pretrained CLIP that training starts from.

  Attributes:
    weights: what `clip.load_pretrained` takes: a file, a folder or an id of the
      Hugging Face hub; or the name of one that ships, 'mini_clip'
    head: how the head of the classes is made
    prompts: 'imagenet': CLIP's names and 80 templates; 'class_names': those of
      the data set, in 'a photo of a {}.'; the path of a JSON file, see
      `clip.prompts.read_prompts`; or 'characters': captions of 0-9 and A-Z
    tokenizer: a folder or file; '' is the one beside the weights, else OpenAI's
    allow_pickle: trust a .npy file of weights, a pickle that can run any code;
      the config.json of a workdir never decides it
  """

  weights: str = ''
  head: Literal['zero_shot', 'linear_probe'] = 'zero_shot'
  prompts: str = 'imagenet'
  tokenizer: str = ''
  allow_pickle: bool = False


class Data(Section):
  """The data sets.

  Attributes:
    dataset: name in TFDS, or name:version; or folder:PATH, a folder of pictures
      that is read in place
    data_dir: folder of the prepared data sets; '' is that of the package
    train: split of TFDS to train on
    validation: split of TFDS to evaluate merges on
    cache: keep a small training set decoded in memory
    max_bad_examples: training examples that cannot be read and are replaced by
      others, before it is an error
    mean: of the pixels, 0 to 1, for each channel; None is the mean that
      `anchor.weights` states, else CLIP's
    std: likewise, 1e-6 to 1000
  """

  dataset: str = ''
  data_dir: str = ''
  train: str = 'train'
  validation: str = 'validation'
  cache: bool = False
  max_bad_examples: NotNegative = 10
  mean: Mean | None = None
  std: Std | None = None

  @property
  def pixels(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and the std; CLIP's where they are not set."""
    return self.mean or saving.MEAN, self.std or saving.STD

  def normalizer(self) -> Callable[[Any], Any]:
    """Return the function from uint8 images to what the network takes."""
    mean, std = self.pixels
    return functools.partial(data_lib.normalize, mean=mean, std=std)


class Augment(Section):
  """The random transforms of training images, see `data.Augment`.

  The defaults are CLIP's own transform, which draws nothing.

  Attributes:
    crop_scale: least and greatest share of the area of an image in a crop, such
      as (0.08, 1.0)
    crop_ratio: least and greatest width / height of a crop
    flip: probability of a horizontal flip
    color_jitter: strength, 0 to 1
    randaugment_count: operations on an image, 0 to 10
    randaugment_magnitude: their strength, 0 to 30
    randaugment: RandAugment as timm has it, instead of these two, such as
      'm9-n2'
  """

  crop_scale: tuple[float, ...] = (1.0, 1.0)
  crop_ratio: tuple[float, ...] = (3 / 4, 4 / 3)
  flip: float = 0.0
  color_jitter: float = 0.0
  randaugment_count: int = 0
  randaugment_magnitude: float = 0.0
  randaugment: str = ''

  @pydantic.model_validator(mode='after')
  def _check(self) -> 'Augment':
    with text_lib.explained('augment.*: '):
      self.transform(1)
    return self

  def transform(self, size: int, channels: int = 3) -> data_lib.Augment:
    """Return the transform to images of `size` pixels."""
    return data_lib.Augment(size, channels, **dict(self))


class Train(Section):
  """Fine-tuning of each model.

  Attributes:
    epochs: passes over the training data
    batch_size: examples of each model in a step
    learning_rate: peak of the warm-up and the cosine
    warmup_steps: steps of the linear warm-up
    warmup_share: share of the steps of the run, in place of warmup_steps; 0 is
      off
    warmup_from_zero: step s of w warm-up steps has the share s / w of the rate;
      'false': (s + 1) / w, as in the code of WiSE-FT and Model Soups
    weight_decay: of AdamW, on every tensor
    clip_norm: largest norm of the gradient of a model; 0 does not clip
    label_smoothing: share of the target that all classes divide
    mixup: alpha of the Beta distribution; 0 is off
    accumulate: parts that a batch is cut into, one after the other: less
      memory, more time
    sum_gradients: over devices, of a batch that is cut: 'once' a step, which
      sends less, or in each of the 'parts', which takes less memory with FSDP
      and is what happens if the loss is no `MeanOfExamples`; 'auto': once where
      it fits
    remat: recompute activations in the backward pass: of each 'block', or all
      but the products in 'dots': less memory, more time; 'auto': of each block
      where they would not fit
    models: train all models at once ('vmap') or one after the other ('map'),
      which takes less memory and requires mesh.stock=1
  """

  epochs: Annotated[int, pydantic.Field(ge=1, le=10**5)] = 10
  batch_size: Positive = 512
  learning_rate: NotNegativeFloat = 3e-5
  warmup_steps: NotNegative = 500
  warmup_share: Annotated[Share, pydantic.Field(lt=1)] = 0.0
  warmup_from_zero: bool = True
  weight_decay: NotNegativeFloat = 0.1
  clip_norm: NotNegativeFloat = 1.0
  label_smoothing: Share = 0.0
  mixup: NotNegativeFloat = 0.0
  accumulate: Positive = 1
  sum_gradients: Literal['auto', 'once', 'parts'] = 'auto'
  remat: Literal['auto', 'none', 'block', 'dots'] = 'auto'
  models: Literal['vmap', 'map'] = 'vmap'


Every = Annotated[str | int, section.number_or('epoch', 'end', of='epochs')]


class Merge(Section):
  """The merge, see `merging.StockOptions`.

  Attributes:
    num_models: models that are trained and merged; 1 is plain fine-tuning
    every: merge every 'epoch', every so many epochs, or only at the 'end'
    anchor: the merge is relative to the 'pretrained' weights or to the
      'last_merge'
    opt_state: the state of the optimizer after a merge; which the paper's runs
      took is not known, and 'reset' was the best on the digits' validation
    unit: what shares a cosine
    average: what is averaged over the pairs of more than two models
    clip: clip the cosine to [0, 1]
    strength: factor on the ratio of the merge
  """

  num_models: Annotated[int, pydantic.Field(ge=1, le=1000)] = 2
  every: Every = 'epoch'
  anchor: Literal['pretrained', 'last_merge'] = 'pretrained'
  opt_state: options.OptState = 'reset'
  unit: options.Unit = 'layer'
  average: options.Average = 'cosine'
  clip: bool = True
  strength: Strength = 1.0

  @property
  def mode(self) -> str:
    """The rule of merging: 'end', 'epoch' or 'epoch_reset', '5' ...."""
    kept = self.every == 'end' or self.opt_state == 'keep'
    return f'{self.every}' if kept else f'{self.every}_{self.opt_state}'


class Mesh(Section):
  """The devices. What 'auto' takes is explained in `docs/hosts.md`.

  Attributes:
    stock: devices along the stack of models: 1, or merge.num_models; 'auto':
      merge.num_models where each model can have devices, hosts and slices of
      its own, except on CPU
    fsdp_min_size: split weights and moments with at least this many elements
      over the devices of a model (FSDP), such as 65536; 0 is off; 'auto': 65536
      where they would not fit
  """

  stock: Annotated[Any, section.number_or('auto', of='devices')] = 'auto'
  fsdp_min_size: Annotated[
    Any, section.number_or('auto', of='elements', least=0)
  ] = 'auto'


class Checkpoint(Section):
  """When checkpoints are saved.

  Attributes:
    every_merges: merges from one to the next; the last merge is always saved
    every_steps: steps from one to the next, in addition; 0 is off
  """

  every_merges: Positive = 1
  every_steps: NotNegative = 1000


class Evaluate(Section):
  """Evaluation of the merge.

  Attributes:
    batch_size: examples in a step
    every_epochs: epochs between evaluations on data.validation
    benchmarks: names of `modelstock evaluate`, see `data.BENCHMARKS`
  """

  batch_size: Positive = 512
  every_epochs: Positive = 1
  benchmarks: tuple[str, ...] = ()


class Log(Section):
  """The lines of metrics.jsonl.

  Attributes:
    every_steps: steps between lines
  """

  every_steps: Positive = 50


class Hosts(Section):
  """Several processes, see `hosts.start`.

  Attributes:
    initialization_seconds: time to wait for all processes
    heartbeat_seconds: silence after which a process counts as lost
    shutdown_seconds: time that a process which ends waits for the others
  """

  initialization_seconds: Seconds = 300
  heartbeat_seconds: Seconds = 100
  shutdown_seconds: Seconds = 60
