"""Axes of a sweep combine as their names say."""

import pytest

from moe_jax.errors import UserError
from moe_jax.sweep.hyper import axis, chain, product, zip_axes

A, B = axis("a", 1, 2), axis("b", "x", "y")


def test_product_has_every_combination_the_last_axis_fastest():
  assert product(A, B) == [
    {"a": 1, "b": "x"},
    {"a": 1, "b": "y"},
    {"a": 2, "b": "x"},
    {"a": 2, "b": "y"},
  ]
  assert product() == [{}]


def test_zip_pairs_points_and_chain_appends_them():
  assert zip_axes(A, B) == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
  assert chain(A, B) == [{"a": 1}, {"a": 2}, {"b": "x"}, {"b": "y"}]


def test_a_field_set_twice_is_refused():
  for combine in (product, zip_axes):
    with pytest.raises(UserError, match="two axes set a"):
      combine(A, axis("a", 3, 4))


def test_axes_of_different_lengths_are_not_zipped():
  with pytest.raises(UserError, match=r"\[2, 3\]"):
    zip_axes(A, axis("b", 1, 2, 3))
