"""Lines of the tables that encoder-decoders share."""

from moe_jax.convert.rules import rule
from moe_jax.convert.transforms import LINEAR, SAME

# transformers 5 unties all three tables together with the head, and then never reads `shared`.
EMBEDDINGS = (
  rule("shared.weight", "decoder.embedding", SAME),
  rule("decoder.embed_tokens.weight", "decoder.embedding", SAME, beside="encoder.embedding"),
  rule("encoder.embed_tokens.weight", "encoder.embedding", SAME),
  rule("lm_head.weight", "decoder.head", LINEAR),
)
# Some files repeat the shared one under its other names.
TIED_EMBEDDINGS = (r"(encoder|decoder)\.embed_tokens\.weight",)
