"""Select stage, token choice: which experts a token asks for."""

import jax
import jax.numpy as jnp

from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.registry import SelectView, TokenChoice, register_selection
from moe_jax.moe.scores import by_expert_group
from moe_jax.moe.segments import segment_runs
from moe_jax.sharding.local import row_top_k


def ask(expert_GSK: jax.Array) -> TokenChoice:
  """Returns the choice in which every selected expert is asked."""
  return TokenChoice(expert_GSK.astype(jnp.int32), jnp.ones(expert_GSK.shape, bool))


@register_selection("top_k", ranked=True)
def top_k(view: SelectView, config: RoutingConfig) -> TokenChoice:
  """Selects the K largest; ties go to the lower expert id."""
  _, expert_GSK = row_top_k(view.ranking, config.top_k)
  # On CPU, XLA makes a full sort over E out of a top-k whose result is sliced, as the balance loss
  # slices it: 22 ms for 4,096 tokens and 64 experts, where selecting takes 2.
  return ask(jax.lax.optimization_barrier(expert_GSK))


@register_selection("random_second", draws=True, ranked=True)
def random_second(view: SelectView, config: RoutingConfig) -> TokenChoice:
  """Selects two, and asks the second with probability min(1, g2 / second_threshold) in training.

  g2 is the second score divided by the sum of both. A threshold of 0.5 is GShard's 2 g2 > u
  (arXiv 2006.16668 Algorithm 1); ST-MoE uses 0.2 (arXiv 2202.08906 appendix C). Outside training
  the second is always asked.
  """
  choice = top_k(view, config)
  if not view.train:
    return choice
  share_GS = _second_share(view, choice)
  drawn_GS = jax.random.uniform(view.key, share_GS.shape)
  used_GS = share_GS > drawn_GS * config.second_threshold
  return TokenChoice(choice.expert, choice.used.at[..., 1].set(used_GS))


@register_selection("threshold_second", ranked=True)
def threshold_second(view: SelectView, config: RoutingConfig) -> TokenChoice:
  """Selects two, and asks the second where its share of both scores exceeds second_threshold.

  The `threshold` policy of Mesh TensorFlow's top-2 gating.
  """
  choice = top_k(view, config)
  used_GS = _second_share(view, choice) > config.second_threshold
  return TokenChoice(choice.expert, choice.used.at[..., 1].set(used_GS))


def _second_share(view: SelectView, choice: TokenChoice) -> jax.Array:
  score_GSK = jnp.take_along_axis(view.scores, choice.expert, axis=-1)
  total_GS = jnp.sum(score_GSK, axis=-1)
  return score_GSK[..., 1] / jnp.where(total_GS > 0, total_GS, 1.0)


@register_selection("sample", draws=True)
def sample(view: SelectView, config: RoutingConfig) -> TokenChoice:
  """Samples K experts without replacement in proportion to their scores; outside training, top-k.

  Gumbel noise on the logarithm of the scores (arXiv 1903.06059): the K largest are such a sample.
  """
  if not view.train:
    return top_k(view, config)
  tiny = jnp.finfo(jnp.float32).tiny
  noisy = jnp.log(jnp.maximum(view.scores, tiny)) + jax.random.gumbel(view.key, view.scores.shape)
  return ask(row_top_k(noisy, config.top_k)[1])


@register_selection("random", draws=True, learned=False)
def random(view: SelectView, config: RoutingConfig) -> TokenChoice:
  """Selects K experts uniformly, without replacement: duplicates would double a weight.

  Outside training the choice is a fixed function of the position in the group.
  """
  if view.train:
    drawn = jax.random.uniform(view.key, view.scores.shape)
  else:
    # Without the axis of groups, or a token's experts would depend on its row of the batch.
    fixed = jax.random.uniform(jax.random.key(config.hash_seed), (1, *view.scores.shape[1:]))
    drawn = jnp.broadcast_to(fixed, view.scores.shape)
  return ask(row_top_k(drawn, config.top_k)[1])


@register_selection("positive")
def positive(view: SelectView, config: RoutingConfig) -> TokenChoice:
  """Asks every expert whose score is above 0 (ReMoE, arXiv 2412.14711 Eq. 5)."""
  score_GSE, expert_GSE = row_top_k(view.ranking, config.num_experts)
  return TokenChoice(expert_GSE.astype(jnp.int32), score_GSE > 0)


@register_selection("hierarchical")
def hierarchical(view: SelectView, config: RoutingConfig) -> TokenChoice:
  """Selects gates, then experts inside each of them (arXiv 1701.06538 appendix B).

  Returns the K / gates best experts of the best gate, then those of the next.
  """
  gates, E = config.num_expert_groups, config.num_experts
  _, gate_GSA = row_top_k(view.logits[..., E:], config.top_expert_groups)
  inner = by_expert_group(view.logits[..., :E], gates)
  _, best = row_top_k(inner, config.top_k // config.top_expert_groups)
  best_GSAB = jnp.take_along_axis(best, gate_GSA[..., None], axis=-2)
  expert = gate_GSA[..., None] * (E // gates) + best_GSAB
  return ask(expert.reshape(*expert.shape[:-2], config.top_k))


@register_selection("hash", learned=False, needs_token_ids=True)
def hash_ids(view: SelectView, config: RoutingConfig) -> TokenChoice:
  """Selects by the token's id, whatever the router says (hash layers, arXiv 2106.04426).

  `hash_ngram` = 1 hashes the id, 2 also the id before it, and so on; what stands before the first
  token of the sequence (of the group, without `segment_ids`) and padding count as id 0. The K
  choices are K consecutive experts from the hashed one on. `table` balances by frequency.
  """
  hashed_GS = jnp.full(view.token_ids.shape, config.hash_seed, jnp.uint32)
  for back in range(config.hash_ngram):
    hashed_GS = mix_bits(hashed_GS ^ mix_bits(_ids_before(view, back).astype(jnp.uint32) + 1))
  return _consecutive((hashed_GS % config.num_experts).astype(jnp.int32), config)


def _ids_before(view: SelectView, back: int) -> jax.Array:
  """Returns (G, S) the id `back` tokens earlier in the sequence, 0 where there is none."""

  def shifted(a_GS):
    return jnp.pad(a_GS, ((0, 0), (back, 0)))[:, : a_GS.shape[1]]

  there_GS = shifted(view.mask)
  if view.segment_ids is not None:
    # Packed documents may share an id that comes back later in the row; their runs differ.
    run_GS = segment_runs(view.segment_ids)
    there_GS &= shifted(run_GS) == run_GS
  return jnp.where(there_GS, shifted(view.token_ids), 0)


@register_selection("table", learned=False, needs_token_ids=True)
def table(view: SelectView, config: RoutingConfig) -> TokenChoice:
  """Takes `token_ids` as the expert ids themselves, as looked up in a table.

  A model has that table, see `moe_jax.moe.router.Router`; `moe_jax.moe.hashing.balanced_table`
  makes one.
  """
  return _consecutive(view.token_ids.astype(jnp.int32) % config.num_experts, config)


def _consecutive(first_GS: jax.Array, config: RoutingConfig) -> TokenChoice:
  offset_11K = jnp.arange(config.top_k, dtype=jnp.int32)[None, None]
  return ask((first_GS[..., None] + offset_11K) % config.num_experts)


def mix_bits(value: jax.Array) -> jax.Array:
  """Mixes uint32 bits so that consecutive ids land on unrelated experts (MurmurHash3 finaliser)."""
  value = (value ^ (value >> 16)) * jnp.uint32(0x85EBCA6B)
  value = (value ^ (value >> 13)) * jnp.uint32(0xC2B2AE35)
  return value ^ (value >> 16)


@register_selection("replay", needs_expert_ids=True)
def replay(view: SelectView, config: RoutingConfig) -> TokenChoice:
  """Forces recorded experts; a negative id asks nobody.

  Weights come from the router's present scores of those experts, so that it still trains.
  """
  expert_GSK = view.expert_ids.astype(jnp.int32)
  return TokenChoice(jnp.maximum(expert_GSK, 0), expert_GSK >= 0)
