"""Layers are compiled here: without most optimisations that takes half the time."""

from fast_compilation import compile_fast  # noqa: F401
