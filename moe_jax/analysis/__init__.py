"""What a finished run says: its report, its baselines, its routing."""
