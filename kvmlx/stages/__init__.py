"""The stages of a strategy, one folder a kind and one file a method."""
