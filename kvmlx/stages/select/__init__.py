"""Which rows stay: one file a method."""
