// Attention of one new token over a rolling cache, and the cache's update.
//
// A block serves one head of one sample, or a share ("split") of the keys it sees. A row of D elements is read by a
// group of kLanes lanes in 16-byte pieces; a warp holds 32 / kLanes groups. Every group walks its own keys, four at a
// time, with a softmax state of its own (m = largest score in base 2, l = sum of 2^(s - m), acc = sum of 2^(s - m) v),
// so lanes talk to each other only to finish a dot product; the states are merged once at the end:
//   m = max m_i,  l = sum 2^(m_i - m) l_i,  acc = sum 2^(m_i - m) acc_i.
// Which keys: the visible index t counts first through the slots 0 .. prefix - 1, then through the position's list.
// The new key and value are taken from k and v, not from the slot that another block may be writing.

#include "cuda/launch.cuh"
#include "cuda/vectors.cuh"
#include "decode/cuda.h"

namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
static_assert(sizeof(uint4) == kPiece);
constexpr int kAtOnce = 4;  // keys of a group whose loads are in flight together
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kMinusInfinity = -INFINITY;

// 2^(m - larger), 0 where nothing was seen yet.
DEVICE float weight(float m, float larger) { return m == kMinusInfinity ? 0.0f : exp2_fast(m - larger); }

template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads) decode_kernel(const __grid_constant__ DecodeParameters p) {
  constexpr int kElements = kVector<T>;
  constexpr int kGroups = kThreads / kLanes;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int group = threadIdx.x / kLanes;
  const int column = threadIdx.x % kLanes * kElements;  // of the row: this lane's 16 bytes
  const bool active = column < p.width;
  const int batch = blockIdx.x / p.heads;
  const int head = blockIdx.x % p.heads;
  const int split = blockIdx.y;

  const int64_t position = load(p.position);
  const int own_slot = load(p.slot + position);
  const int prefix = load(p.prefix + position);
  const int64_t list = load(p.offsets + position);
  const int visible = prefix + static_cast<int>(load(p.offsets + position + 1) - list);
  const int share = (visible + p.splits - 1) / p.splits;
  const int begin = split * share;
  const int end = begin + share < visible ? begin + share : visible;

  const T* q = static_cast<const T*>(p.q) + batch * p.q_strides[0] + head * p.q_strides[1] + column;
  const T* k = static_cast<const T*>(p.k) + batch * p.k_strides[0] + head * p.k_strides[1] + column;
  const T* v = static_cast<const T*>(p.v) + batch * p.v_strides[0] + head * p.v_strides[1] + column;
  T* keys = static_cast<T*>(p.keys) + batch * p.keys_strides[0] + head * p.keys_strides[1] + column;
  T* values = static_cast<T*>(p.values) + batch * p.values_strides[0] + head * p.values_strides[1] + column;

  float query[kElements] = {};
  if (active) {
    widen<T>(load(reinterpret_cast<const uint4*>(q)), query);
  }
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    query[i] *= p.scale * kLog2E;
  }

  float m = kMinusInfinity;
  float l = 0.0f;
  float acc[kElements] = {};
  for (int first = begin; first < end; first += kGroups * kAtOnce) {
    uint4 key_piece[kAtOnce];
    uint4 value_piece[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int t = first + u * kGroups + group;
      key_piece[u] = value_piece[u] = make_uint4(0, 0, 0, 0);
      if (t < end && active) {
        const int slot = t < prefix ? t : load(p.slots + list + (t - prefix));
        const bool own = slot == own_slot;
        key_piece[u] = load(reinterpret_cast<const uint4*>(own ? k : keys + slot * p.keys_strides[2]));
        value_piece[u] = load(reinterpret_cast<const uint4*>(own ? v : values + slot * p.values_strides[2]));
      }
    }
    float score[kAtOnce];
    float largest = m;
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      float key[kElements];
      widen<T>(key_piece[u], key);
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        sum += query[i] * key[i];
      }
#pragma unroll
      for (int distance = kLanes / 2; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      }
      score[u] = first + u * kGroups + group < end ? sum : kMinusInfinity;
      largest = fmaxf(largest, score[u]);
    }
    const float old = weight(m, largest);
    m = largest;
    l *= old;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      acc[i] *= old;
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const float p_u = weight(score[u], m);
      float value[kElements];
      widen<T>(value_piece[u], value);
      l += p_u;
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        acc[i] += p_u * value[i];
      }
    }
  }

  // Merge the groups of a warp,
#pragma unroll
  for (int distance = kLanes; distance < 32; distance *= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, m, distance);
    const float larger = fmaxf(m, other);
    const float mine = weight(m, larger);
    const float theirs = weight(other, larger);
    l = mine * l + theirs * __shfl_xor_sync(0xffffffffu, l, distance);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      acc[i] = mine * acc[i] + theirs * __shfl_xor_sync(0xffffffffu, acc[i], distance);
    }
    m = larger;
  }
  // then the warps: state [kWarps][D + kSoftmaxState] in shared memory.
  auto* state = reinterpret_cast<float*>(shared_memory());
  const int row = p.width + kSoftmaxState;
  if (lane < kLanes && active) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      store(state + warp * row + column + i, acc[i]);
    }
  }
  if (lane == 0) {
    store(state + warp * row + p.width, m);
    store(state + warp * row + p.width + 1, l);
  }
  __syncthreads();
  float all_m = kMinusInfinity;
  float all_l = 0.0f;
  float factor[kWarps];
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    all_m = fmaxf(all_m, load(state + w * row + p.width));
  }
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    factor[w] = weight(load(state + w * row + p.width), all_m);
    all_l += factor[w] * load(state + w * row + p.width + 1);
  }
  for (int d = 2 * threadIdx.x; d < p.width; d += 2 * kThreads) {
    float first = 0.0f;
    float second = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      first += factor[w] * load(state + w * row + d);
      second += factor[w] * load(state + w * row + d + 1);
    }
    if (p.splits == 1) {
      const float inverse = all_l > 0.0f ? 1.0f / all_l : 0.0f;
      store_pair(static_cast<T*>(p.out) + static_cast<int64_t>(blockIdx.x) * p.width + d, first * inverse,
                 second * inverse);
    } else {
      store(reinterpret_cast<float2*>(p.partial + (static_cast<int64_t>(blockIdx.x) * p.splits + split) * row + d),
            make_float2(first, second));
    }
  }
  if (p.splits > 1 && threadIdx.x == 0) {
    store(reinterpret_cast<float2*>(p.partial + (static_cast<int64_t>(blockIdx.x) * p.splits + split) * row + p.width),
          make_float2(all_m, all_l));
  }

  if (split == 0 && group == 0 && active) {
    store(reinterpret_cast<uint4*>(keys + own_slot * p.keys_strides[2]), load(reinterpret_cast<const uint4*>(k)));
    store(reinterpret_cast<uint4*>(values + own_slot * p.values_strides[2]), load(reinterpret_cast<const uint4*>(v)));
  }
}

// Merges the splits of a head; a thread takes two columns.
template <class T>
__global__ void __launch_bounds__(kThreads) decode_merge_kernel(const __grid_constant__ DecodeParameters p) {
  const int row = p.width + kSoftmaxState;
  const float* partial = p.partial + static_cast<int64_t>(blockIdx.x) * p.splits * row;
  float m = kMinusInfinity;
  for (int split = 0; split < p.splits; ++split) {
    m = fmaxf(m, load(partial + split * row + p.width));
  }
  for (int d = 2 * threadIdx.x; d < p.width; d += 2 * kThreads) {
    float l = 0.0f;
    float first = 0.0f;
    float second = 0.0f;
    for (int split = 0; split < p.splits; ++split) {
      const float2 state = load(reinterpret_cast<const float2*>(partial + split * row + p.width));
      const float2 sums = load(reinterpret_cast<const float2*>(partial + split * row + d));
      const float factor = weight(state.x, m);
      l += factor * state.y;
      first += factor * sums.x;
      second += factor * sums.y;
    }
    const float inverse = l > 0.0f ? 1.0f / l : 0.0f;
    store_pair(static_cast<T*>(p.out) + static_cast<int64_t>(blockIdx.x) * p.width + d, first * inverse,
               second * inverse);
  }
}

template <class T, int kLanes>
void run(const DecodeParameters& p, void* stream) {
  const auto heads = static_cast<unsigned>(p.batch * p.heads);
  const int shared_bytes = kWarps * (p.width + kSoftmaxState) * static_cast<int>(sizeof(float));
  launch(decode_kernel<T, kLanes>, dim3{heads, static_cast<unsigned>(p.splits), 1}, kThreads, shared_bytes, stream, p);
  if (p.splits > 1) {
    launch(decode_merge_kernel<T>, dim3{heads, 1, 1}, kThreads, 0, stream, p);
  }
}

// The narrowest group that holds a row.
template <class T>
void choose_lanes(const DecodeParameters& p, void* stream) {
  const int pieces = p.width / kVector<T>;
  if (pieces <= 4) {
    run<T, 4>(p, stream);
  } else if (pieces <= 8) {
    run<T, 8>(p, stream);
  } else if (pieces <= 16) {
    run<T, 16>(p, stream);
  } else {
    run<T, kMostBytes / kPiece>(p, stream);
  }
}

}  // namespace

void decode_attention(Element element, const DecodeParameters& parameters, void* stream) {
  switch (element) {
    case Element::float32:
      return choose_lanes<float>(parameters, stream);
    case Element::bfloat16:
      return choose_lanes<Bfloat16>(parameters, stream);
    case Element::float16:
      return choose_lanes<Float16>(parameters, stream);
  }
}
