// Small kernels that exercise the emulated machine itself, bound for tests/emulation/test_machine.py.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/launch.cuh"

namespace py = pybind11;

namespace {

// Makes a numpy array visible to kernels for the length of a call.
template <class T, class Array>
T* visible(Array& array, bool writable = true) {
  const void* data = array.data();
  return reinterpret_cast<T*>(emulation::machine().register_array(const_cast<void*>(data), array.nbytes(), writable));
}

void run(int blocks, int threads, int shared_bytes, const std::function<void()>& kernel) {
  emulation::machine().launch({static_cast<unsigned>(blocks), 1, 1}, threads, shared_bytes, kernel);
  emulation::machine().forget_arrays();
}

template <class T>
py::array_t<float> mma_tile(py::array_t<uint32_t> a, py::array_t<uint32_t> b, py::array_t<float> c) {
  // a [32, 4], b [32, 2], c [32, 4]: registers by lane.
  py::array_t<float> out({32, 4});
  auto* pa = visible<const uint32_t>(a, false);
  auto* pb = visible<const uint32_t>(b, false);
  auto* pc = visible<const float>(c, false);
  auto* po = visible<float>(out);
  run(1, 32, 0, [=] {
    const int lane = threadIdx.x;
    uint32_t words[4];
    float sums[4];
    for (int i = 0; i < 4; ++i) {
      words[i] = load(pa + 4 * lane + i);
      sums[i] = load(pc + 4 * lane + i);
    }
    mma<T>(sums, words, load(pb + 2 * lane), load(pb + 2 * lane + 1));
    for (int i = 0; i < 4; ++i) {
      store(po + 4 * lane + i, sums[i]);
    }
  });
  return out;
}

py::array_t<uint32_t> ldmatrix(py::array_t<uint32_t> tile, py::array_t<int> rows, bool transposed) {
  // tile: 32 rows of 8 half words (4 words); rows [32]: the row that each lane names; returns [32, 4] words by lane.
  py::array_t<uint32_t> out({32, 4});
  auto* source = visible<const uint32_t>(tile, false);
  auto* named = visible<const int>(rows, false);
  auto* po = visible<uint32_t>(out);
  run(1, 32, 512, [=] {
    const int lane = threadIdx.x;
    auto* shared = reinterpret_cast<uint32_t*>(shared_memory());
    for (int i = 0; i < 4; ++i) {
      store(shared + 4 * lane + i, load(source + 4 * lane + i));
    }
    __syncwarp();
    uint32_t words[4];
    if (transposed) {
      load_matrix_transposed(words, shared + 4 * load(named + lane));
    } else {
      load_matrix(words, shared + 4 * load(named + lane));
    }
    for (int i = 0; i < 4; ++i) {
      store(po + 4 * lane + i, words[i]);
    }
  });
  return out;
}

py::array_t<int> shuffles(py::array_t<int> values, int bits) {
  // [3, 32]: __shfl_xor_sync by `bits`, __ballot_sync of odd values, __shfl_up_sync.
  py::array_t<int> out({3, 32});
  auto* in = visible<const int>(values, false);
  auto* po = visible<int>(out);
  run(1, 32, 0, [=] {
    const int lane = threadIdx.x;
    const int value = load(in + lane);
    store(po + lane, __shfl_xor_sync(0xffffffffu, value, bits));
    store(po + 32 + lane, static_cast<int>(__ballot_sync(0xffffffffu, value % 2 != 0)));
    store(po + 64 + lane, __shfl_up_sync(0xffffffffu, value, bits));
  });
  return out;
}

py::array_t<float> block_sums(py::array_t<float> values, int blocks, int threads) {
  // Every block sums a stretch of `threads` values through shared memory and adds it to one global sum.
  py::array_t<float> out(1);
  out.mutable_at(0) = 0;
  auto* in = visible<const float>(values, false);
  auto* po = visible<float>(out);
  run(blocks, threads, 4 * threads, [=] {
    auto* shared = reinterpret_cast<float*>(shared_memory());
    const int id = threadIdx.x;
    store(shared + id, load(in + blockIdx.x * blockDim.x + id));
    for (int width = blockDim.x / 2; width > 0; width /= 2) {
      __syncthreads();
      if (id < width) {
        store(shared + id, load(shared + id) + load(shared + id + width));
      }
    }
    if (id == 0) {
      atomicAdd(po, load(shared));
    }
  });
  return out;
}

py::array_t<uint32_t> histogram(py::array_t<uint32_t> values, int threads) {
  // Counts values 0 to 7 by atomic additions to shared memory.
  py::array_t<uint32_t> out(8);
  auto* in = visible<const uint32_t>(values, false);
  auto* po = visible<uint32_t>(out);
  const auto elements = static_cast<int>(values.size());
  run(1, threads, 32, [=] {
    auto* shared = reinterpret_cast<uint32_t*>(shared_memory());
    const int id = threadIdx.x;
    if (id < 8) {
      store(shared + id, 0u);
    }
    __syncthreads();
    for (int i = id; i < elements; i += blockDim.x) {
      atomicAdd(shared + load(in + i), 1u);
    }
    __syncthreads();
    if (id < 8) {
      store(po + id, load(shared + id));
    }
  });
  return out;
}

py::array_t<uint32_t> conversions(py::array_t<float> values, bool half) {
  py::array_t<uint32_t> out(values.size());
  for (py::ssize_t i = 0; i < values.size(); ++i) {
    out.mutable_at(i) = half ? pack<Float16>(values.at(i), 0) : pack<Bfloat16>(values.at(i), 0);
  }
  return out;
}

// Each of these breaks one rule; named by what it breaks.
void broken(const std::string& rule, py::array_t<float> values) {
  auto* in = visible<const float>(values, false);
  const auto elements = static_cast<int>(values.size());
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const std::map<std::string, std::function<void()>> kernels = {
      {"global read past the end", [=] { load(in + elements - 31 + threadIdx.x); }},
      {"write to an input", [=] { store(const_cast<float*>(in), 1.0f); }},
      {"shared read past the end", [=] { load(shared + 64); }},
      {"shared write before the start", [=] { store(shared - 1, 1.0f); }},
      {"misaligned vector", [=] { load(reinterpret_cast<const float4*>(in + 1)); }},
      {"misaligned copy", [=] { copy_async(shared + 1, in, true); }},
      {"unwritten shared memory", [=] { load(shared + threadIdx.x); }},
      {"divergent barrier",
       [=] {
         if (threadIdx.x < 32) {
           __syncthreads();
         }
       }},
      {"shuffle that half a warp skips",
       [=] {
         if (threadIdx.x % 32 < 16) {
           __shfl_xor_sync(0xffffffffu, 1, 1);
         }
       }},
      {"shuffle from outside its mask",
       [=] {
         if (threadIdx.x % 32 < 16) {
           __shfl_xor_sync(0x0000ffffu, 1, 16);
         }
       }},
      {"lanes at different instructions",
       [=] {
         if (threadIdx.x % 2 == 0) {
           __shfl_xor_sync(0xffffffffu, 1, 1);
         } else {
           __ballot_sync(0xffffffffu, true);
         }
       }},
      {"race between warps", [=] { store(shared + threadIdx.x % 32, 1.0f); }},
      {"read without a barrier",
       [=] {
         store(shared + threadIdx.x, 1.0f);
         load(shared + (threadIdx.x ^ 32));
       }},
      {"read without a warp barrier",
       [=] {
         store(shared + threadIdx.x, 1.0f);
         load(shared + (threadIdx.x ^ 1));
       }},
      {"overwritten while others read",
       [=] {
         store(shared + threadIdx.x, 1.0f);
         __syncthreads();
         load(shared + (threadIdx.x ^ 32));
         store(shared + threadIdx.x, 2.0f);
       }},
      {"copy read before its wait",
       [=] {
         copy_async(shared + 4 * (threadIdx.x % 16), in, threadIdx.x < 16);
         copy_async_commit();
         load(shared + 4 * (threadIdx.x % 16));
         copy_async_wait<0>();
       }},
      {"copy read before its barrier",
       [=] {
         if (threadIdx.x < 16) {
           copy_async(shared + 4 * threadIdx.x, in, true);
         }
         copy_async_commit();
         copy_async_wait<0>();
         load(shared + threadIdx.x);
       }},
      {"too few groups waited for",
       [=] {
         if (threadIdx.x == 0) {
           copy_async(shared, in, true);
           copy_async_commit();
           copy_async(shared + 4, in, true);
           copy_async_commit();
           copy_async_wait<1>();
           load(shared + 4);
         }
       }},
      {"copy into what others still read",
       [=] {
         store(shared + threadIdx.x, 1.0f);
         __syncthreads();
         load(shared + (threadIdx.x ^ 32));
         if (threadIdx.x % 4 == 0) {
           copy_async(shared + threadIdx.x, in, true);
         }
         copy_async_commit();
         copy_async_wait<0>();
       }},
      {"atomic addition to what others write",
       [=] {
         store(shared + threadIdx.x, 1.0f);
         atomicAdd(shared + (threadIdx.x ^ 32), 1.0f);
       }},
      {"read beside atomic additions",
       [=] {
         store(shared + threadIdx.x, 1.0f);
         __syncthreads();
         atomicAdd(shared, 1.0f);
         load(shared);
       }},
      {"exit with a copy under way",
       [=] {
         if (threadIdx.x == 0) {
           copy_async(shared, in, true);
           copy_async_commit();
         }
       }},
  };
  const auto kernel = kernels.at(rule);
  try {
    run(1, 64, 256, kernel);
  } catch (...) {
    emulation::machine().forget_arrays();
    throw;
  }
}

}  // namespace

PYBIND11_MODULE(emulation_machine, module) {
  module.def("mma_bfloat16", &mma_tile<Bfloat16>);
  module.def("mma_float16", &mma_tile<Float16>);
  module.def("ldmatrix", &ldmatrix);
  module.def("shuffles", &shuffles);
  module.def("block_sums", &block_sums);
  module.def("histogram", &histogram);
  module.def("conversions", &conversions);
  module.def("broken", &broken);
  module.def("set_order", [](uint64_t seed) { emulation::machine().set_order(seed); });
}
