"""Training: the state, the step, the loop, checkpoints and metric writers."""
