"""Upcycling a dense model against training it on."""
