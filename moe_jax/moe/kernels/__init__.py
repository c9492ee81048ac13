"""Grouped products by platform: each computes the active FLOPs alone, in both directions."""
