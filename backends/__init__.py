"""Backends, imported as `kvmlx.backends`: one array framework each."""
