// What this library was built for, with what; csrc/cuda/build_cuda.py says it, `python -m dalle_kernels.native` prints it.

extern "C" __attribute__((visibility("default"))) const char* dalle_kernels_cuda_built() { return DALLE_BUILT; }
