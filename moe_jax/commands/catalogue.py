"""The commands of `moe-jax` and the flags of each, without the code that runs them."""

import dataclasses

from moe_jax.config.command_line import Flag, FlagKind


@dataclasses.dataclass(frozen=True)
class Command:
  """Describes one subcommand.

  Attributes:
    help: one line.
    entry: "module:function", called with the parsed flags.
    flags: that it takes.
    words: names of flags whose values may also come first, without names, in this order.
  """

  help: str
  entry: str
  flags: tuple[Flag, ...]
  words: tuple[str, ...] = ()


_RUN = Flag("workdir", FlagKind.FOLDER, "folder of a run made by moe-jax train")
_STEP = Flag("step", FlagKind.INTEGER, "checkpoint to read; the latest if absent", None)

_HUB = Flag("checkpoint", FlagKind.FOLDER, "Hugging Face checkpoint to read instead of a run", None)

# What all operations on experts take.
_OPERATION = (
  Flag("out", FlagKind.FOLDER, "run folder to write; it must be absent or empty"),
  Flag("workdir", FlagKind.FOLDER, "folder of a run made by moe-jax train", None),
  _STEP,
  _HUB,
  Flag(
    "set",
    FlagKind.TEXTS,
    "a field of the new run's config, as steps=400 or moe.top_k=1; repeatable",
    (),
  ),
  Flag("moments", FlagKind.TEXT, "carry or reset what the optimiser remembers", "carry"),
  Flag(
    "schedule", FlagKind.TEXT, "keep or reset step, learning rate and place in the data", "keep"
  ),
  Flag("batches", FlagKind.INTEGER, "held-out batches to measure on", 4),
  Flag("seed", FlagKind.SEED, "seed of whatever is drawn", 0),
  Flag("json", FlagKind.SWITCH, "print what was measured as JSON", False),
)
_TRACE = Flag(
  "trace", FlagKind.FILE, "a trace to count the use of experts in; --batches if absent", None
)
_DATA = Flag("config", FlagKind.CONFIG, "config file, whose section data says what to read")
_ROUTER_STD = Flag("router_std", FlagKind.NUMBER, "standard deviation of new router columns", 0.02)

COMMANDS = {
  "train": Command(
    "train the model of a config file; the same command again resumes the run",
    "moe_jax.commands.training:train",
    (
      Flag(
        "config",
        FlagKind.CONFIG,
        "config file, and one of the variants its docstring lists",
        instead="replay",
      ),
      Flag("workdir", FlagKind.FOLDER, "folder of the run: metrics, checkpoints, report"),
      Flag("replay", FlagKind.FOLDER, "a run to train again from its own config", None),
      Flag("coordinator", FlagKind.TEXT, "HOST:PORT of process 0, if there are several", None),
      Flag("num_processes", FlagKind.INTEGER, "how many; found on TPU, GKE and Slurm", None),
      Flag("process_id", FlagKind.INTEGER, "which one this is, from 0", None),
    ),
  ),
  "eval": Command(
    "evaluate a checkpoint of a run, also under other routers",
    "moe_jax.commands.evaluation:evaluate",
    (
      _RUN,
      _STEP,
      Flag(
        "arm",
        FlagKind.TEXTS,
        "dropless with other routing fields, as top_k=2,weighting=hard; repeatable",
        (),
      ),
      Flag("replay", FlagKind.FILE, "a trace whose experts are forced on its own tokens", None),
    ),
  ),
  "trace": Command(
    "record which experts the held-out tokens ask for",
    "moe_jax.commands.evaluation:trace",
    (
      _RUN,
      _STEP,
      Flag("out", FlagKind.FILE, "the .npz file to write"),
      Flag("batches", FlagKind.INTEGER, "held-out batches to record", 4),
    ),
  ),
  "generate": Command(
    "continue a prompt with the model of a run, or of a checkpoint",
    "moe_jax.commands.generation:generate",
    (
      Flag("prompt", FlagKind.TEXT, "text to continue"),
      Flag("workdir", FlagKind.FOLDER, "folder of a run made by moe-jax train", None),
      Flag(
        "checkpoint",
        FlagKind.FOLDER,
        "Hugging Face checkpoint with its tokenizer instead of a run",
        None,
      ),
      Flag("dtype", FlagKind.TEXT, "float32 (default) or bfloat16, with --checkpoint", None),
      Flag("max_new_tokens", FlagKind.INTEGER, "most tokens to add", 200),
      Flag("temperature", FlagKind.NUMBER, "0 takes the likeliest token each time", 0.8),
      Flag("top_k", FlagKind.INTEGER, "sample from so many likeliest tokens", None),
      Flag("top_p", FlagKind.NUMBER, "sample from the likeliest tokens of this mass", None),
      Flag("seed", FlagKind.SEED, "seed of the sampling", 0),
      Flag("image", FlagKind.FILE, "file of an image to show first, with --workdir", None),
    ),
  ),
  "convert": Command(
    "write the model of a run, or of a checkpoint, as a Hugging Face checkpoint",
    "moe_jax.commands.conversion:convert",
    (
      Flag("out", FlagKind.FOLDER, "folder to write; it must be absent or empty"),
      Flag("workdir", FlagKind.FOLDER, "folder of a run made by moe-jax train", None),
      _STEP,
      _HUB,
      Flag("dtype", FlagKind.TEXT, "float32 (default) or bfloat16, with --checkpoint", None),
    ),
  ),
  "convert upcycle": Command(
    "make a run with experts from a dense one: each a copy, or a part of it",
    "moe_jax.commands.surgery:upcycle",
    (
      Flag(
        "layers", FlagKind.TEXT, "all, every_other, last_half, or numbers as 1,3", "every_other"
      ),
      Flag("preset", FlagKind.TEXT, "router preset; its fields change by --set=moe.x", "mixtral"),
      Flag("num_experts", FlagKind.INTEGER, "experts of a layer; the preset's if absent", None),
      Flag("top_k", FlagKind.INTEGER, "experts of a token; the preset's if absent", None),
      Flag("parts", FlagKind.INTEGER, "cut a dense network into so many, one an expert", 1),
      Flag("shared_parts", FlagKind.INTEGER, "parts that become a shared expert", 0),
      Flag("noise", FlagKind.NUMBER, "added to experts, relative to their weights", 0.0),
      Flag("reinit", FlagKind.NUMBER, "fraction of hidden units that start anew", 0.0),
      Flag("router", FlagKind.TEXT, "normal, or virtual_groups: tokens take all parts", "normal"),
      _ROUTER_STD,
      Flag("scaling", FlagKind.TEXT, "what keeps the scale: router, weights or none", "router"),
      *_OPERATION,
    ),
  ),
  "convert prune": Command(
    "make a run with fewer experts: the most used, the largest, or some ids",
    "moe_jax.commands.surgery:prune",
    (
      Flag("num_experts", FlagKind.INTEGER, "experts of a layer that stay", None),
      Flag("by", FlagKind.TEXT, "which stay: usage, or norm of their weights", "usage"),
      Flag("drop", FlagKind.TEXTS, "ids instead, as 0,3; or LAYER:IDS for each layer", ()),
      _TRACE,
      *_OPERATION,
    ),
  ),
  "convert merge": Command(
    "make a run with fewer experts: weighted means of those that are alike",
    "moe_jax.commands.surgery:merge",
    (
      Flag("num_experts", FlagKind.INTEGER, "experts of a layer that there are to be"),
      Flag("by", FlagKind.TEXT, "what they are alike in: router or weights", "router"),
      Flag("align", FlagKind.TEXT, "order hidden units before: none or permutation", "permutation"),
      _TRACE,
      *_OPERATION,
    ),
  ),
  "convert grow": Command(
    "make a run with more experts: noisy copies of the most used, or fresh ones",
    "moe_jax.commands.surgery:grow",
    (
      Flag("num_experts", FlagKind.INTEGER, "experts of a layer that there are to be"),
      Flag("init", FlagKind.TEXT, "what further experts are: copy or fresh", "copy"),
      Flag("noise", FlagKind.NUMBER, "added to copies, relative to their weights", 0.01),
      _ROUTER_STD,
      _TRACE,
      *_OPERATION,
    ),
  ),
  "checkpoint ls": Command(
    "list the checkpoints of a run, and whether each is as it was saved",
    "moe_jax.commands.checkpoint:ls",
    (_RUN,),
    ("workdir",),
  ),
  "checkpoint verify": Command(
    "read all of a run's checkpoints; exit status 2 if one is damaged",
    "moe_jax.commands.checkpoint:verify",
    (_RUN, Flag("step", FlagKind.INTEGER, "checkpoint to read; all if absent", None)),
    ("workdir",),
  ),
  "checkpoint diff": Command(
    "tell in which arrays two checkpoints differ, and by how much",
    "moe_jax.commands.checkpoint:diff",
    (
      _RUN,
      Flag("other", FlagKind.FOLDER, "another run; the same one if absent", None),
      _STEP,
      Flag("other_step", FlagKind.INTEGER, "the other checkpoint; the latest if absent", None),
    ),
    ("workdir", "other"),
  ),
  "supervise": Command(
    "start moe-jax train again when it was stopped or has died",
    "moe_jax.commands.supervise:supervise",
    (
      Flag("restarts", FlagKind.INTEGER, "so many at most", 100),
      Flag("backoff", FlagKind.NUMBER, "seconds before a restart; doubled by each crash", 1.0),
      Flag("command", FlagKind.TEXTS, "written as -- train --config=... --workdir=...", ()),
    ),
  ),
  "watch": Command(
    "show a run as it goes: loss, load of experts, speed, events",
    "moe_jax.commands.watch:watch",
    (
      _RUN,
      Flag("once", FlagKind.SWITCH, "print one picture and end", False),
      Flag("every", FlagKind.NUMBER, "seconds between two pictures", 2.0),
    ),
    ("workdir",),
  ),
  "analyze": Command(
    "measure how a run routes, beside chance: a page and tables",
    "moe_jax.commands.analysis:analyze",
    (
      _RUN,
      _STEP,
      Flag("out", FlagKind.FOLDER, "folder to write; analysis in the run's if absent", None),
      Flag("domain", FlagKind.TEXTS, "NAME=SOURCE of a text to route; the run's own if absent", ()),
      Flag("batches", FlagKind.INTEGER, "batches of each text", 16),
    ),
  ),
  "report": Command(
    "write the report of a run, or the pages of a folder of recipes",
    "moe_jax.commands.reporting:report",
    (
      Flag("workdir", FlagKind.FOLDER, "folder of a run, or of recipes as experiments/"),
      Flag("compare", FlagKind.FOLDERS, "another run to set beside it; repeatable", ()),
    ),
    ("workdir",),
  ),
  "sweep": Command(
    "train all arms of a recipe over seeds and judge a paper's claims by them",
    "moe_jax.commands.sweeping:sweep",
    (
      Flag("config", FlagKind.FILE, "file of the recipe, with a function get_recipe()"),
      Flag("profile", FlagKind.TEXT, "smoke, cpu, full or gpu", "smoke"),
      Flag("workdir", FlagKind.FOLDER, "folder of all runs, shared by recipes", "runs/sweeps"),
      Flag("cards", FlagKind.FOLDER, "folder of the cards; one in the workdir if absent", None),
      Flag("workers", FlagKind.INTEGER, "runs at a time, each on cores of its own", 1),
      Flag("index", FlagKind.INTEGER, "do this run alone, as in a job array", None),
      Flag("list", FlagKind.SWITCH, "list the runs and end", False),
    ),
  ),
  "plan": Command(
    "count what a model costs, or compile its training step for a pod",
    "moe_jax.commands.planning:plan",
    (
      Flag("config", FlagKind.CONFIG, "config file, and one of the variants its docstring lists"),
      Flag("topology", FlagKind.TEXT, "compile for a slice of TPUs, as v5p:4x4x4", None),
      Flag("slices", FlagKind.INTEGER, "such slices, joined by the data-centre network", 1),
      Flag("layout", FlagKind.TEXT, "which arrays are split, as fsdp or ep_fsdp", None),
      Flag("batch", FlagKind.INTEGER, "sequences a step; 8,192 tokens a chip if absent", None),
      Flag("dispatch", FlagKind.TEXT, "gather, einsum or ragged, over the config's", None),
      Flag("search", FlagKind.SWITCH, "try layouts, remat, microbatches and group sizes", False),
      Flag("json", FlagKind.SWITCH, "print all numbers exactly, as JSON", False),
    ),
  ),
  "data prepare": Command(
    "tokenise and pack the data of a config, once; again, it goes on",
    "moe_jax.commands.data:prepare_data",
    (_DATA,),
  ),
  "data verify": Command(
    "compare every file of a prepared data set with its checksum",
    "moe_jax.commands.data:verify_data",
    (_DATA,),
  ),
  "data train-tokenizer": Command(
    "train a SentencePiece model on the training documents of a config",
    "moe_jax.commands.data:train_tokenizer",
    (
      _DATA,
      Flag("out", FlagKind.FILE, "the .model file to write"),
      Flag("vocab_size", FlagKind.INTEGER, "ids, special ones and 256 bytes included", 8192),
      Flag("kind", FlagKind.TEXT, "bpe or unigram", "bpe"),
      Flag("megabytes", FlagKind.INTEGER, "text to learn from, the first of each source", 64),
    ),
  ),
  "conventions": Command(
    "list the conventions of all router presets, or what sets two of them apart",
    "moe_jax.commands.conventions:conventions",
    (
      Flag("diff", FlagKind.PAIR, "two presets to compare, also written --diff A B", None),
      Flag("sample", FlagKind.SEED, "seed of the random logits that both route", 0),
    ),
  ),
  "audit": Command(
    "change later tokens of a model or router, report what leaks back",
    "moe_jax.commands.audit:audit",
    (
      Flag("config", FlagKind.CONFIG, "config file of a model, with a variant if it has any", None),
      Flag("preset", FlagKind.TEXT, "a router preset instead of a model", None),
      Flag("seed", FlagKind.SEED, "seed of parameters and tokens", 0),
    ),
  ),
}
