"""Schedule: when a strategy runs."""
