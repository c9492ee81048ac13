"""Parts of a block that are not experts: attention, feed-forward, norms, rotary positions."""
