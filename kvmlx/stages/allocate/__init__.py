"""How many rows stay, per layer and per head: one file a method."""
