// What this library was built for, with what; csrc/cuda/build_cuda.py says it, `python -m
// dalle_kernels.backends.native` prints it. And the versions of CUDA that have to fit: of the runtime inside, and of
// what the driver here supports.

#include <cuda_runtime_api.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* dalle_kernels_cuda_built() { return DALLE_BUILT; }

EXPORT int dalle_kernels_cuda_runtime() { return CUDART_VERSION; }

EXPORT int dalle_kernels_cuda_driver() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}
