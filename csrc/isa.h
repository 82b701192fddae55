// Which instruction set the kernels use. Detected once; the environment variable DALLE_KERNELS_CPU_ISA or set_isa()
// may ask for a lower one, never for one that the processor (or the operating system) lacks.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

namespace dalle {

enum class Isa { none, avx2, avx512, avx512_bf16 };

const char* isa_name(Isa isa);
Isa detected_isa();
Isa current_isa();
std::vector<std::string> supported_isas();  // lowest first; empty on a processor without AVX2 and FMA

// Throws std::invalid_argument for an unknown name or one that this processor cannot run.
void set_isa(const std::string& name);

// The implementation that current_isa() asks for, out of one per instruction set.
template <class T>
const T& for_isa(const T& avx2, const T& avx512, const T& avx512_bf16) {
  switch (current_isa()) {
    case Isa::avx512_bf16: return avx512_bf16;
    case Isa::avx512: return avx512;
    case Isa::avx2: return avx2;
    case Isa::none: break;
  }
  throw std::runtime_error("the native CPU kernels need a processor with AVX2 and FMA");
}

}  // namespace dalle
