"""Packaging metadata; the version is read from moe_jax/__init__.py."""

import re
from pathlib import Path

from setuptools import find_packages, setup

_VERSION = re.search(r'__version__ = "(.+?)"', Path("moe_jax/__init__.py").read_text()).group(1)

# Tested pair: jax 0.10.2 with flax 0.12.8. Flax up to 0.12.8 subclasses a jax class that
# jax 0.11.1 removed and cannot be imported there, hence the two upper bounds.
_JAX = "jax>=0.10.2,<0.11.1"

_REQUIREMENTS = [
  _JAX,
  "flax>=0.12.8,<=0.12.8",
  "absl-py>=2.5",
  "array_record>=0.8.6",
  "etils>=1.15",
  "grain>=0.2.18",
  "matplotlib>=3.11",
  "ml-collections>=1.1",
  "numpy>=2.4",
  "optax>=0.2.8",
  "orbax-checkpoint>=0.12.8",
  "rich>=15.0",
  "tensorflow-datasets>=4.9.10",
]

_EXTRAS = {
  # cuda13 needs an NVIDIA driver of series 580 or later; cuda12 runs on older ones.
  "gpu": ["jax[cuda13]>=0.10.2,<0.11.1"],
  "gpu-cuda12": ["jax[cuda12]>=0.10.2,<0.11.1"],
  "tpu": ["jax[tpu]>=0.10.2,<0.11.1", "gcsfs"],
  "tensorboard": ["tensorboardX>=2.6.5"],
  "hf": ["safetensors"],
  "dev": ["pytest>=9.0", "pytest-xdist>=3.8", "ruff>=0.17", "tensorboardX>=2.6.5"],
}

setup(
  name="moe_jax",
  version=_VERSION,
  description="The reference implementation of Mixture-of-Experts in JAX",
  license="Apache-2.0",
  python_requires=">=3.11,<3.14",
  packages=find_packages(include=["moe_jax", "moe_jax.*"]),
  package_data={"moe_jax.data": ["corpora/*"], "moe_jax.analysis": ["*.html", "*.css", "*.js"]},
  install_requires=_REQUIREMENTS,
  extras_require=_EXTRAS,
  entry_points={"console_scripts": ["moe-jax = moe_jax.cli:main"]},
)
