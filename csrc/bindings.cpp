// The Python face of the native library: what was built, and which instruction set it uses. The operations themselves
// register with torch from csrc/<room>/cpu.cpp as soon as this module is loaded.

#include <torch/extension.h>

#include "isa.h"
#include "memory.h"

PYBIND11_MODULE(_native, module) {
  module.doc() = "Native CPU kernels of dalle_kernels.";
  module.attr("torch_version") = TORCH_VERSION;
  module.def("isa", [] { return std::string(dalle::isa_name(dalle::current_isa())); },
             "The instruction set in use: avx2, avx512, avx512_bf16, or none.");
  module.def("set_isa", &dalle::set_isa, pybind11::arg("name"),
             "Use a lower instruction set than the processor's best; ValueError for one it lacks.");
  module.def("kept_limit", &dalle::kept_limit, "Bytes of freed results that may be kept; DALLE_KERNELS_CPU_KEEP_MB.");
  module.def("kept_bytes", &dalle::kept_bytes, "Bytes of freed results that are kept now.");
  module.def("release_kept", &dalle::release_kept, "Gives the memory of kept results back to the system.");
  module.def("supported_isas", &dalle::supported_isas, "The instruction sets this processor can run, lowest first.");
}
