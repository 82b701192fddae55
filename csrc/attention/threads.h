// How pieces of work are handed to torch's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "attention/kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace dalle::attention {

// Cuts 0 .. count - 1 into `parts` runs of about equal cost: run p is [cuts[p], cuts[p + 1]).
template <class Cost>
std::vector<int32_t> even_cuts(int32_t count, int32_t parts, const Cost& cost) {
  int64_t total = 0, passed = 0;
  for (int32_t i = 0; i < count; i++) total += cost(i);
  std::vector<int32_t> cuts{0};
  for (int32_t i = 0; i < count; i++) {
    // The next run starts where the middle of item i lies past the boundary.
    while (int32_t(cuts.size()) < parts && (2 * passed + cost(i)) * parts >= 2 * total * int64_t(cuts.size()) &&
           i > cuts.back())
      cuts.push_back(i);
    passed += cost(i);
  }
  while (int32_t(cuts.size()) <= parts) cuts.push_back(count);
  return cuts;
}

// body(piece, scratch) for every piece, on torch's threads. Each thread starts with its own run of pieces, so that what
// it packed of a head serves the head's next piece, and takes from the end of another's run when its own is done.
template <class Body>
void share_out(int64_t pieces, int64_t scratch_floats, const Body& body) {
  struct alignas(64) Run {
    std::atomic<int64_t> next, end;
    std::atomic<int64_t> left;
  };
  const int64_t threads = std::min<int64_t>(thread_count(), pieces);
  std::vector<Run> runs(static_cast<size_t>(threads));
  for (int64_t t = 0; t < threads; t++) {
    runs[t].next = pieces * t / threads;
    runs[t].end = pieces * (t + 1) / threads;
    runs[t].left = runs[t].end - runs[t].next;
  }
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch{static_cast<float*>(thread_scratch(scratch_floats * int64_t(sizeof(float)))), -1};
    for (int64_t t = begin; t < end; t++)
      for (int64_t other = 0; other < threads; other++) {
        Run& run = runs[size_t((t + other) % threads)];
        // A ticket says that a piece is left; own pieces come from the front, others' from the back.
        while (run.left.fetch_sub(1) > 0) body(other == 0 ? run.next.fetch_add(1) : run.end.fetch_sub(1) - 1, scratch);
      }
  });
}

}  // namespace dalle::attention
