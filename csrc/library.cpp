// What Python asks of the library itself, through ctypes (dalle_kernels/backends/native.py).
//
// A function that can fail returns null, or what was wrong until the thread asks again.

#include <exception>
#include <string>

#include "isa.h"
#include "memory.h"
#include "operators.h"

namespace {

thread_local std::string said;

const char* say(std::string text) {
  said = std::move(text);
  return said.c_str();
}

template <class Action>
const char* problem_of(const Action& action) {
  try {
    action();
    return nullptr;
  } catch (const std::exception& error) {
    return say(error.what());
  }
}

}  // namespace

#define DALLE_EXPORT extern "C" __attribute__((visibility("default")))

// Registers the operations as torch.ops.<name_space>, and reads DALLE_KERNELS_CPU_ISA and DALLE_KERNELS_CPU_KEEP_MB.
DALLE_EXPORT const char* dalle_kernels_cpu_start(const char* name_space) {
  return problem_of([&] {
    dalle::current_isa();
    dalle::kept_limit();
    dalle::register_operators(name_space);
  });
}

DALLE_EXPORT const char* dalle_kernels_cpu_isa() { return dalle::isa_name(dalle::current_isa()); }

DALLE_EXPORT const char* dalle_kernels_cpu_set_isa(const char* name) {
  return problem_of([&] { dalle::set_isa(name); });
}

// With spaces between them, lowest first.
DALLE_EXPORT const char* dalle_kernels_cpu_supported_isas() {
  std::string names;
  for (const std::string& name : dalle::supported_isas()) names += (names.empty() ? "" : " ") + name;
  return say(names);
}

// The compiler and the oldest torch that the library loads in.
DALLE_EXPORT const char* dalle_kernels_cpu_built() { return DALLE_BUILT; }

DALLE_EXPORT int64_t dalle_kernels_cpu_kept_limit() { return dalle::kept_limit(); }
DALLE_EXPORT void dalle_kernels_cpu_set_kept_limit(int64_t bytes) { dalle::set_kept_limit(bytes); }
DALLE_EXPORT int64_t dalle_kernels_cpu_kept_bytes() { return dalle::kept_bytes(); }
DALLE_EXPORT void dalle_kernels_cpu_release_kept() { dalle::release_kept(); }
