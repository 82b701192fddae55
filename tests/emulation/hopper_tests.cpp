// Small kernels that exercise what sm_90a adds to the emulated machine, bound for tests/emulation/test_hopper.py.

#include <map>
#include <string>

#include "cuda/hopper.cuh"
#include "cuda/swizzle.cuh"
#include "machine_tests.h"

namespace {

char* at(int byte) { return shared_memory() + byte; }

// Makes `count` barriers for one arrival each at `first`, known to all.
void make_barriers(uint64_t* first, int count) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < count; ++i) {
      barrier_init(first + i, 1);
    }
    fence_async();
  }
  __syncthreads();
}

TensorMap map_of(const void* data, uint64_t sizes[4], const uint32_t (&box)[4], int swizzle) {
  const uint64_t strides[3] = {2 * sizes[0], 2 * sizes[0] * sizes[1], 2 * sizes[0] * sizes[1] * sizes[2]};
  const uint64_t copied[4] = {sizes[0], sizes[1], sizes[2], sizes[3]};
  TensorMap map = tensor_map<Bfloat16>(data, copied, strides, {64, box[1], box[2], box[3]});
  map.box[0] = box[0];  // the kernels' maps are always 128 bytes wide and swizzled so
  map.swizzle = swizzle;
  return map;
}

py::array_t<uint16_t> boxes(py::array_t<uint16_t> tensor, std::array<int, 4> place, std::array<uint32_t, 4> box,
                            int swizzle) {
  // The 16-bit words of shared memory, in order, after the box at `place` of a tensor of four dimensions was copied.
  const int bytes = static_cast<int>(2 * box[0] * box[1] * box[2] * box[3]);
  py::array_t<uint16_t> out(bytes / 2);
  uint64_t sizes[4];
  for (int i = 0; i < 4; ++i) {
    sizes[i] = tensor.shape(3 - i);
  }
  const auto* data = visible<const uint16_t>(tensor, false);
  const TensorMap map = map_of(data, sizes, {box[0], box[1], box[2], box[3]}, swizzle);
  auto* po = visible<uint32_t>(out);
  run(1, 32, bytes + 8, [=] {
    auto* barrier = reinterpret_cast<uint64_t*>(at(bytes));
    make_barriers(barrier, 1);
    if (threadIdx.x == 0) {
      barrier_arrive_expecting(barrier, bytes);
      copy_box(at(0), map, place[0], place[1], place[2], place[3], barrier);
    }
    barrier_wait(barrier, 0);
    for (int i = threadIdx.x; i < bytes / 4; i += 32) {
      store(po + i, load(reinterpret_cast<const uint32_t*>(at(4 * i))));
    }
  });
  return out;
}

template <class T, int kColumns, bool kTransposed>
py::array_t<float> product(py::array_t<uint32_t> a, py::array_t<uint32_t> b, uint64_t descriptor,
                           py::array_t<float> c) {
  // a [128, 4] and c [128, columns / 2]: registers by thread; b: the words of shared memory. Returns c + A B + A B.
  py::array_t<float> out({128, kColumns / 2});
  auto* pa = visible<const uint32_t>(a, false);
  auto* pb = visible<const uint32_t>(b, false);
  auto* pc = visible<const float>(c, false);
  auto* po = visible<float>(out);
  const int words = static_cast<int>(b.size());
  run(1, 128, 4 * words, [=] {
    const int id = threadIdx.x;
    for (int i = id; i < words; i += 128) {
      store(reinterpret_cast<uint32_t*>(at(4 * i)), load(pb + i));
    }
    fence_async();
    __syncthreads();
    uint32_t fragment[4];
    float sums[kColumns / 8][4], fresh[kColumns / 8][4];
    for (int i = 0; i < 4; ++i) {
      fragment[i] = load(pa + 4 * id + i);
    }
    for (int i = 0; i < kColumns / 2; ++i) {
      sums[i / 4][i % 4] = load(pc + id * kColumns / 2 + i);
    }
    const uint64_t named = descriptor + (shared_address(at(0)) >> 4);
    warpgroup_fence(sums);
    warpgroup_multiply<T, kColumns, kTransposed>(sums, fragment, named, true);
    warpgroup_commit();
    warpgroup_multiply<T, kColumns, kTransposed>(fresh, fragment, named, false);
    warpgroup_commit();
    warpgroup_wait<1>(sums);
    warpgroup_wait<0>(fresh);
    for (int i = 0; i < kColumns / 2; ++i) {
      store(po + id * kColumns / 2 + i, sums[i / 4][i % 4] + fresh[i / 4][i % 4]);
    }
  });
  return out;
}

py::array_t<float> early(py::array_t<float> ones) {
  // Sums as a thread finds them before the wait for their product, and after it.
  py::array_t<float> out({2, 128});
  auto* in = visible<const float>(ones, false);
  auto* po = visible<float>(out);
  run(1, 128, 2048, [=] {
    for (int i = threadIdx.x; i < 512; i += 128) {
      store(reinterpret_cast<float*>(at(4 * i)), load(in));
    }
    fence_async();
    __syncthreads();
    float sums[2][4] = {};
    const uint32_t a[4] = {};
    warpgroup_fence(sums);
    warpgroup_multiply<Bfloat16, 16, false>(sums, a, panel_descriptor(at(0)), true);
    warpgroup_commit();
    store(po + threadIdx.x, sums[0][0]);
    warpgroup_wait<0>(sums);
    store(po + 128 + threadIdx.x, sums[0][0]);
  });
  return out;
}

py::array_t<float> pipeline(py::array_t<float> rows, int slots) {
  // Sums the rows (of 32) of a table: one warp copies boxes of eight rows into a ring of slots, another adds them up.
  py::array_t<float> out(32);
  uint64_t sizes[4] = {64, static_cast<uint64_t>(rows.shape(0)), 1, 1};
  const TensorMap map = map_of(visible<const float>(rows, false), sizes, {64, 8, 1, 1}, 0);
  auto* po = visible<float>(out);
  const int steps = static_cast<int>(rows.shape(0)) / 8;
  run(1, 64, slots * 1024 + 16 * slots, [=] {
    auto* full = reinterpret_cast<uint64_t*>(at(slots * 1024));
    auto* empty = full + slots;
    make_barriers(full, 2 * slots);
    float sum = 0;
    for (int step = 0; step < steps; ++step) {
      const int slot = step % slots;
      const int parity = step / slots % 2;
      if (threadIdx.x == 0) {
        barrier_wait(empty + slot, parity ^ 1);
        barrier_arrive_expecting(full + slot, 1024);
        copy_box(at(slot * 1024), map, 0, 8 * step, 0, 0, full + slot);
      } else if (threadIdx.x >= 32) {
        barrier_wait(full + slot, parity);
        for (int row = 0; row < 8; ++row) {
          sum += load(reinterpret_cast<const float*>(at(slot * 1024 + row * 128)) + threadIdx.x % 32);
        }
        __syncwarp();
        if (threadIdx.x == 32) {
          barrier_arrive(empty + slot);
        }
      }
    }
    if (threadIdx.x >= 32) {
      store(po + threadIdx.x - 32, sum);
    }
  });
  return out;
}

py::array_t<float> knowledge(py::array_t<float> values) {
  // Values handed round the block, with a wait that has nothing to wait for in between: it must not forget the barrier.
  py::array_t<float> out(128);
  auto* in = visible<const float>(values, false);
  auto* po = visible<float>(out);
  run(1, 128, 1024, [=] {
    auto* words = reinterpret_cast<float*>(at(0));
    auto* barrier = reinterpret_cast<uint64_t*>(at(512));
    store(words + threadIdx.x, load(in + threadIdx.x));
    make_barriers(barrier, 1);
    barrier_wait(barrier, 1);
    store(po + threadIdx.x, load(words + (threadIdx.x + 32) % 128));
  });
  return out;
}

// Each of these breaks one rule; named by what it breaks. Shared memory: 8 KB for a panel of 64 rows, then barriers.
void broken(const std::string& rule, py::array_t<float> table) {
  constexpr int kPanel = 8192;
  uint64_t sizes[4] = {64, 64, 1, 1};
  const TensorMap map = map_of(visible<const float>(table, false), sizes, {64, 64, 1, 1}, 3);
  TensorMap eight_rows = map;
  eight_rows.box[1] = 8;
  auto* barrier = reinterpret_cast<uint64_t*>(at(kPanel));
  auto* empty = barrier + 1;
  auto* words = reinterpret_cast<float*>(at(0));
  const uint32_t a[4] = {};

  const auto first = [] { return threadIdx.x == 0; };
  const auto copy = [=](int to = 0) { copy_box(at(to), map, 0, 0, 0, 0, barrier); };
  const auto copied = [=] {  // the panel, whole and known to all
    make_barriers(barrier, 2);
    if (first()) {
      barrier_arrive_expecting(barrier, kPanel);
      copy();
    }
    barrier_wait(barrier, 0);
  };
  const auto multiply = [=](float (&sums)[2][4], const uint32_t (&fragment)[4], uint64_t b) {
    warpgroup_fence(sums);
    warpgroup_multiply<Bfloat16, 16, false>(sums, fragment, b, true);
    warpgroup_commit();
  };
  const auto product = [=](uint64_t b) {
    float sums[2][4] = {};
    multiply(sums, a, b);
    warpgroup_wait<0>(sums);
  };

  const std::map<std::string, std::function<void()>> kernels = {
      {"barrier that nobody made", [=] { barrier_wait(barrier, 0); }},
      {"barrier used before it is known",
       [=] {
         if (first()) {
           barrier_init(barrier, 1);
         } else {
           barrier_wait(barrier, 1);
         }
       }},
      {"more arrivals than counted",
       [=] {
         if (first()) {
           barrier_init(barrier, 1);
           barrier_arrive_expecting(barrier, 16);
           barrier_arrive(barrier);
         }
       }},
      {"ordinary read of a barrier",
       [=] {
         make_barriers(barrier, 1);
         load(barrier);
       }},
      {"ordinary write to a barrier",
       [=] {
         make_barriers(barrier, 1);
         if (first()) {
           store(barrier, uint64_t{0});
         }
       }},
      {"wait for a parity of 2",
       [=] {
         make_barriers(barrier, 1);
         barrier_wait(barrier, 2);
       }},
      {"phase that never ends",
       [=] {
         make_barriers(barrier, 1);
         barrier_wait(barrier, 0);
       }},
      {"copy on a barrier that was not fenced",
       [=] {
         if (first()) {
           barrier_init(barrier, 1);
           barrier_arrive_expecting(barrier, kPanel);
           copy();
         }
       }},
      {"box to a misaligned place",
       [=] {
         make_barriers(barrier, 1);
         if (first()) {
           barrier_arrive_expecting(barrier, kPanel);
           copy(64);
         }
       }},
      {"box past the end",
       [=] {
         make_barriers(barrier, 1);
         if (first()) {
           barrier_arrive_expecting(barrier, kPanel);
           copy(1024);
         }
       }},
      {"box read before its phase is over",
       [=] {
         make_barriers(barrier, 1);
         if (first()) {
           barrier_arrive_expecting(barrier, kPanel);
           copy();
         }
         barrier_wait(barrier, 1);  // the phase before the first
         load(words);
       }},
      {"box whose barrier nobody asked",
       [=] {
         make_barriers(barrier, 2);
         if (first()) {
           for (int i = 0; i < 2; ++i) {
             barrier_arrive_expecting(barrier + i, 1024);
             copy_box(at(1024 * i), eight_rows, 0, 0, 0, 0, barrier + i);
           }
         }
         barrier_wait(empty, 0);
         load(words);
       }},
      {"bytes that nobody announced",
       [=] {
         make_barriers(barrier, 2);
         if (first()) {
           copy();
           barrier_arrive(barrier);
         }
         barrier_wait(empty, 0);
       }},
      {"too many bytes announced",
       [=] {
         make_barriers(barrier, 1);
         if (first()) {
           barrier_arrive_expecting(barrier, kPanel + 16);
           copy();
         }
         barrier_wait(barrier, 0);
       }},
      {"more bytes than a phase can count",
       [=] {
         make_barriers(barrier, 1);
         if (first()) {
           barrier_arrive_expecting(barrier, 1 << 20);
         }
       }},
      {"box into what others still read",
       [=] {
         copied();
         load(words + threadIdx.x);
         if (first()) {
           barrier_arrive_expecting(barrier, kPanel);
           copy();
         }
       }},
      {"box over an ordinary store without a fence",
       [=] {
         store(words + threadIdx.x, 1.0f);
         make_barriers(barrier, 1);
         if (threadIdx.x == 64) {
           barrier_arrive_expecting(barrier, kPanel);
           copy();
         }
       }},
      {"exit with a box under way",
       [=] {
         make_barriers(barrier, 1);
         if (first()) {
           barrier_arrive_expecting(barrier, kPanel);
           copy();
         }
       }},
      {"product without a fence",
       [=] {
         copied();
         float sums[2][4] = {};
         warpgroup_multiply<Bfloat16, 16, false>(sums, a, panel_descriptor(at(0)), true);
       }},
      {"product on registers changed since the fence",
       [=] {
         copied();
         float sums[2][4] = {};
         multiply(sums, a, panel_descriptor(at(0)));
         warpgroup_wait<0>(sums);
         sums[0][0] *= 2;
         warpgroup_multiply<Bfloat16, 16, false>(sums, a, panel_descriptor(at(0)), true);
       }},
      {"matrix that starts askew",
       [=] {
         copied();
         product(panel_descriptor(at(128)));
       }},
      {"matrix with another swizzle",
       [=] {
         copied();
         product((panel_descriptor(at(0)) & ~(uint64_t{3} << 62)) | uint64_t{2} << 62);
       }},
      {"matrix without swizzle",
       [=] {
         copied();
         product(panel_descriptor(at(0)) & ~(uint64_t{3} << 62));
       }},
      {"matrix past the end",
       [=] {
         copied();
         product(panel_descriptor(at(kPanel)));
       }},
      {"matrix before its phase is over",
       [=] {
         make_barriers(barrier, 1);
         if (first()) {
           barrier_arrive_expecting(barrier, kPanel);
           copy();
         }
         product(panel_descriptor(at(0)));
       }},
      {"matrix that nobody wrote", [=] { product(panel_descriptor(at(0))); }},
      {"matrix stored without a fence",
       [=] {
         for (int i = threadIdx.x; i < kPanel / 4; i += 128) {
           store(words + i, 1.0f);
         }
         __syncthreads();
         product(panel_descriptor(at(0)));
       }},
      {"sums changed while their product runs",
       [=] {
         copied();
         float sums[2][4] = {};
         multiply(sums, a, panel_descriptor(at(0)));
         sums[0][0] = 0.0f;
         warpgroup_wait<0>(sums);
       }},
      {"fragment changed while its product runs",
       [=] {
         copied();
         float sums[2][4] = {};
         uint32_t fragment[4] = {};
         multiply(sums, fragment, panel_descriptor(at(0)));
         fragment[3] = 1;
         warpgroup_wait<0>(sums);
       }},
      {"matrix released while its product runs",
       [=] {
         copied();
         float sums[2][4] = {};
         multiply(sums, a, panel_descriptor(at(0)));
         __syncthreads();
         if (first()) {
           barrier_arrive_expecting(barrier, kPanel);
           copy();
         }
         warpgroup_wait<0>(sums);
       }},
      {"warps with different products",
       [=] {
         copied();
         product(panel_descriptor(at(threadIdx.x < 32 ? 0 : 1024)));
       }},
      {"product that one warp skips",
       [=] {
         copied();
         if (threadIdx.x >= 32) {
           product(panel_descriptor(at(0)));
         }
       }},
      {"exit with a product under way",
       [=] {
         copied();
         float sums[2][4] = {};
         multiply(sums, a, panel_descriptor(at(0)));
       }},
  };
  const auto kernel = kernels.at(rule);
  try {
    run(1, 128, kPanel + 16, kernel);
  } catch (...) {
    emulation::machine().forget_arrays();
    throw;
  }
}

void half_a_warpgroup() {
  run(1, 64, 2048, [=] {
    float sums[2][4] = {};
    const uint32_t a[4] = {};
    warpgroup_fence(sums);
    warpgroup_multiply<Bfloat16, 16, false>(sums, a, panel_descriptor(at(0)), true);
  });
}

template <class T, int kColumns>
py::array_t<float> choose_transposed(bool transposed, py::array_t<uint32_t> a, py::array_t<uint32_t> b,
                                     uint64_t descriptor, py::array_t<float> c) {
  return (transposed ? product<T, kColumns, true> : product<T, kColumns, false>)(a, b, descriptor, c);
}

template <class T>
py::array_t<float> choose_columns(int columns, bool transposed, py::array_t<uint32_t> a, py::array_t<uint32_t> b,
                                  uint64_t descriptor, py::array_t<float> c) {
  const auto chosen = columns == 64   ? choose_transposed<T, 64>
                      : columns == 32 ? choose_transposed<T, 32>
                                      : choose_transposed<T, 16>;
  return chosen(transposed, a, b, descriptor, c);
}

}  // namespace

void bind_hopper(py::module_& module) {
  module.def("boxes", &boxes);
  module.def("product_bfloat16", &choose_columns<Bfloat16>);
  module.def("product_float16", &choose_columns<Float16>);
  module.def("early", &early);
  module.def("pipeline", &pipeline);
  module.def("knowledge", &knowledge);
  module.def("broken_hopper", &broken);
  module.def("half_a_warpgroup", &half_a_warpgroup);
}
