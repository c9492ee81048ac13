"""Lines of the tables that encoder-decoders share."""

from moe_jax.convert.parts import matrix
from moe_jax.convert.rules import Rule, rule
from moe_jax.convert.transforms import LINEAR, SAME

# Some files repeat the shared table under its other names.
TIED_EMBEDDINGS = (r"(model\.)?(encoder|decoder)\.embed_tokens\.weight",)


def embeddings(prefix: str = "") -> tuple[Rule, ...]:
  """Returns the lines of the tables of tokens; `prefix` is what their keys begin with.

  transformers 5 unties all tables together with the head, and then never reads `shared`.
  """
  return (
    rule(f"{prefix}shared.weight", "decoder.embedding", SAME),
    rule(
      f"{prefix}decoder.embed_tokens.weight",
      "decoder.embedding",
      SAME,
      beside="encoder.embedding",
    ),
    rule(f"{prefix}encoder.embed_tokens.weight", "encoder.embedding", SAME),
    rule("lm_head.weight", "decoder.head", LINEAR),
  )


def networks(hub: str, names: dict[str, str]) -> tuple[Rule, ...]:
  """Returns the lines of a dense feed-forward, or of its router and experts.

  Args:
    hub: what the keys begin with.
    names: the hub's names of `up` and `down`, by ours.
  """
  lines = [
    rule(f"{hub}.router.classifier.weight", "feed_forward.router.kernel", LINEAR),
    rule(f"{hub}.router.classifier.bias", "feed_forward.router.logit_bias", SAME),
  ]
  for keys, ours in ((hub, "weights"), (hub + ".experts.expert_{expert}", "experts.weights")):
    for own, theirs in names.items():
      lines += matrix(f"{keys}.{theirs}", f"feed_forward.{ours}.{own}")
  return tuple(lines)
