"""Full-size models on real pods, planned without one, and how far plans are from measurements."""
