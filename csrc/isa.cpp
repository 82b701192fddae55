#include "isa.h"

#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace dalle {
namespace {

#define DALLE_ISA_VALUE(isa, ...) Isa::isa,
constexpr Isa kAll[] = {DALLE_FOR_ISAS(DALLE_ISA_VALUE)};

#if defined(__x86_64__)
// __builtin_cpu_supports asks the operating system too: it wants the wide registers saved on a context switch.
Isa detect() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::none;
#if defined(DALLE_EMULATE_AVX512)
  return Isa::avx512_bf16;  // tests/avx512.h stands in for it
#endif
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return Isa::avx2;
  return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
}
#else
// Every processor of this architecture has NEON.
Isa detect() {
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16, which older headers do not name
  return getauxval(AT_HWCAP2) & kBf16 ? Isa::neon_bf16 : Isa::neon;
}
#endif

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text.empty() ? "none" : text;
}

Isa parse(const std::string& name, const char* source) {
  for (Isa isa : kAll)
    if (name == isa_name(isa) && isa <= detected_isa()) return isa;
  throw std::invalid_argument(std::string(source) + " asks for the instruction set '" + name +
                              "'; this processor has: " + joined(supported_isas()));
}

Isa initial() {
  const char* wanted = std::getenv("DALLE_KERNELS_CPU_ISA");
  return wanted == nullptr || *wanted == '\0' ? detected_isa() : parse(wanted, "DALLE_KERNELS_CPU_ISA");
}

std::atomic<Isa>& selected() {
  static std::atomic<Isa> isa{initial()};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
#define DALLE_CASE(name, ...) \
  case Isa::name:             \
    return #name;
  switch (isa) {
    DALLE_FOR_ISAS(DALLE_CASE)
    case Isa::none:
      break;
  }
  return "none";
}

Isa detected_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa current_isa() { return selected().load(std::memory_order_relaxed); }

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (Isa isa : kAll)
    if (isa <= detected_isa()) names.emplace_back(isa_name(isa));
  return names;
}

void set_isa(const std::string& name) { selected().store(parse(name, "set_isa"), std::memory_order_relaxed); }

void refuse_to_run() {
  throw std::runtime_error("the native CPU kernels need a processor with AVX2 and FMA, or AArch64");
}

}  // namespace dalle
