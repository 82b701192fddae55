"""What inspects and tunes kernels: compiled ahead of time, measured on a GPU, host time, the CUDA build."""
