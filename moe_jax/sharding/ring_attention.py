"""Ring attention: keys and values travel round the devices that share a sequence.

Every device keeps the queries of its part of the sequence and sees one part's keys and values at a
time, whose weights join a running softmax (arXiv 2310.01889 section 3; the softmax is that of
arXiv 2112.05682). The backward pass sends keys and values round once more, and their gradients
with them, so no device ever holds the keys of the whole sequence. What it holds of size L x M / n
is the mask, and a relative bias where there is one.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe_jax.errors import UserError
from moe_jax.sharding.layout import Layout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
  """What changes the products of queries and keys.

  Attributes:
    mask: (B, L, M) bool, True = query l may look at key m.
    bias: (H, B, L, M) float32, added to the scaled products; None without.
    sinks: (H,) float32, one more logit of each head's softmax, without a value; None without.
  """

  mask: jax.Array
  bias: jax.Array | None
  sinks: jax.Array | None


def ring_attend(
  q_BLHK: jax.Array,
  k_BMNK: jax.Array,
  v_BMNK: jax.Array,
  scores: Scores,
  scale: float,
  layout: Layout,
) -> jax.Array:
  """Returns softmax(scale q k^T + bias) v, (B, L, H, K'), as `moe_jax.layers.attend` does.

  Args:
    q_BLHK: queries, split over the mesh as batch, length and heads are.
    k_BMNK: keys, in as many parts as queries.
    v_BMNK: values; their width K' may differ from that of the keys.
    scores: masks, biases and sinks.
    scale: of the products.
    layout: the mesh; its axes of "length" make the ring.

  Raises:
    UserError: a length that the ring does not divide.
  """
  ring, n = layout.mesh_axes("length"), layout.parts("length")
  for what, size in (("queries", q_BLHK.shape[1]), ("keys", k_BMNK.shape[1])):
    if size % n:
      near = f"{size // n * n} or {-(-size // n) * n}" if size > n else f"{n}"
      raise UserError(
        f"{size} {what} a row do not split over a ring of sequence = {n}: make them {near}, or use"
        " context = all_gather"
      )
  queries = layout.spec(("batch", "length", "heads", None), q_BLHK.shape, "queries")
  keys = layout.spec(("batch", "length", "kv_heads", None), k_BMNK.shape, "keys")
  batch, length, heads, _ = queries
  scores_spec = Scores(
    mask=PartitionSpec(batch, length, None),
    bias=None if scores.bias is None else PartitionSpec(heads, batch, length, None),
    sinks=None if scores.sinks is None else PartitionSpec(heads),
  )
  run = jax.shard_map(
    functools.partial(_on_device, _Ring(ring, n, scale)),
    mesh=layout.mesh,
    in_specs=(queries, keys, keys, scores_spec),
    out_specs=queries,
    check_vma=False,
  )
  return run(q_BLHK, k_BMNK, v_BMNK, scores)


@dataclasses.dataclass(frozen=True)
class _Ring:
  """The devices of a ring.

  Attributes:
    axes: of the mesh.
    size: number of devices.
    scale: of the products.
  """

  axes: tuple[str, ...]
  size: int
  scale: float

  def pass_on(self, tree):
    """Sends everything to the next device."""
    pairs = [(i, (i + 1) % self.size) for i in range(self.size)]
    return jax.tree.map(lambda a: jax.lax.ppermute(a, self.axes, pairs), tree)

  def source(self, step: jax.Array) -> jax.Array:
    """Returns whose keys are here after that many steps."""
    return (jax.lax.axis_index(self.axes) - step) % self.size


def _on_device(ring: _Ring, q, k, v, scores: Scores) -> jax.Array:
  """Attends from the device's own queries to all keys, heads in front of positions."""
  (B, L, H, K), N = q.shape, k.shape[2]
  grouped = q.reshape(B, L, N, H // N, K).transpose(0, 2, 3, 1, 4)
  out = _attend(ring, grouped, k.swapaxes(1, 2), v.swapaxes(1, 2), scores)
  return out.transpose(0, 3, 1, 2, 4).reshape(B, L, H, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: _Ring, q_BNRLK, k_BNMK, v_BNMK, scores: Scores) -> jax.Array:
  """Returns (B, N, R, L, K') of R queries a key-value head."""
  return _forward(ring, q_BNRLK, k_BNMK, v_BNMK, scores)[0]


def _forward(ring: _Ring, q, k, v, scores: Scores):
  def look(sums, keys_values, step):
    """Adds a part's weights to a running maximum, their sum, and their sum of values."""
    largest, total, mixed = sums
    k, v = keys_values
    logits = _logits(ring, q, k, scores, step)
    new = jnp.maximum(largest, jnp.max(logits, axis=-1))
    fade, weights = jnp.exp(largest - new), jnp.exp(logits - new[..., None])
    added = jnp.einsum(
      "BNRLM,BNMK->BNRLK", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return new, total * fade + jnp.sum(weights, axis=-1), mixed * fade[..., None] + added

  def turn(carry, step):
    sums, keys_values = carry
    keys_values = ring.pass_on(keys_values)
    return (look(sums, keys_values, step), keys_values), None

  sums = look(_before(q, v, scores), (k, v), jnp.int32(0))
  ((largest, total, mixed), _), _ = jax.lax.scan(turn, (sums, (k, v)), jnp.arange(1, ring.size))
  out = (mixed / total[..., None]).astype(v.dtype)
  # Apart, since the sum would lose the total of a query that sees nothing to the -1e30 beside it.
  return out, (q, k, v, scores, out, (largest, total))


def _backward(ring: _Ring, kept, dout):
  """Returns the gradients; `ring` and masks have none.

  With weights P of values V, dP = dO V^T and dS = P * (dP - sum(dO * O)): arXiv 2205.14135
  appendix B.
  """
  q, k, v, scores, out, softmax = kept
  dout32 = dout.astype(jnp.float32)
  shared = jnp.sum(dout32 * out.astype(jnp.float32), axis=-1)

  def look(gradients, travelling, step):
    dq, dbias = gradients
    k, v, dk, dv = travelling
    weights = _weights(_logits(ring, q, k, scores, step), softmax)
    of_weights = jnp.einsum("BNRLK,BNMK->BNRLM", dout, v, preferred_element_type=jnp.float32)
    dlogits = weights * (of_weights - shared[..., None])
    dq += ring.scale * jnp.einsum("BNRLM,BNMK->BNRLK", dlogits, k.astype(jnp.float32))
    dk += ring.scale * jnp.einsum("BNRLM,BNRLK->BNMK", dlogits, q.astype(jnp.float32))
    dv += jnp.einsum("BNRLM,BNRLK->BNMK", weights, dout32)
    if dbias is not None:
      dbias = _put(ring, dbias, dlogits, step)
    return (dq, dbias), (k, v, dk, dv)

  def turn(carry, step):
    gradients, travelling = carry
    return look(gradients, ring.pass_on(travelling), step), None

  zeros = [jnp.zeros(a.shape, jnp.float32) for a in (q, k, v)]
  dbias = None if scores.bias is None else jnp.zeros_like(scores.bias)
  carry = look((zeros[0], dbias), (k, v, zeros[1], zeros[2]), jnp.int32(0))
  ((dq, dbias), travelled), _ = jax.lax.scan(turn, carry, jnp.arange(1, ring.size))
  # One step more, and every gradient is where its keys are.
  dk, dv = ring.pass_on(travelled[2:])
  dscores = Scores(None, dbias, _sink_gradients(scores.sinks, softmax, shared))
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dscores


_attend.defvjp(_forward, _backward)


def _before(q, v, scores: Scores):
  """Returns the running softmax before the first key: of the sink alone, or of nothing."""
  shape = q.shape[:-1]
  if scores.sinks is None:
    largest, total = jnp.full(shape, -jnp.inf), jnp.zeros(shape)
  else:
    largest, total = _by_head(scores.sinks, shape), jnp.ones(shape)
  return largest, total, jnp.zeros((*shape, v.shape[-1]))


def _logits(ring: _Ring, q, k, scores: Scores, step) -> jax.Array:
  """Returns (B, N, R, L, M) float32 of the device's queries and the keys that are here."""
  logits = jnp.einsum("BNRLK,BNMK->BNRLM", q * ring.scale, k, preferred_element_type=jnp.float32)
  start, count = ring.source(step) * k.shape[2], k.shape[2]
  mask_BLM = jax.lax.dynamic_slice_in_dim(scores.mask, start, count, axis=2)
  # Finite, so that a query that sees nothing gets a mean and not NaN.
  logits += jnp.where(mask_BLM, 0.0, -1e30)[:, None, None]
  if scores.bias is None:
    return logits
  bias_HBLM = jax.lax.dynamic_slice_in_dim(scores.bias, start, count, axis=3)
  (B, N, R, L, _) = q.shape
  return logits + bias_HBLM.reshape(N, R, B, L, count).transpose(2, 0, 1, 3, 4)


def _put(ring: _Ring, dbias_HBLM, dlogits, step) -> jax.Array:
  """Returns the gradient of a bias with that of the keys that are here."""
  B, N, R, L, M = dlogits.shape
  part = dlogits.transpose(1, 2, 0, 3, 4).reshape(N * R, B, L, M)
  start = ring.source(step) * M
  return jax.lax.dynamic_update_slice_in_dim(dbias_HBLM, part, start, axis=3)


def _weights(logits_BNRLM, softmax) -> jax.Array:
  """Returns the weights of a finished softmax, of largest logits and totals (B, N, R, L)."""
  largest, total = softmax
  return jnp.exp(logits_BNRLM - largest[..., None]) / total[..., None]


def _sink_gradients(sinks_H, softmax, shared) -> jax.Array | None:
  """Returns (H,): a sink has no value, so its dP is 0."""
  if sinks_H is None:
    return None
  weights = _weights(_by_head(sinks_H, shared.shape)[..., None], softmax)[..., 0]
  return -jnp.sum(weights * shared, axis=(0, 3)).reshape(sinks_H.shape)


def _by_head(sinks_H, shape) -> jax.Array:
  """Returns a number a head as (B, N, R, L)."""
  return jnp.broadcast_to(sinks_H.reshape(1, *shape[1:3], 1), shape)
