"""E01: parameter counts as papers, model cards and popular summaries print them."""

from moe_jax.sweep.printed_sizes import Figure, PrintedSizes, WrongClaim

_ROUND = "printed active figure is a round number"

_FIGURES = (
  Figure(
    "GLaM 0.1B",
    "configs/glam.py:0_1b",
    "130M",
    "130M",
    "printed figure unexplained: 113 M without, 138 M with an embedding of 32,000",
  ),
  Figure(
    "GLaM 0.1B/64E",
    "configs/glam.py:0_1b_64e",
    "1.9B",
    "145M",
    "printed active figure unexplained: 128 M without, 152 M with the embedding",
  ),
  Figure("GLaM 1.7B", "configs/glam.py:1_7b", "1.7B", "1.7B"),
  Figure(
    "GLaM 1.7B/32E",
    "configs/glam.py:1_7b_32e",
    "20B",
    "1.878B",
    "the paper's 20B is wrong: its own 27B at 64 and 53B at 128 experts put 32 at 14B",
  ),
  Figure("GLaM 1.7B/64E", "configs/glam.py:1_7b_64e", "27B", "1.879B"),
  Figure("GLaM 1.7B/128E", "configs/glam.py:1_7b_128e", "53B", "1.881B"),
  Figure(
    "GLaM 1.7B/256E",
    "configs/glam.py:1_7b_256e",
    "105B",
    "1.886B",
    "printed figures 0.8 % and 0.1 % larger, unexplained",
  ),
  Figure("GLaM 8B", "configs/glam.py:8b", "8.7B", "8.7B"),
  Figure("GLaM 8B/64E", "configs/glam.py:8b_64e", "143B", "9.8B"),
  Figure("GLaM 137B", "configs/glam.py:137b", "137B", "137B", "printed total is cut, not rounded"),
  Figure(
    "GLaM 64B/64E",
    "configs/glam.py:64b_64e",
    "1.2T",
    "96.6B",
    "only with a vocabulary of 256,000; 94.8B active with the other rows' 32,000",
  ),
  Figure("Mixtral 8x7B", "configs/mixtral.py:8x7b", "46.7B", "12.9B"),
  Figure("Mixtral 8x22B", "configs/mixtral.py:8x22b", "141B", "39B"),
  Figure("DeepSeekMoE 16B", "configs/deepseek.py:moe_16b", "16.4B", "2.8B"),
  Figure(
    "DeepSeek-V2-Lite",
    "configs/deepseek.py:v2_lite",
    "15.7B",
    "2.4B",
    "2.45B without the input embedding, cut",
  ),
  Figure("DeepSeek-V2", "configs/deepseek.py:v2", "236B", "21B"),
  Figure(
    "DeepSeek-V3",
    "configs/deepseek.py:v3",
    "671B",
    "37B",
    "685B on the hub: with multi-token prediction, 11.61B, and its copies of embedding and head",
  ),
  Figure(
    "Llama 4 Scout",
    "configs/llama4.py:scout",
    "109B",
    "17B",
    "active figure also that of the text alone, 17.17B",
  ),
  Figure(
    "Llama 4 Maverick",
    "configs/llama4.py:maverick",
    "402B",
    "17B",
    "total as the hub counts it; active figure also that of the text alone, 17.18B",
  ),
  Figure(
    "Llama 4 Scout, text",
    "configs/llama4.py:scout_text",
    "109B",
    "17B",
    "printed total has the vision tower, 0.87B: 108.6B",
  ),
  Figure(
    "Llama 4 Maverick, text",
    "configs/llama4.py:maverick_text",
    "400B",
    "17B",
    "printed total is cut; 402B with the vision tower",
  ),
  Figure("OLMoE-1B-7B", "configs/olmoe.py:1b_7b", "6.9B", "1.3B"),
  Figure("Qwen1.5-MoE-A2.7B", "configs/qwen_moe.py:1_5_a2_7b", "14.3B", "2.7B"),
  Figure("Qwen2-57B-A14B", "configs/qwen_moe.py:2_57b_a14b", "57B", "14B"),
  Figure(
    "Qwen3-30B-A3B",
    "configs/qwen_moe.py:3_30b_a3b",
    "30.5B",
    "3.3B",
    "3.35B with all embeddings, cut",
  ),
  Figure("Qwen3-235B-A22B", "configs/qwen_moe.py:3_235b_a22b", "235B", "22B"),
  Figure("gpt-oss-20b", "configs/gpt_oss.py:20b", "20.9B", "3.6B"),
  Figure("gpt-oss-120b", "configs/gpt_oss.py:120b", "116.8B", "5.1B"),
  Figure("Phi-3.5-MoE", "configs/phi_moe.py:3_5", "42B", "6.6B"),
  Figure("DBRX", "configs/dbrx.py:base", "132B", "36B"),
  Figure(
    "GLM-4.5-Air",
    "configs/glm4_moe.py:4_5_air",
    "106B",
    "12B",
    "printed total is without embeddings, as its active figure: 105.6B",
  ),
  Figure(
    "GLM-4.5",
    "configs/glm4_moe.py:4_5",
    "355B",
    "32B",
    "printed total is without embeddings and with multi-token prediction: 351.2B + 4.0B",
  ),
  *(
    Figure(f"Switch-Base, {n} experts", f"configs/switch.py:base_{n}", total, None)
    for n, total in ((8, None), (16, None), (32, None), (64, None), (128, "7B"), (256, "14.7B"))
  ),
  Figure("Switch-Large, 128 experts", "configs/switch.py:large_128", "26B", None),
  Figure(
    "Switch-XXL",
    "configs/switch.py:xxl",
    "395B",
    None,
    "with 128 experts; the 64 that the paper's Table 9 prints beside it come to about half",
  ),
  Figure("Switch-C", "configs/switch.py:c", "1571B", None),
  Figure(
    "GShard 2048E, 36L",
    "configs/gshard.py:600b",
    "600B",
    None,
    "619B by arithmetic, 618B of it experts; 36 layers in all, vocabulary assumed",
  ),
  Figure(
    "GShard 2048E, 12L", "configs/gshard.py:200b", "200B", None, "206B by arithmetic, as above"
  ),
  Figure(
    "GShard 512E, 36L", "configs/gshard.py:150b", "150B", None, "155B by arithmetic, as above"
  ),
  Figure("GShard 512E, 12L", "configs/gshard.py:50b", "50B", None, "52B by arithmetic, as above"),
  Figure("GShard 128E, 36L", "configs/gshard.py:37b", "37B", None, "39B by arithmetic, as above"),
  Figure(
    "GShard 128E, 12L", "configs/gshard.py:12_5b", "12.5B", None, "13.2B by arithmetic, as above"
  ),
  Figure(
    "NLLB-MoE 54B",
    "configs/nllb_moe.py:54b",
    "54.5B",
    "3.3B",
    "printed active figure unexplained: 3.75B with, 3.23B without the embedding",
  ),
  Figure("Jamba", "configs/jamba.py:v0_1", "52B", "12B"),
  Figure("Granite 3.0 1B-A400M", "configs/granite_moe.py:1b_a400m", "1.3B", "400M", _ROUND),
  Figure("Granite 3.0 3B-A800M", "configs/granite_moe.py:3b_a800m", "3.3B", "800M", _ROUND),
)


_WRONG = (
  WrongClaim(
    "Mixtral 8x7B has 56B parameters",
    "configs/mixtral.py:8x7b",
    "8 x 7 also multiplies attention, embedding and head, which the model has once",
  ),
  WrongClaim(
    "Mixtral 8x7B has 1.7T parameters",
    "configs/mixtral.py:8x7b",
    "36 times too many; models of that size are others, such as Switch-C (1.57T)",
  ),
  WrongClaim("Mixtral 8x22B has 176B parameters", "configs/mixtral.py:8x22b", "8 x 22, as above"),
  WrongClaim(
    "Switch-XXL has 64 experts",
    "configs/switch.py:xxl",
    "printed in the paper's Table 9 beside 395B, which takes 128",
  ),
  WrongClaim(
    "GLaM 1.7B/32E has 20B parameters",
    "configs/glam.py:1_7b_32e",
    "printed in the paper's Table 4; half of the experts of 1.7B/64E, whose 27B is right",
  ),
)


def get_sizes() -> PrintedSizes:
  """Returns what is printed."""
  return PrintedSizes(_FIGURES, _WRONG)
