"""What a model costs: parameters and FLOPs, before it is built."""
