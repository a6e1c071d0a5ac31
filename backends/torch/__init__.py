"""PyTorch: plain operations on CPU and CUDA, Triton kernels, and the adapter to transformers."""
