// torch's threads: as many as torch.set_num_threads says, one inside a parallel region.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>

#include "tensor.h"

namespace dalle {

inline int64_t thread_count() {
  uint32_t threads = 1;
  succeeded(torch_get_num_threads(&threads), "tell its number of threads");
  return threads;
}

// body(first, last) over ranges of at least `grain` items that cover begin .. end - 1. What a range throws is thrown
// again here, as std::runtime_error: torch itself would only say that something failed.
template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  if (begin >= end) return;
  if (end - begin <= grain) return body(begin, end);
  struct Context {
    const Body& body;
    std::atomic<bool> failed;
    std::string problem;
  } context{body, false, {}};
  const auto call = [](int64_t first, int64_t last, void* context) {
    Context& shared = *static_cast<Context*>(context);
    try {
      shared.body(first, last);
    } catch (const std::exception& error) {
      if (!shared.failed.exchange(true)) shared.problem = error.what();
    }
  };
  succeeded(torch_parallel_for(begin, end, grain, call, &context), "run its threads");
  if (context.failed) throw std::runtime_error(context.problem);
}

}  // namespace dalle
