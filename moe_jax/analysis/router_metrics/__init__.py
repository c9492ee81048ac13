"""Router metrics as pure functions of counts, expert ids, probabilities and masks.

Axis letters as everywhere (`moe_jax.moe.options`); `...` stands for the axes of tokens. Every
docstring gives the formula, its source and the value of a uniform or random router; where that
depends on the sample a function `expected_...` or `..._floor` returns it, to be printed beside.

| module | subject |
|---|---|
| `balance` | load: entropy, CV, importance, MaxVio, dead experts, normalised balance loss |
| `drops` | dropped assignments and tokens, unrouted tokens, filled slots |
| `confidence` | probabilities and logits: confidence, margin, entropy, information, magnitude |
| `stability` | over checkpoints: saturation, fluctuation |
| `coactivation` | which experts a token uses together |
| `specialization` | domains and vocabulary |
| `repetition` | consecutive tokens |
| `paths` | across layers |
| `similarity` | experts' weights and outputs |
| `communication` | devices a token visits |
| `information` | entropy, mutual information and divergence underneath |

What takes many small operations is compiled, so that calls outside a compiled function are one
program each.

Sums over microbatches and devices: `moe_jax.analysis.routing_counts`.
"""
