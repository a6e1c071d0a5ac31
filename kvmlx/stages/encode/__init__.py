"""Encode: how kept rows are stored."""
