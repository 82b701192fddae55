// Draws a token a row: guidance, temperature, top-k, top-p, then argmax of logits plus Gumbel noise.
//
// A block owns a row and never sorts it. Scores map to 32-bit keys of the same order, and both filters keep every key
// from some threshold on, which a radix search finds in four passes of 8 bits: top-k descends into the bin where the
// count from above reaches k; top-p into the lowest bin that has keys and less than top_p of the weight above it.
// Counts and weights (fixed-point, 2^-40 of the largest) are integers, so the order of additions does not show.

#include "cuda/fragments.cuh"
#include "cuda/launch.cuh"
#include "cuda/philox.cuh"
#include "sampling/cuda.h"

namespace {

constexpr int kThreads = 256;
constexpr int kBins = 256;
constexpr float kWeightUnit = 0x1p40f;
using Weight = unsigned long long;

// Order of floats as order of integers; -0 and 0 are one.
DEVICE uint32_t key_of(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

template <class T>
DEVICE float element(const T* address) {
  if constexpr (sizeof(T) == 4) {
    return load(address);
  } else {
    return unpack<T>(load(address).bits).x;
  }
}

template <class T>
struct Row {
  const T* logits;
  const T* unconditional;
  float guidance_scale, temperature;

  DEVICE float score(int token) const {
    float value = element(logits + token);
    if (unconditional != nullptr) {
      const float base = element(unconditional + token);
      value = base + guidance_scale * (value - base);
      value = fmaxf(value, -kInfinity);  // NaN, of tokens that are ruled out, becomes -inf: it would have a key
    }
    return temperature == 0.0f ? value : value / temperature;
  }
};

struct Shared {
  Weight weights[kBins];
  uint32_t counts[kBins];
  float scores[kThreads / 32];  // the warps' largest
  int tokens[kThreads / 32];
  uint32_t prefix;  // bits of the threshold found so far
  uint32_t count;   // of keys above the range that `prefix` leaves open
  Weight weight;    // their weight
};

// The largest score of the block and the first token that has it; all threads get them.
DEVICE void largest_of_block(float& score, int& token, Shared* shared) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, score, distance);
    const int other_token = __shfl_xor_sync(0xffffffffu, token, distance);
    if (other > score || (other == score && other_token < token)) {
      score = other;
      token = other_token;
    }
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    store(&shared->scores[threadIdx.x / 32], score);
    store(&shared->tokens[threadIdx.x / 32], token);
  }
  __syncthreads();
#pragma unroll 1
  for (int warp = 0; warp < kThreads / 32; ++warp) {
    const float other = load(&shared->scores[warp]);
    const int other_token = load(&shared->tokens[warp]);
    if (other > score || (other == score && other_token < token)) {
      score = other;
      token = other_token;
    }
  }
}

// One pass: counts the keys at or above `lowest` that agree with the prefix above `shift` + 8 bits by their next 8
// bits, then descends into one bin. With `top_k` > 0 it counts to that; else it weighs up to `limit`.
template <class T>
DEVICE void descend(const Row<T>& row, int vocabulary, uint32_t lowest, float largest, int shift, uint32_t top_k,
                    Weight limit, Shared* shared) {
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
    store(&shared->counts[bin], 0u);
    store(&shared->weights[bin], Weight{0});
  }
  __syncthreads();
  const uint32_t prefix = load(&shared->prefix);
  for (int token = threadIdx.x; token < vocabulary; token += kThreads) {
    const float score = row.score(token);
    const uint32_t key = key_of(score);
    const bool inside = shift == 24 || key >> (shift + 8) == prefix >> (shift + 8);
    if (inside && key >= lowest) {
      const uint32_t bin = key >> shift & (kBins - 1);
      atomicAdd(&shared->counts[bin], 1u);
      if (top_k == 0) {
        atomicAdd(&shared->weights[bin], static_cast<Weight>(exp2_fast((score - largest) * kLog2E) * kWeightUnit));
      }
    }
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    // Lane l has bins 255 - 8 l down to 248 - 8 l; what lies above them is a scan over the lanes.
    constexpr int kEach = kBins / 32;
    const int lane = threadIdx.x;
    uint32_t count = 0;
    Weight weight = 0;
    for (int i = 0; i < kEach; ++i) {
      count += load(&shared->counts[kBins - 1 - kEach * lane - i]);
      weight += load(&shared->weights[kBins - 1 - kEach * lane - i]);
    }
    uint32_t count_above = count;
    Weight weight_above = weight;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const uint32_t more = __shfl_up_sync(0xffffffffu, count_above, distance);
      const Weight heavier = __shfl_up_sync(0xffffffffu, weight_above, distance);
      count_above += lane >= distance ? more : 0;
      weight_above += lane >= distance ? heavier : 0;
    }
    count_above += load(&shared->count) - count;
    weight_above += load(&shared->weight) - weight;
    int found = -1;
    uint32_t found_count = 0;
    Weight found_weight = 0;
    for (int i = 0; i < kEach; ++i) {
      const int bin = kBins - 1 - kEach * lane - i;
      const uint32_t keys = load(&shared->counts[bin]);
      const bool wanted =
          top_k > 0 ? count_above < top_k && count_above + keys >= top_k : keys > 0 && weight_above < limit;
      if (wanted) {
        found = bin;
        found_count = count_above;
        found_weight = weight_above;
      }
      count_above += keys;
      weight_above += load(&shared->weights[bin]);
    }
    const uint32_t finders = __ballot_sync(0xffffffffu, found >= 0);
    __syncwarp();  // all have read the totals that the last finder, who has the lowest bin, replaces
    if (found >= 0 && finders >> lane == 1u) {
      store(&shared->prefix, prefix | static_cast<uint32_t>(found) << shift);
      store(&shared->count, found_count);
      store(&shared->weight, found_weight);
    }
  }
  __syncthreads();
}

// The smallest key that a filter keeps.
template <class T>
DEVICE uint32_t threshold(const Row<T>& row, int vocabulary, uint32_t lowest, float largest, uint32_t top_k,
                          Weight limit, Shared* shared) {
  __syncthreads();
  if (threadIdx.x == 0) {
    store(&shared->prefix, 0u);
    store(&shared->count, 0u);
    store(&shared->weight, Weight{0});
  }
#pragma unroll 1
  for (int shift = 24; shift >= 0; shift -= 8) {
    descend(row, vocabulary, lowest, largest, shift, top_k, limit, shared);
  }
  return load(&shared->prefix);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) sample_kernel(const __grid_constant__ SampleParameters p) {
  auto* shared = reinterpret_cast<Shared*>(shared_memory());
  const int64_t index = blockIdx.x;
  const Row<T> row{
      static_cast<const T*>(p.logits) + index * p.logits_stride,
      p.unconditional == nullptr ? nullptr : static_cast<const T*>(p.unconditional) + index * p.unconditional_stride,
      p.guidance_scale, p.temperature};
  const int vocabulary = p.vocabulary;
  constexpr int kNone = 0x7fffffff;
  const bool greedy = p.temperature == 0.0f;
  uint32_t lowest = 0;
  if (!greedy && p.top_k > 0 && p.top_k < vocabulary) {
    lowest = threshold(row, vocabulary, 0u, 0.0f, static_cast<uint32_t>(p.top_k), Weight{0}, shared);
  }
  if (greedy || p.top_p < 1.0f) {
    float largest = -kInfinity;
    int token = kNone;
    for (int i = threadIdx.x; i < vocabulary; i += kThreads) {
      const float score = row.score(i);
      if (score > largest || token == kNone) {
        largest = score;
        token = i;
      }
    }
    largest_of_block(largest, token, shared);
    if (greedy) {
      if (threadIdx.x == 0) {
        store(p.tokens + index, static_cast<int64_t>(token));
      }
      return;
    }
    // The whole weight is what lies above the lowest key: a pass that descends nowhere would find it; this is shorter.
    __syncthreads();
    if (threadIdx.x == 0) {
      store(&shared->weight, Weight{0});
    }
    __syncthreads();
    Weight mine = 0;
    for (int i = threadIdx.x; i < vocabulary; i += kThreads) {
      const float score = row.score(i);
      if (key_of(score) >= lowest) {
        mine += static_cast<Weight>(exp2_fast((score - largest) * kLog2E) * kWeightUnit);
      }
    }
    atomicAdd(&shared->weight, mine);
    __syncthreads();
    // top_p of the weight, in whole units; at least one, so that the likeliest token always stays.
    const auto share = static_cast<Weight>(static_cast<double>(load(&shared->weight)) * p.top_p);
    lowest = threshold(row, vocabulary, lowest, largest, 0u, share < 1 ? Weight{1} : share, shared);
  }
  const Noise draw(p.seed, 1);
  const int quarter = (vocabulary + 3) / 4;
  float best = -kInfinity;
  int token = kNone;
  for (int column = threadIdx.x; column < quarter; column += kThreads) {
    float noise[4];
    draw(noise, column, index);
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int candidate = q * quarter + column;
      if (candidate >= vocabulary) {
        continue;
      }
      const float score = row.score(candidate);
      const float noisy = key_of(score) >= lowest ? score + noise[q] : -kInfinity;
      if (noisy > best || (noisy == best && candidate < token)) {
        best = noisy;
        token = candidate;
      }
    }
  }
  largest_of_block(best, token, shared);
  if (threadIdx.x == 0) {
    store(p.tokens + index, static_cast<int64_t>(token));
  }
}

template <class T>
void run(const SampleParameters& p, void* stream) {
  launch(sample_kernel<T>, dim3{static_cast<unsigned>(p.batch), 1, 1}, kThreads, static_cast<int>(sizeof(Shared)),
         stream, p);
}

}  // namespace

void sample_tokens(Element element, const SampleParameters& parameters, void* stream) {
  switch (element) {
    case Element::float32:
      return run<float>(parameters, stream);
    case Element::bfloat16:
      return run<Bfloat16>(parameters, stream);
    case Element::float16:
      return run<Float16>(parameters, stream);
  }
}
