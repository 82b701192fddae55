// Which instruction set the kernels use. Detected once; the environment variable DALLE_KERNELS_CPU_ISA or set_isa()
// may ask for a lower one, never for one that the processor (or the operating system) lacks.
//
// A room has a source cpu_<isa>.cpp for each instruction set, which defines its table of kernels in the namespace
// dalle::<isa>; DALLE_KERNEL_TABLE in the room's kernels.h makes one function of them, which gives the table of the
// instruction set in use.
#pragma once

#include <string>
#include <vector>

// f(isa, ...) for every instruction set that the compiler builds for, lowest first.
#if defined(__x86_64__)
#define DALLE_FOR_ISAS(f, ...) f(avx2, __VA_ARGS__) f(avx512, __VA_ARGS__) f(avx512_bf16, __VA_ARGS__)
#elif defined(__aarch64__)
#define DALLE_FOR_ISAS(f, ...) f(neon, __VA_ARGS__) f(neon_bf16, __VA_ARGS__)
#else
#error "the kernels are written for x86-64 and AArch64"
#endif

namespace dalle {

#define DALLE_ISA_NAME(isa, ...) isa,
enum class Isa { none, DALLE_FOR_ISAS(DALLE_ISA_NAME) };
#undef DALLE_ISA_NAME

const char* isa_name(Isa isa);
Isa detected_isa();
Isa current_isa();
std::vector<std::string> supported_isas();  // lowest first; empty on a processor that has none of them

// Throws std::invalid_argument for an unknown name or one that this processor cannot run.
void set_isa(const std::string& name);

[[noreturn]] void refuse_to_run();  // throws std::runtime_error: a processor without any of them

}  // namespace dalle

// In namespace dalle: declares `const Table& name()`, and a function of that name for each instruction set.
#define DALLE_KERNEL_TABLE(Table, name)              \
  DALLE_FOR_ISAS(DALLE_TABLE_OF_ISA, Table, name)    \
  inline const Table& name() {                       \
    switch (current_isa()) {                         \
      DALLE_FOR_ISAS(DALLE_CASE_OF_ISA, Table, name) \
      case Isa::none:                                \
        break;                                       \
    }                                                \
    refuse_to_run();                                 \
  }
#define DALLE_TABLE_OF_ISA(isa, Table, name) \
  namespace isa {                            \
  const Table& name();                       \
  }
#define DALLE_CASE_OF_ISA(isa, Table, name) \
  case Isa::isa:                            \
    return isa::name();
