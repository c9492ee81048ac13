"""What is planned: full-size models, each on a pod that holds it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
  """One call of `moe-jax plan`.

  Attributes:
    name: in tables.
    config: a config of this repository.
    topology: the slice.
    words: further words of the command.
    published_mfu: what MaxText measured for the same model on as many chips, if anything.
    source: where that is printed.
  """

  name: str
  config: str
  topology: str
  words: tuple[str, ...] = ()
  published_mfu: float | None = None
  source: str = ""

  @property
  def command(self) -> list[str]:
    """The words behind `moe-jax`."""
    words = [f"--config=configs/{self.config}", f"--topology={self.topology}", *self.words]
    return ["plan", *words]


_TIERS = "MaxText docs/reference/models/tiering.md"
CASES = (
  Case(
    "Mixtral 8x7B",
    "mixtral.py:8x7b",
    "v5p:4x4x4",
    published_mfu=0.5489,
    source="MaxText end_to_end/tpu/mixtral/Run_Mixtral.md, v5p-128",
  ),
  Case("DeepSeek-V3", "deepseek.py:v3", "v5p:8x8x8", ("--batch=512",)),
  Case("Jamba v0.1", "jamba.py:v0_1", "v5p:4x4x4"),
  Case("Llama 4 Maverick", "llama4.py:maverick_text", "v5p:4x8x8"),
  Case("GLaM 64B/64E", "glam.py:64b_64e", "v5p:8x8x16"),
  Case("Switch-C", "switch.py:c", "v5p:8x8x16", ("--config.data.sequence_length=512",)),
  Case(
    "Mixtral 8x7B",
    "mixtral.py:8x7b",
    "v5p:4x8x8",
    published_mfu=0.5256,
    source=f"{_TIERS}, 256 v5p",
  ),
  Case(
    "Mixtral 8x7B",
    "mixtral.py:8x7b",
    "v6e:16x16",
    published_mfu=0.3523,
    source=f"{_TIERS}, 256 v6e",
  ),
  Case("Mixtral 8x7B, dropless", "mixtral.py:8x7b", "v5p:4x4x4", ("--dispatch=ragged",)),
)
SEARCH = Case("search: Mixtral 8x7B", "mixtral.py:8x7b", "v5p:4x8x8", ("--search",))
