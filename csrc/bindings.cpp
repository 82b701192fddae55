// The Python face of the native library: what was built. The operations themselves register with torch from
// csrc/<room>/cpu.cpp as soon as this module is loaded.

#include <torch/extension.h>

PYBIND11_MODULE(_native, module) {
  module.doc() = "Native CPU kernels of dalle_kernels.";
  module.attr("torch_version") = TORCH_VERSION;
}
