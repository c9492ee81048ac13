"""The MoE layer: router, plan, dispatch, experts, combine."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.choices import as_choice
from moe_jax.errors import UserError
from moe_jax.layers.dropout import split_key
from moe_jax.layers.mlp import Activation, FeedForwardConfig
from moe_jax.moe.dispatch import Dispatch, get_dispatcher
from moe_jax.moe.experts import Experts
from moe_jax.moe.grouped import GroupedKernel
from moe_jax.moe.groups import from_groups, to_groups
from moe_jax.moe.router import Router
from moe_jax.moe.routing import route
from moe_jax.moe.types import RoutingConfig, RoutingPlan, Selection


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """A mixture-of-experts feed-forward layer.

  Attributes:
    routing: the router; its fields are flattened into this config's level in config files.
    hidden_dim: F of one expert.
    gated, activation: the expert network, see `FeedForwardConfig`.
    expert_dropout: dropout inside experts (Switch fine-tunes with 0.4 here and 0.1 elsewhere).
    router_jitter: multiplicative noise on the router's input in training.
    dispatch: how tokens travel; changes speed and memory, not results.
    grouped_kernel: what runs the experts of `ragged` dispatch; it belongs to that form alone.
  """

  routing: RoutingConfig = dataclasses.field(metadata={"flatten": True})
  hidden_dim: int
  gated: bool = False
  activation: Activation = Activation.RELU
  expert_dropout: float = 0.0
  router_jitter: float = 0.0
  dispatch: Dispatch = Dispatch.GATHER
  grouped_kernel: GroupedKernel = GroupedKernel.AUTO

  def __post_init__(self):
    object.__setattr__(self, "dispatch", as_choice(Dispatch, "dispatch", self.dispatch))
    kernel = as_choice(GroupedKernel, "grouped_kernel", self.grouped_kernel)
    object.__setattr__(self, "grouped_kernel", kernel)
    if kernel != GroupedKernel.AUTO and self.dispatch != Dispatch.RAGGED:
      raise UserError(
        f"grouped_kernel = {kernel} with dispatch = {self.dispatch} would not be used: set"
        " dispatch = ragged, or grouped_kernel = auto"
      )
    for name in ("expert_dropout", "router_jitter"):
      if not 0.0 <= getattr(self, name) < 1.0:
        raise UserError(f"{name} = {getattr(self, name)} is refused: it must be in [0, 1)")
    self.feed_forward()

  def feed_forward(self) -> FeedForwardConfig:
    """Returns the config of one expert."""
    return FeedForwardConfig(self.hidden_dim, self.gated, self.activation, self.expert_dropout)

  @property
  def needs_key(self) -> bool:
    """Tells whether training draws random numbers."""
    random_select = self.routing.selection == Selection.RANDOM_SECOND
    return bool(self.expert_dropout or self.router_jitter or random_select)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEAux:
  """What a layer decided: router_logits (B, L, E) float32, jitter included, and the plan."""

  router_logits: jax.Array
  plan: RoutingPlan


class MoELayer(nnx.Module):
  """Mixture-of-experts layer (Shazeer et al., arXiv 1701.06538) on (B, L, D).

  Tokens whose experts are all full come out as zeros: add the residual outside. What was dropped
  is in `aux.plan.metrics`. Padding (token_mask False) comes out as zeros.
  """

  def __init__(self, model_dim: int, config: MoEConfig, *, key: jax.Array, init_scale: float = 1.0):
    router_key, experts_key = jax.random.split(key)
    self.config = config
    self.router = Router(
      model_dim,
      config.routing.num_experts,
      key=router_key,
      scale=init_scale,
      jitter=config.router_jitter,
    )
    self.experts = Experts(
      model_dim,
      config.routing.num_experts,
      config.feed_forward(),
      key=experts_key,
      scale=init_scale,
      kernel=config.grouped_kernel,
    )

  def __call__(
    self,
    x: jax.Array,
    *,
    token_mask: jax.Array | None = None,
    key: jax.Array | None = None,
    train: bool = False,
  ) -> tuple[jax.Array, MoEAux]:
    """Routes x (B, L, D) to experts and back.

    Args:
      x: (B, L, D) activations, any float dtype.
      token_mask: (B, L) bool, True = real token; None = all real.
      key: random key for training.
      train: picks capacity factor, jitter, dropout and random selection.

    Returns:
      y (B, L, D) in the dtype of x, and the aux record.

    Raises:
      UserError: a mask that does not fit x, or training without a key that it needs.
    """
    if train and key is None and self.config.needs_key:
      raise UserError(
        "the MoE layer draws random numbers in training (dropout, jitter or"
        " random_second): key = None was given, a jax.random.key is needed"
      )
    routing = self.config.routing
    jitter_key, select_key, dropout_key = split_key(key if train else None, 3)
    logits = self.router(x, key=jitter_key)
    if token_mask is None:
      token_mask = jnp.ones(x.shape[:2], bool)
    elif token_mask.shape != x.shape[:2]:
      # Groups are a reshape, which would accept a transposed mask.
      raise UserError(f"token_mask has shape {token_mask.shape}; expected {x.shape[:2]}")
    x_GSD, logits_GSE, mask_GS = (to_groups(a, routing) for a in (x, logits, token_mask))
    plan = route(logits_GSE, routing, token_mask=mask_GS, key=select_key, train=train)

    dispatcher = get_dispatcher(self.config.dispatch)
    with jax.named_scope("dispatch"):
      rows = dispatcher.dispatch(x_GSD, plan)
    rows = self.experts(rows, key=dropout_key)
    with jax.named_scope("combine"):
      y_GSD = dispatcher.combine(rows, plan)
    return from_groups(y_GSD, x.shape), MoEAux(logits, plan)
