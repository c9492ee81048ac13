"""Texts that ship with the package, each with a note on its provenance and licence."""
