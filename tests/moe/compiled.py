"""`route` compiled once a config, for tests that give one config many inputs."""

import dataclasses
import functools
import re

import jax
import numpy as np

from moe_jax.moe import RoutingConfig, RoutingPlan, route

# Compiling is most of a test's time here, and unoptimised code has the same meaning. Without the
# emitters of fused loops it takes less than half as long; in one module, not one for each of many
# threads, a third less again.
FAST_COMPILE = {
  "xla_backend_optimization_level": "0",
  "xla_cpu_use_fusion_emitters": False,
  "xla_cpu_parallel_codegen_split_count": 1,
}


# Bounded: a process with a thousand live executables runs out of memory maps.
@functools.lru_cache(maxsize=64)
def compiled_route(config: RoutingConfig, train: bool = False):
  """Returns a function of (logits (G, S, E'), mask (G, S), key, more) that gives the plan.

  `more` holds whatever else `route` takes, by name.
  """

  def call(logits, mask, key, more):
    return route(logits, config, token_mask=mask, key=key, train=train, **more)

  return jax.jit(call, compiler_options=FAST_COMPILE)


def routed(
  logits, config: RoutingConfig, *, mask=None, key=None, train=False, **more
) -> RoutingPlan:
  """Routes float32 logits (G, S, E'); without a mask all tokens are real."""
  mask = np.ones(logits.shape[:2], bool) if mask is None else mask
  key = jax.random.key(0) if key is None else key
  return compiled_route(config, train)(logits, mask, key, more)


def tensors(plan: RoutingPlan):
  """Returns the dispatch mask and the combine weights of a plan, (G, S, E, C)."""
  # Plans that differ in their losses alone share a program.
  return _tensors(dataclasses.replace(plan, losses={}, metrics={}))


@functools.partial(jax.jit, compiler_options=FAST_COMPILE)
def _tensors(plan):
  return plan.dispatch_mask(), plan.combine_weights()


def products(fn, *args) -> list[str]:
  """Returns the precision of every product in a function's program, as it is asked for."""
  text = str(jax.make_jaxpr(fn)(*args))
  precisions = re.findall(r"precision=(?:\((?:Precision\.)?(\w+)|(None))", text)
  assert len(precisions) == text.count("dot_general[")
  return [named or default for named, default in precisions]
