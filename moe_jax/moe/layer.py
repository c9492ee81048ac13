"""The MoE layer: router, plan, dispatch, experts, combine."""

import dataclasses
import enum

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.choices import as_choice
from moe_jax.errors import UserError
from moe_jax.layers.dropout import split_key
from moe_jax.layers.mlp import Activation, FeedForward, FeedForwardConfig
from moe_jax.layers.parameters import parameter
from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.dispatch import Dispatch
from moe_jax.moe.expert_parallel import expert_parallel
from moe_jax.moe.experts import ExpertForm, Experts, apply_plan
from moe_jax.moe.grouped import GroupedKernel
from moe_jax.moe.groups import from_groups, to_groups
from moe_jax.moe.losses import loss_weights
from moe_jax.moe.options import Overflow
from moe_jax.moe.plan import DensePlan, RoutingPlan
from moe_jax.moe.registry import Chooser
from moe_jax.moe.replicas import Replica, fetch_copies, replicate_plan, table_of_copies
from moe_jax.moe.router import Router, RouterInit
from moe_jax.moe.routing import route
from moe_jax.sharding.context import current_layout


class SharedCombine(enum.StrEnum):
  """How the output of the shared experts joins that of the routed ones."""

  ADD = "add"  # routed + shared (DeepSeekMoE, arXiv 2401.06066 Eq. 9; Llama 4)
  GATED = "gated"  # routed + sigmoid(x w) * shared (Qwen2-MoE, arXiv 2407.10671)
  COEFFICIENT = "coefficient"  # a softmax of two numbers weighs both (PR-MoE, arXiv 2201.05596)


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """A mixture-of-experts feed-forward layer.

  Attributes:
    routing: the router; its fields are flattened into this config's level in config files.
    hidden_dim: F of one expert; fine-grained experts (DeepSeekMoE) are many small ones.
    gated, activation: the expert network, see `FeedForwardConfig`.
    expert_dropout: dropout inside experts (Switch fine-tunes with 0.4 here and 0.1 elsewhere).
    expert_bias, clamp: biases and clamping inside experts, see `FeedForwardConfig`.
    shared_hidden_dim: hidden width of the shared experts together, which every token visits; 0
      for none. n shared experts of width F are one network of width n * F.
    shared_combine: how the shared experts' output is added.
    router_jitter: multiplicative noise on the router's input in training.
    router_init: how the router's columns stand to each other at first.
    router_dtype: of the router's product, float32 as every paper advises, or bfloat16 to see why.
    dispatch: how tokens travel; changes speed and memory, not results.
    grouped_kernel: what runs the experts of `ragged` dispatch; it belongs to that form alone.
  """

  routing: RoutingConfig = dataclasses.field(metadata={"flatten": True})
  hidden_dim: int
  gated: bool = False
  activation: Activation = Activation.RELU
  expert_dropout: float = 0.0
  expert_bias: bool = False
  clamp: float | None = None
  shared_hidden_dim: int = 0
  shared_combine: SharedCombine = SharedCombine.ADD
  router_jitter: float = 0.0
  router_init: RouterInit = RouterInit.NORMAL
  router_dtype: str = "float32"
  dispatch: Dispatch = Dispatch.GATHER
  grouped_kernel: GroupedKernel = GroupedKernel.AUTO

  def __post_init__(self):
    choices = {
      "dispatch": Dispatch,
      "shared_combine": SharedCombine,
      "router_init": RouterInit,
      "grouped_kernel": GroupedKernel,
    }
    for name, kind in choices.items():
      object.__setattr__(self, name, as_choice(kind, name, getattr(self, name)))
    if self.grouped_kernel != GroupedKernel.AUTO and self.dispatch != Dispatch.RAGGED:
      raise UserError(
        f"grouped_kernel = {self.grouped_kernel} with dispatch = {self.dispatch} would not be"
        " used: set dispatch = ragged, or grouped_kernel = auto"
      )
    if self.router_dtype not in ("float32", "bfloat16"):
      raise UserError(f"router_dtype = {self.router_dtype!r} is not one of float32, bfloat16")
    for name in ("expert_dropout", "router_jitter"):
      if not 0.0 <= getattr(self, name) < 1.0:
        raise UserError(f"{name} = {getattr(self, name)} is refused: it must be in [0, 1)")
    if self.shared_hidden_dim < 0:
      raise UserError(
        f"shared_hidden_dim = {self.shared_hidden_dim} is refused: it must be 0 or greater"
      )
    mixes = self.routing.selector.chooser == Chooser.SLOT
    if mixes and self.dispatch != Dispatch.EINSUM:
      raise UserError(
        f"dispatch = {self.dispatch} cannot carry out selection = {self.routing.selection}, whose"
        " slots mix all tokens; use dispatch = einsum"
      )
    self.feed_forward()

  def check_width(self, model_dim: int) -> None:
    """Refuses a model width that has no room for orthogonal router columns.

    Raises:
      UserError: `router_init = orthogonal` with more logits than dimensions.
    """
    logits = self.routing.num_logits
    if self.router_init == RouterInit.ORTHOGONAL and model_dim < logits:
      raise UserError(
        f"router_init = orthogonal needs model_dim of at least {logits}, one dimension for each"
        f" router logit; model_dim = {model_dim}: use router_init = normal"
      )

  def feed_forward(self) -> FeedForwardConfig:
    """Returns the config of one expert."""
    return FeedForwardConfig(
      self.hidden_dim,
      self.gated,
      self.activation,
      self.expert_dropout,
      self.expert_bias,
      self.clamp,
    )

  def expert_form(self) -> ExpertForm:
    """Returns how experts are reached and computed."""
    return ExpertForm(self.feed_forward(), self.dispatch, self.grouped_kernel)

  def shared_feed_forward(self) -> FeedForwardConfig:
    """Returns the config of the shared experts as one network."""
    return dataclasses.replace(self.feed_forward(), hidden_dim=self.shared_hidden_dim)

  @property
  def needs_key(self) -> bool:
    """Tells whether training draws random numbers."""
    return bool(self.expert_dropout or self.router_jitter or self.routing.needs_key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenInfo:
  """What a router may know of tokens besides their activations.

  Attributes:
    mask: (B, L) bool, True = real token; None = all real.
    ids: (B, L) int32, vocabulary ids; for routing by token id.
    segment_ids: (B, L) int32 of packed sequences; None = every row is one sequence.
  """

  mask: jax.Array | None = None
  ids: jax.Array | None = None
  segment_ids: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterInputs:
  """What a caller gives single routers. A model's has a leading axis of MoE layers everywhere.

  Attributes:
    global_load: (E,) float32 or longer, the load fractions of the whole optimiser step, see
      `moe_jax.moe.routing.route`; None for those of the call.
    expert_ids: (B, L, K) int32, the experts that `selection = replay` forces; None without.
    copied: (spare,) int32, the experts that spare slots hold copies of where a mesh splits experts,
      see `moe_jax.moe.replicas.table_of_copies`; changes no result. None without.
  """

  global_load: jax.Array | None = None
  expert_ids: jax.Array | None = None
  copied: jax.Array | None = None


NO_INPUTS = RouterInputs()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEAux:
  """What a layer decided.

  Attributes:
    router_logits: (B, L, E') float32, jitter included, noise not.
    plan: the routing plan.
    weighted_loss: float32 scalar, the sum of coefficient * loss.
  """

  router_logits: jax.Array
  plan: RoutingPlan | DensePlan
  weighted_loss: jax.Array


class MoELayer(nnx.Module):
  """Mixture-of-experts layer (Shazeer et al., arXiv 1701.06538) on (B, L, D).

  Tokens whose experts are all full come out as zeros (plus shared experts): add the residual
  outside. What was dropped is in `aux.plan.metrics`. Padding comes out as zeros.

  With a `vocab_size` the layer of `selection = table` keeps a table, and `token_ids` are ids of
  that vocabulary; without one they are the expert ids themselves.
  """

  def __init__(
    self,
    model_dim: int,
    config: MoEConfig,
    *,
    key: jax.Array,
    init_scale: float = 1.0,
    vocab_size: int | None = None,
  ):
    config.check_width(model_dim)
    router_key, experts_key = jax.random.split(key)
    self.config = config
    self.router = Router(
      model_dim,
      config.routing,
      key=router_key,
      scale=init_scale,
      jitter=config.router_jitter,
      init=config.router_init,
      dtype=config.router_dtype,
      vocab_size=vocab_size,
    )
    self.experts = Experts(
      model_dim,
      config.routing.num_experts,
      config.feed_forward(),
      key=experts_key,
      scale=init_scale,
    )
    if config.shared_hidden_dim:
      self.shared = SharedExperts(
        model_dim, config, key=jax.random.fold_in(key, 2), scale=init_scale
      )

  def __call__(
    self,
    x: jax.Array,
    *,
    token_mask: jax.Array | None = None,
    token_ids: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    inputs: RouterInputs = NO_INPUTS,
    key: jax.Array | None = None,
    train: bool = False,
  ) -> tuple[jax.Array, MoEAux]:
    """Routes x (B, L, D) to experts and back.

    Args:
      x: (B, L, D) activations, any float dtype.
      token_mask, token_ids, segment_ids: see `TokenInfo`.
      inputs: see `RouterInputs`.
      key: random key for training.
      train: picks capacity factor, jitter, dropout and random selection.

    Returns:
      y (B, L, D) in the dtype of x, and the aux record.

    Raises:
      UserError: a mask that does not fit x, or training without a key that it needs.
    """
    if train and key is None and self.config.needs_key:
      raise UserError(
        "the MoE layer draws random numbers in training (dropout, jitter, noise or"
        " a random selection): key = None was given, a jax.random.key is needed"
      )
    jitter_key, select_key, dropout_key, shared_key = split_key(key if train else None, 4)
    mask = _checked_mask(x, token_mask)
    logits, noise_std = self.router(x, key=jitter_key)
    tokens = TokenInfo(mask, token_ids, segment_ids)
    plan = self._route(logits, noise_std, tokens, inputs, select_key, train)
    y = self._apply_experts(x, plan, inputs.copied, dropout_key)
    if self.config.shared_hidden_dim:
      y = jnp.where(mask[..., None], self.shared(x, y, key=shared_key), 0)
    return y, MoEAux(logits, plan, self._weighted(plan.losses))

  def _route(self, logits, noise_std, tokens: TokenInfo, inputs: RouterInputs, key, train):
    config = self.config.routing
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    ids = 0 if tokens.segment_ids is None else tokens.segment_ids
    # Unique over rows: groups of several sequences must not join the end of one to the next.
    segments = jnp.broadcast_to(ids * logits.shape[0] + rows, logits.shape[:2])

    def group(a):
      return None if a is None else to_groups(a, config)

    return route(
      group(logits),
      config,
      token_mask=group(tokens.mask),
      token_ids=group(self._selecting_ids(tokens.ids)),
      segment_ids=group(segments),
      noise_scale=group(noise_std),
      bias=self.router.bias[...] if hasattr(self.router, "bias") else None,
      expert_ids=group(inputs.expert_ids),
      global_load=inputs.global_load,
      key=key,
      train=train,
    )

  def _selecting_ids(self, ids):
    if ids is None or not hasattr(self.router, "table"):
      return ids
    # Padding may hold any id.
    return self.router.table[...].at[ids].get(mode="clip")

  def _apply_experts(self, x, plan, copied, key):
    x_GSD, layout, weights = (
      to_groups(x, self.config.routing),
      current_layout(),
      self.experts.arrays(),
    )
    form, axes, used = self.config.expert_form(), self.experts.axes(), plan
    if layout is None:
      y_GSD = apply_plan(x_GSD, plan, weights, key, form)
    else:
      if copied is not None and layout.parts("expert") > 1:
        weights = {name: value.astype(x.dtype) for name, value in weights.items()}
        weights = fetch_copies(weights, copied, axes, layout)
        table = table_of_copies(copied, plan.num_experts, layout.parts("expert"))
        # Dropless routing has not counted the queues that `even` reads.
        dropless = self.config.routing.overflow == Overflow.DROPLESS
        used = replicate_plan(plan, table, replica=Replica.TOKEN if dropless else Replica.EVEN)
      y_GSD = expert_parallel(x_GSD, used, weights, axes, key, form, layout)
    if isinstance(plan, RoutingPlan) and plan.identity is not None:
      y_GSD = y_GSD + (plan.identity[..., None] * x_GSD).astype(x.dtype)
    return from_groups(y_GSD, x.shape)

  def _weighted(self, losses):
    scale = self.router.balance_scale[...] if hasattr(self.router, "balance_scale") else 1.0
    total = jnp.float32(0.0)
    for name, weight in loss_weights(self.config.routing).items():
      # A coefficient of 0 must not meet the NaN that a loss may be where it is not used.
      if weight and name in losses:
        total += weight * (scale if name == "load_balance" else 1.0) * losses[name]
    return total


class SharedExperts(nnx.Module):
  """Feed-forward that every token visits, and what joins it to the routed experts."""

  def __init__(self, model_dim: int, config: MoEConfig, *, key: jax.Array, scale: float):
    self.combine = config.shared_combine
    network_key, gate_key = jax.random.split(key)
    self.network = FeedForward(
      model_dim, config.shared_feed_forward(), key=network_key, scale=scale
    )
    outputs = {SharedCombine.ADD: 0, SharedCombine.GATED: 1, SharedCombine.COEFFICIENT: 2}
    if outputs[self.combine]:
      shape = (model_dim, outputs[self.combine])
      self.gate = parameter(gate_key, shape, ("embed", "router"), fan_in=model_dim, scale=scale)

  def __call__(self, x: jax.Array, routed: jax.Array, *, key: jax.Array | None) -> jax.Array:
    """Returns (B, L, D): the routed experts' output joined with the shared experts' of x."""
    shared = self.network(x, key=key)
    if self.combine == SharedCombine.ADD:
      return routed + shared
    logits = jnp.matmul(x.astype(jnp.float32), self.gate[...], precision=jax.lax.Precision.HIGHEST)
    if self.combine == SharedCombine.GATED:
      return routed + jax.nn.sigmoid(logits).astype(x.dtype) * shared
    share = jax.nn.softmax(logits, axis=-1).astype(x.dtype)
    return share[..., :1] * routed + share[..., 1:] * shared


def _checked_mask(x, token_mask):
  if token_mask is None:
    return jnp.ones(x.shape[:2], bool)
  if token_mask.shape != x.shape[:2]:
    # Groups are a reshape, which would accept a transposed mask.
    raise UserError(f"token_mask has shape {token_mask.shape}; expected {x.shape[:2]}")
  return token_mask
