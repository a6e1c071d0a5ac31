"""Launchers of the Metal kernels in `kvmlx.metal_kernels`, and the backend that uses them."""
