"""The shared test vectors, imported as `kvmlx.vectors`: tests and `kvmlx doctor --selftest` read them."""
