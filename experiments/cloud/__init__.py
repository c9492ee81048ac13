"""Launchers of runs on TPU slices, GKE, Slurm and single machines; thin covers of their tools."""
