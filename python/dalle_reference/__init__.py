"""A small, readable DALL-E built from nothing but `dalle_kernels` and PyTorch."""
