"""Experiments: each folder asks one question and keeps its answer."""
