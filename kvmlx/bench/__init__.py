"""`kvmlx bench`: strategies at equal bytes on one model, with quality, memory and speed from the same run."""
