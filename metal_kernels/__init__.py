"""Metal kernels, imported as `kvmlx.metal_kernels`: sources and their loader."""
