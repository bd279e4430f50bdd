"""The device programs of a run: advance N models, merge them, start again."""

from collections.abc import Callable
import functools
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
import optax

from modelstock_jax import merging
from modelstock_jax.clip import heads
from modelstock_jax.clip import model as model_lib
from modelstock_jax.merging import stock
from modelstock_jax.training import losses
from modelstock_jax.training import optimizer
from modelstock_jax.training import projection
from modelstock_jax.training import sharding
from modelstock_jax.training import state as state_lib

Params = Any
StockState = state_lib.StockState
Batch = dict[str, jax.Array]


class Metrics(NamedTuple):
  """What a step reports; stays on the devices until it is logged."""

  loss: jax.Array  # float32[N]       nats, mean over the batch
  accuracy: jax.Array  # float32[N]   0..1, of the batch before the step
  grad_norm: jax.Array  # float32[N]  before clipping
  learning_rate: jax.Array  # float32[]


class Reference(NamedTuple):
  """What some recipes compare with; the same for all models, never changed."""

  anchor: Params = None  # float32, where models are held near it
  contexts: Params = None  # a head of T contexts, see `losses`
  tokens: Any = None  # int32[K, T, L], captions of the classes


class Recipe(NamedTuple):
  """What a step needs to know beside state and batch."""

  model: model_lib.Model
  tx: optax.GradientTransformation
  schedule: optax.Schedule
  preprocess: Callable[[jax.Array], jax.Array]  # uint8 to normalised floats
  # Traced where each model of a stack has its own.
  label_smoothing: float | jax.Array = 0.0
  mixup: float | jax.Array = 0.0
  # Parts that a batch is cut into, one after the other: less memory.
  accumulate: int = 1
  # Models one after the other, not side by side: less memory.
  in_turn: bool = False
  # What follows takes a `Reference`.
  contrastive: bool = False  # pairs with captions, in place of the classes
  context_weight: float = 0.0  # of the divergence of contexts
  projection: float | None = None  # strength of `projection.fast`; None is off

  @property
  def refers(self) -> bool:
    """Whether a step takes a `Reference`."""
    settings = (self.contrastive, self.context_weight)
    return any(settings) or self.projection is not None


class _Examples(NamedTuple):
  """Examples of one model, under mixup each with a partner."""

  image: jax.Array  # uint8[B, H, W, C]
  label: jax.Array  # int32[B]
  partner: '_Examples | None' = None
  texts: jax.Array | None = None  # int32[B, L] captions


def train_step(
  recipe: Recipe,
  placement: sharding.Placement,
  state: StockState,
  batch: Batch,
  reference: Reference | None = None,
) -> tuple[StockState, Metrics]:
  """Advances every model by one step on its own batch.

  The step of one model, mapped over the stack: no model sees another.

  Args:
    recipe: network, optimizer and loss.
    placement: where everything lives.
    state: N models.
    batch: 'image' uint8[N, B, H, W, C] and 'label' int32[N, B].
    reference: see `Recipe`.

  Returns:
    The state after the step, and metrics of the batch before it.
  """
  learning_rate = jnp.asarray(recipe.schedule(state.step))

  def one(*model):
    return advance(
      recipe, placement, learning_rate, state.step, *model, reference=reference
    )

  stack = (state.params, state.opt_state, state.key)
  stack += (batch['image'], batch['label'])
  found = over_stack(recipe, one, stack)
  params, opt_state, loss, accuracy, grad_norm = found
  state = StockState(state.step + 1, params, opt_state, state.key)
  return state, Metrics(loss, accuracy, grad_norm, learning_rate)


def over_stack(
  recipe: Recipe, one: Callable[..., Any], stack: tuple[Any, ...]
) -> Any:
  """Maps a function of one model over a stack of them, leaves `[N, ...]`."""
  if recipe.in_turn:
    return jax.lax.map(lambda x: one(*x), stack)
  return jax.vmap(one, spmd_axis_name=sharding.STOCK)(*stack)


def advance(
  recipe: Recipe,
  placement: sharding.Placement,
  learning_rate: jax.Array,
  step: jax.Array,
  params: Params,
  opt_state: Any,
  key: jax.Array,
  image: jax.Array,
  label: jax.Array,
  *,
  reference: Reference | None = None,
) -> tuple[Params, Any, jax.Array, jax.Array, jax.Array]:
  """Advances one model by one step: what is mapped over the stack.

  Args:
    recipe: network, optimizer and loss.
    placement: where everything lives.
    learning_rate: float32[], of this step.
    step: int32[], steps taken before.
    params: of the model.
    opt_state: of its optimizer.
    key: its random stream.
    image: uint8[B, H, W, C].
    label: int32[B].
    reference: see `Recipe`.

  Returns:
    Params and opt_state after the step, and loss, accuracy and gradient norm
    of the batch before it.
  """
  if reference is None:
    if recipe.refers:
      raise ValueError(
        'This recipe compares with a reference, and there is none: set '
        "train.loss='cross_entropy', train.context_weight=0 and "
        "train.projection='none' where models are trained without one."
      )
    reference = Reference()
  key = jax.random.fold_in(key, step)
  value, accuracy, grads = _gradient(
    recipe, placement, params, key, image, label, reference
  )
  update: Any = recipe.tx.update  # of whatever state
  direction, opt_state = update(grads, opt_state, params)
  params = optimizer.apply(params, direction, learning_rate)
  if recipe.projection is not None:
    params, opt_state = projection.fast(
      reference.anchor,
      params,
      grads,
      opt_state,
      strength=recipe.projection,
    )
  return params, opt_state, value, accuracy, optax.tree.norm(grads)


def _gradient(
  recipe: Recipe,
  placement: sharding.Placement,
  params: Params,
  key: jax.Array,
  image: jax.Array,
  label: jax.Array,
  reference: Reference,
) -> tuple[jax.Array, jax.Array, Params]:
  """Loss, accuracy and gradient of one model on its batch."""
  ratio = None
  examples = _Examples(image, label)
  if recipe.contrastive:
    texts = losses.captions(key, reference.tokens, label)
    examples = _Examples(image, label, texts=texts)
  if _on(recipe.mixup):
    key_ratio, key_partner = jax.random.split(key)
    ratio = _beta(key_ratio, recipe.mixup)
    partner = jax.random.permutation(key_partner, label.shape[0])
    partners = _Examples(image[partner], label[partner])
    examples = _Examples(image, label, partners)

  def loss(params, examples):
    # Pinned, or the partitioner may share the work out over other axes.
    examples = placement.pin(examples, placement.rows)
    whole = _whole(placement, params)
    beside = reference
    if recipe.context_weight:  # whose tower runs, frozen
      beside = beside._replace(anchor=_whole(placement, reference.anchor))
    return _loss(recipe, whole, ratio, examples, beside)

  def gradient(examples):
    (value, accuracy), grads = jax.value_and_grad(loss, has_aux=True)(
      params, examples
    )
    where = placement.params(grads)
    return value, accuracy, placement.pin(grads, where)

  if recipe.accumulate == 1:
    return gradient(examples)

  def add(total, part):
    return jax.tree.map(jnp.add, total, gradient(part)), None

  parts = jax.tree.map(
    functools.partial(_cut, placement, recipe.accumulate), examples
  )
  zero = jnp.zeros((), jnp.float32)
  start = (zero, zero, jax.tree.map(jnp.zeros_like, params))
  total, _ = jax.lax.scan(add, start, parts)
  return jax.tree.map(lambda x: x / recipe.accumulate, total)


def _cut(
  placement: sharding.Placement, number: int, array: jax.Array
) -> jax.Array:
  """[B, ...] to [number, B / number, ...], rows staying where they are."""
  devices = placement.mesh.shape[sharding.DATA]
  rest = array.shape[1:]
  array = array.reshape(devices, number, -1, *rest).swapaxes(0, 1)
  return array.reshape(number, -1, *rest)


def _whole(placement: sharding.Placement, params: Params) -> Params:
  """Gathers what is split over `data`; its gradient is split again."""

  def gather(leaf, where):
    if where.is_fully_replicated:
      return leaf

    @jax.custom_vjp
    def identity(x):
      return placement.pin(x, placement.replicated)

    def backward(_, gradient):
      # Summed straight into parts: a reduce-scatter, not an all-reduce.
      return (placement.pin(gradient, where),)

    identity.defvjp(lambda x: (identity(x), None), backward)
    return identity(leaf)

  return jax.tree.map(gather, params, placement.params(params))


def _loss(
  recipe: Recipe,
  params: Params,
  ratio: jax.Array | None,
  examples: _Examples,
  reference: Reference,
) -> tuple[jax.Array, jax.Array]:
  """The loss of one model on a batch, and its accuracy."""
  image, label, partner, texts = examples
  image = recipe.preprocess(image)
  if texts is not None:
    return _contrastive(recipe, params, image, texts)
  if ratio is not None and partner is not None:
    ratio = ratio.astype(image.dtype)
    image = ratio * image + (1 - ratio) * recipe.preprocess(partner.image)
  logits, divergence = _classify(recipe, params, image, reference)
  loss = losses.cross_entropy(logits, label, recipe.label_smoothing)
  if ratio is not None and partner is not None:
    ratio = ratio.astype(logits.dtype)
    other = losses.cross_entropy(logits, partner.label, recipe.label_smoothing)
    loss = ratio * loss + (1 - ratio) * other
  if divergence is not None:
    loss += recipe.context_weight * divergence
  return loss, _accuracy(logits, label)


def _classify(
  recipe: Recipe, params: Params, image: jax.Array, reference: Reference
) -> tuple[jax.Array, jax.Array | None]:
  """Logits, and the divergence of contexts where it counts."""
  if not recipe.context_weight:
    return recipe.model.apply(params, image), None
  embed = recipe.model.embed
  embeddings = embed(params, image)
  frozen = embed(reference.anchor, image)
  return (
    heads.classify(params['head'], embeddings),
    losses.context_divergence(reference.contexts, frozen, embeddings),
  )


def _contrastive(
  recipe: Recipe, params: Params, image: jax.Array, texts: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The loss of pairs; how often an image is nearest to its own caption."""
  logits = losses.pair_logits(
    recipe.model.embed(params, image),
    recipe.model.embed_text(params, texts),
    params['logit_scale'],
  )
  own = jnp.arange(logits.shape[0])
  return losses.contrastive(logits), _accuracy(logits, own)


def _on(setting: float | jax.Array) -> bool:
  """Whether a loss needs what is 0 where it is off; each model its own may."""
  return isinstance(setting, jax.Array) or bool(setting)


def _beta(key: jax.Array, alpha: float | jax.Array) -> jax.Array:
  """A draw from Beta(alpha, alpha); 1, which mixes nothing, if alpha is 0."""
  if not isinstance(alpha, jax.Array):
    return jax.random.beta(key, alpha, alpha)
  some = jnp.where(alpha > 0, alpha, 1)
  return jnp.where(alpha > 0, jax.random.beta(key, some, some), 1)


def _accuracy(logits: jax.Array, label: jax.Array) -> jax.Array:
  return jnp.mean(jnp.argmax(logits, -1) == label, dtype=jnp.float32)


def restart(
  state: StockState,
  merged: Params,
  *,
  opt_state: str,
  tx: optax.GradientTransformation,
) -> StockState:
  """Puts every model back on the merged weights.

  Args:
    state: N models, N different weights.
    merged: the weights all start from again.
    opt_state: what becomes of the optimizers: 'keep' each model's own,
      'average' them over models, or 'reset' to fresh ones. The schedule goes
      on in every case: it follows `state.step`.
    tx: the optimizer.

  Returns:
    The state with equal params in all models.
  """
  params = state_lib.replicate(merged, state.key.shape[0])
  match opt_state:
    case 'keep':
      moments = state.opt_state
    case 'average':
      moments = jax.tree.map(_averaged, state.opt_state)
    case 'reset':
      moments = jax.vmap(tx.init)(params)
    case _:
      raise ValueError(f'merge.opt_state: unknown value {opt_state!r}.')
  return state._replace(params=params, opt_state=moments)


def _averaged(leaf: jax.Array) -> jax.Array:
  """The mean over models, given to every model; counts are equal anyway."""
  if not jnp.issubdtype(leaf.dtype, jnp.floating):
    return leaf
  return jnp.broadcast_to(jnp.mean(leaf, axis=0, keepdims=True), leaf.shape)


def norms(anchor: Params, stack: Params) -> Params:
  """The mean norm of the models' displacements, of each leaf: float32[]."""

  def of_leaf(w0: jax.Array, models: jax.Array) -> jax.Array:
    steps = models - w0[None]
    squares = jnp.sum(steps * steps, axis=tuple(range(1, steps.ndim)))
    return jnp.mean(jnp.sqrt(squares))

  return jax.tree.map(of_leaf, anchor, stack)


class Programs(NamedTuple):
  """The compiled parts of a run; each is compiled once."""

  create: Callable[..., StockState]
  # state, batch and, if the recipe refers to one, a `Reference`.
  train: Callable[..., tuple[StockState, Metrics]]
  merge: Callable[[Params, Params], merging.Merged]
  norms: Callable[[Params, Params], Params]  # anchor, stack: see `norms`
  restart: Callable[[StockState, Params], StockState]


def compile_programs(
  recipe: Recipe,
  placement: sharding.Placement,
  *,
  num_models: int,
  layers: merging.Layers | None,
  opt_state: str,
  options: merging.StockOptions,
  strength: float,
) -> Programs:
  """Jits the parts of a run with their shardings.

  Args:
    recipe: network, optimizer and loss.
    placement: where everything lives.
    num_models: N.
    layers: which leaves share a cosine (see `ms.model_stock`).
    opt_state: 'keep', 'average' or 'reset' (see `restart`).
    options: how to merge.
    strength: multiplies every ratio.

  Returns:
    Programs that take and return sharded arrays. `train` and `restart`
    donate the state; the anchor is never donated.
  """
  shapes = jax.eval_shape(recipe.model.init, jax.random.key(0))
  create = functools.partial(
    state_lib.create, tx=recipe.tx, num_models=num_models
  )
  state: Any = placement.state(jax.eval_shape(create, shapes, seed=0))
  params: Any = placement.params(shapes)
  own: Any = placement.stack
  whole: Any = placement.replicated
  near = recipe.context_weight or recipe.projection is not None
  beside = Reference(
    anchor=params if near else None,
    contexts=whole if recipe.context_weight else None,
    tokens=whole if recipe.contrastive else None,
  )
  measure = functools.partial(
    stock.merge, options=options, layers=layers, strength=strength
  )

  def merge(anchor, stack):
    models = sharding.exchange(placement, stack)
    if num_models > 1:
      return measure(anchor, models)
    # Of one model the merge is itself: of its pair the cosine is 1, or not
    # finite where the model is not, or 0 where it has not moved.
    cosine = measure(anchor, models * 2).cosine
    ratio = jax.tree.map(jnp.ones_like, cosine)
    return merging.Merged(models[0], cosine, ratio)

  return Programs(
    create=jax.jit(create, out_shardings=state),
    train=jax.jit(
      functools.partial(train_step, recipe, placement),
      in_shardings=(state, placement.batch, *([beside] * recipe.refers)),
      # Each model's metrics stay with it: nothing crosses models in a step.
      out_shardings=(state, Metrics(own, own, own, learning_rate=whole)),
      donate_argnums=0,
    ),
    merge=jax.jit(
      merge,
      in_shardings=(params, state.params),
      out_shardings=merging.Merged(params, whole, whole),
    ),
    norms=jax.jit(
      norms, in_shardings=(params, state.params), out_shardings=whole
    ),
    restart=jax.jit(
      functools.partial(restart, opt_state=opt_state, tx=recipe.tx),
      in_shardings=(state, params),
      out_shardings=state,
      donate_argnums=0,
      keep_unused=True,  # what is not read is to be freed all the same
    ),
  )
