"""Sweeps: arms of a recipe trained over seeds, a card each run, and verdicts on claims."""
