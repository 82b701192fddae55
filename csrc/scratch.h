// Scratch memory of the calling thread, kept from call to call: fresh pages would cost more than what is done in them.
#pragma once

#include <cstdint>
#include <vector>

namespace dalle {

// At least `bytes` bytes on a 64-byte boundary, until the thread asks again.
inline void* thread_scratch(int64_t bytes) {
  struct Line {
    alignas(64) char bytes[64];
  };
  thread_local std::vector<Line> memory;
  if (int64_t(memory.size()) * 64 < bytes) memory.resize(size_t(bytes + 63) / 64);
  return memory.data();
}

}  // namespace dalle
