"""Packaging metadata; the version is read from moe_jax/__init__.py."""

import re
from pathlib import Path

from setuptools import find_packages, setup

_VERSION = re.search(r'__version__ = "(.+?)"', Path("moe_jax/__init__.py").read_text()).group(1)

# jax and flax move together. Tested: jax 0.10.2 with flax 0.12.8, which still imports on jax 0.11.0
# but not on 0.11.1 (it lacks hijax.MutableHiType); flax 0.12.0 does not import on jax 0.10.0.
_JAX = ">=0.10.2,<0.11.1"

_REQUIREMENTS = [
  f"jax{_JAX}",
  "flax==0.12.8",
  "absl-py>=2.5",
  "array_record>=0.8.6",
  "grain>=0.2.18",
  "ml-collections>=1.1",
  "numpy>=2.4",
  "optax>=0.2.8",
  "orbax-checkpoint>=0.12.8",
  "protobuf>=5.0",
  "pyarrow>=20.0",
  "rich>=15.0",
  "safetensors>=0.8",
  "scipy>=1.14",
  "tensorflow-datasets>=4.9.10",
]

# Read the tokenizer.json or the tokenizer.model of a Hugging Face checkpoint.
_TOKENIZERS = ["tokenizers>=0.22", "sentencepiece>=0.2.1"]

# Decodes, crops and resizes images; TFDS needs it too, to read those of its data sets.
_IMAGES = ["pillow>=11.0"]

_EXTRAS = {
  # cuda13 needs an NVIDIA driver of series 580 or later; cuda12 runs on older ones.
  "gpu": [f"jax[cuda13]{_JAX}"],
  "gpu-cuda12": [f"jax[cuda12]{_JAX}"],
  "tpu": [f"jax[tpu]{_JAX}", "gcsfs"],
  "gcs": ["gcsfs"],
  "tensorboard": ["tensorboardX>=2.6.5"],
  "hf": _TOKENIZERS,
  "images": _IMAGES,
  "dev": [
    "pytest>=9.0",
    "hypothesis>=6.150",
    "pytest-xdist>=3.8",
    "ruff>=0.17",
    "tensorboardX>=2.6.5",
    *_TOKENIZERS,
    *_IMAGES,
  ],
}

setup(
  name="moe_jax",
  version=_VERSION,
  description="The reference implementation of Mixture-of-Experts in JAX",
  license="Apache-2.0",
  python_requires=">=3.11,<3.14",
  packages=find_packages(include=["moe_jax", "moe_jax.*"]),
  package_data={"moe_jax.data": ["corpora/*"], "moe_jax.analysis": ["*"]},
  install_requires=_REQUIREMENTS,
  extras_require=_EXTRAS,
  entry_points={"console_scripts": ["moe-jax = moe_jax.cli:main"]},
)
