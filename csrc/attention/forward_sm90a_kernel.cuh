// Attention forward for sm_90a: the walk of forward_kernel.cuh with the copy engine and warpgroup products.
//
// A block owns a part of one head's query tiles, as there, then of another head's, and so on. Key tiles lie in slots
// that the host planned, so that text keys stay in place and image keys slide past. Its warps have three roles:
//   - consumers, in warpgroups of 64 queries each. Queries go to registers as operand A, then per key tile: scores by
//     one product, the online softmax, weights (still in registers, operand A again) times values. The groups run
//     freely, so that the softmax of one lies beside the products of another;
//   - one producer of query tiles, always one tile ahead;
//   - three producers of key and value tiles, each for a third of the slots, as soon as they are empty: the next head's
//     tiles come in while this one's last queries are at work.
// They meet at barriers in shared memory alone, full and empty ones for the queries and for each slot. 64 tokens in a
// row are one box for the copy engine, per 64 elements of width; others, as image columns are, are gathered in 16-byte
// pieces to the same places.

#pragma once

#include "attention/softmax.cuh"
#include "cuda/hopper.cuh"
#include "cuda/launch.cuh"
#include "cuda/swizzle.cuh"

namespace {

constexpr int kColumns = 64;  // keys a tile, and rows that are copied together
constexpr int kPanelBytes = kColumns * kPanelPitch;
constexpr int kKeyProducers = 3;

// Consuming warpgroups, as many as registers allow. What setmaxnreg makes of an equal share:
// 4 x 112 + 32 = 5 x 96, and 2 x 224 + 48 <= 3 x 168.
template <int kWidth>
constexpr int kGroups = kWidth <= 64 ? 4 : 2;
template <int kWidth>
constexpr int kConsumers = 4 * kGroups<kWidth>;  // warps
template <int kWidth>
constexpr int kConsumerRegisters = kWidth <= 64 ? 112 : 224;
template <int kWidth>
constexpr int kProducerRegisters = kWidth <= 64 ? 32 : 48;
template <int kWidth>
constexpr int kAllThreads = 32 * (kConsumers<kWidth> + 1 + kKeyProducers);

template <int kWidth>
constexpr int kPanels = (kWidth + kPanelColumns - 1) / kPanelColumns;
template <int kWidth>
constexpr int kTileBytes = kPanels<kWidth> * kPanelBytes;  // of 64 rows: [panels][64][128 bytes], swizzled

struct Parameters {
  AttentionForward call;
  const int32_t* runs;  // per 64 positions: the first of 64 consecutive tokens (or of the last ones), or -1
  TensorMap q, k, v;
};

// A step as dalle_kernels/attention/cuda_sm90a.py plans it.
struct PlannedStep {
  int tile, slot, mask, flags;
  DEVICE bool loads() const { return (flags & 1) != 0; }
  DEVICE bool is_last_use() const { return (flags & 2) != 0; }
  DEVICE bool is_seen_by(int group) const { return (flags & 4 << group) != 0; }
  DEVICE bool is_masked_for(int group) const { return (flags & 64 << group) != 0; }
};

DEVICE PlannedStep planned_step(const Walk& walk, int index) {
  const int32_t* step = walk.steps + 4 * static_cast<int64_t>(index);
  return {load(step), load(step + 1), load(step + 2), load(step + 3)};
}

// Shared memory: barriers, then [groups] tiles of queries, then [slots][keys, values]: places that no register holds.
constexpr int kBarrierBytes = 1024;  // so that tiles start at multiples of that
constexpr int kMostSlots = 32;

DEVICE uint64_t* queries_full() { return reinterpret_cast<uint64_t*>(shared_memory()); }
DEVICE uint64_t* queries_empty() { return queries_full() + 1; }
DEVICE uint64_t* full(int slot) { return queries_full() + 2 + slot; }
DEVICE uint64_t* empty(int slot) { return queries_full() + 2 + kMostSlots + slot; }

template <int kWidth>
DEVICE void init_barriers(int slots) {
  barrier_init(queries_full(), kGroups<kWidth> / 2);
  barrier_init(queries_empty(), kConsumers<kWidth>);
  for (int slot = 0; slot < slots; ++slot) {
    barrier_init(full(slot), 1);
    barrier_init(empty(slot), kConsumers<kWidth>);
  }
}

template <int kWidth>
DEVICE char* query_tile(int group) {
  return shared_memory() + kBarrierBytes + group * kTileBytes<kWidth>;
}
template <int kWidth>
DEVICE char* key_tile(int slot) {
  return query_tile<kWidth>(kGroups<kWidth>) + slot * 2 * kTileBytes<kWidth>;
}

// Of each slot, whether it has been filled an odd number of times; all who walk count in step.
struct Fillings {
  uint32_t odd = 0;
  DEVICE void count(int slot) { odd ^= 1u << slot; }
  DEVICE int parity_of_latest(int slot) const { return static_cast<int>(~odd >> slot & 1); }
};

// To the block's next head, where it has one more.
DEVICE void go_on(Place& place, int heads) {
  place.head += static_cast<int>(gridDim.x);
  place.batch += place.head / heads;
  place.head %= heads;
}

// One of the warps that fill shared memory.
template <class T, int kWidth>
struct Producer {
  const Walk& walk;
  const int32_t* runs;
  const Place& place;

  // 64 rows, each from its own place; a lane knows the token of one in 32.
  DEVICE void gather(char* tile, const Table<T>& table, int group) const {
    constexpr int kPieces = kWidth / 8;
#pragma unroll 1
    for (int first = 0; first < kColumns; first += 32) {
      const int position = group * kColumns + first + place.lane;
      const int known = position < walk.length ? load(walk.order + position) : -1;
#pragma unroll 1
      for (int i = place.lane; i < 32 * kPieces; i += 32) {
        const int row = static_cast<unsigned>(i) / kPieces;
        const int piece = static_cast<unsigned>(i) % kPieces;
        const int token = __shfl_sync(0xffffffffu, known, row);
        copy_async(tile + piece / 8 * kPanelBytes + swizzled(first + row, piece % 8),
                   table.row(token < 0 ? 0 : token) + 8 * piece, token >= 0);
      }
    }
  }

  // Two tiles side by side in shared memory: 64 rows each, at positions 64 `group` on. Tells `barrier`.
  DEVICE void fill(char* to, const Rows& rows0, const TensorMap& map0, int group0, const Rows& rows1,
                   const TensorMap& map1, int group1, uint64_t* barrier) const {
    int bytes = 0;  // under way by the copy engine
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      char* tile = to + half * kTileBytes<kWidth>;
      const int group = half == 0 ? group0 : group1;
      const int run = load(runs + group);
      if (run < 0) {
        gather(tile, head_of<T>(half == 0 ? rows0 : rows1, place), group);
      } else {
        bytes += kTileBytes<kWidth>;
        if (place.lane == 0) {
#pragma unroll
          for (int panel = 0; panel < kPanels<kWidth>; ++panel) {
            copy_box(tile + panel * kPanelBytes, half == 0 ? map0 : map1, panel * kPanelColumns, run, place.head,
                     place.batch, barrier);
          }
        }
      }
    }
    copy_async_commit();
    copy_async_wait<0>();
    fence_async();  // what was gathered is for warpgroup products to read
    __syncwarp();
    if (place.lane == 0) {
      barrier_arrive_expecting(barrier, bytes);
    }
  }
};

// A warp's 16 rows of a query tile as operand A.
template <int kWidth>
DEVICE void load_queries(uint32_t (&query)[kWidth / 16][4], const Place& place) {
  const char* tile = query_tile<kWidth>(place.warp / 4);
  const int row = place.warp % 4 * 16 + place.lane % 16;
#pragma unroll
  for (int k = 0; k < kWidth / 16; ++k) {
    load_matrix(query[k], tile + k / 4 * kPanelBytes + swizzled(row, k % 4 * 2 + place.lane / 16));
  }
}

// score = queries keys^T, under way.
template <class T, int kWidth>
DEVICE void multiply_keys(float (&score)[kColumns / 8][4], const uint32_t (&query)[kWidth / 16][4], const char* keys) {
#pragma unroll
  for (int k = 0; k < kWidth / 16; ++k) {
    warpgroup_multiply<T, kColumns, false>(score, query[k], panel_descriptor(keys + k / 4 * kPanelBytes + k % 4 * 32),
                                           k > 0);
  }
  warpgroup_commit();
}

// acc += weights values, under way.
template <class T, int kWidth>
DEVICE void multiply_values(float (&acc)[kWidth / 8][4], const uint32_t (&weights)[kColumns / 16][4],
                            const char* values) {
  constexpr int kLast = kPanels<kWidth> - 1;
#pragma unroll
  for (int k = 0; k < kColumns / 16; ++k) {
    const char* rows = values + k * 16 * kPanelPitch;
#pragma unroll
    for (int panel = 0; panel < kLast; ++panel) {
      warpgroup_multiply<T, kPanelColumns, true>(acc + 8 * panel, weights[k],
                                                 panel_descriptor(rows + panel * kPanelBytes), true);
    }
    warpgroup_multiply<T, kWidth - kLast * kPanelColumns, true>(acc + 8 * kLast, weights[k],
                                                                panel_descriptor(rows + kLast * kPanelBytes), true);
  }
  warpgroup_commit();
}

// A warp's rows of the block's query tiles in one head; `tiles` counts those of all heads until now.
template <class T, int kWidth>
DEVICE void consume(const AttentionForward& call, const Place& place, Fillings& fillings, int& tiles) {
  constexpr int kRows = kColumns * kGroups<kWidth>;
  const Walk& walk = call.walk;
  const int group = place.warp / 4;
  const float to_base_2 = call.scale * kLog2E;
  const int last_tile = load(walk.part_tiles + blockIdx.y + 1);
  for (int tile = load(walk.part_tiles + blockIdx.y); tile < last_tile; ++tile) {
    uint32_t query[kWidth / 16][4];
    barrier_wait(queries_full(), tiles++ % 2);
    load_queries<kWidth>(query, place);
    __syncwarp();
    if (place.lane == 0) {
      barrier_arrive(queries_empty());
    }
    float acc[kWidth / 8][4] = {};
    OnlineSoftmax softmax;

    const int end = load(walk.tile_steps + tile + 1);
    for (int index = load(walk.tile_steps + tile); index < end; ++index) {
      const PlannedStep step = planned_step(walk, index);
      if (step.loads()) {
        fillings.count(step.slot);
      }
      const bool sees = step.is_seen_by(group);
      if (sees || step.is_last_use()) {
        barrier_wait(full(step.slot), fillings.parity_of_latest(step.slot));
      }
      if (sees) {
        const char* keys = key_tile<kWidth>(step.slot);
        float score[kColumns / 8][4];
        warpgroup_fence(query);
        multiply_keys<T, kWidth>(score, query, keys);

        Visible<kColumns> visible;
        const bool masked = step.is_masked_for(group) || call.padding != nullptr;
        if (masked) {
          visible.read(walk.masks + static_cast<int64_t>(step.mask) * kRows * visible.kWords, 0,
                       place.warp * 16 + place.g);
          if (call.padding != nullptr) {
            const bool* padding = call.padding + static_cast<int64_t>(place.batch) * walk.length;
            visible.remove_padding(padding, walk.order, step.tile * kColumns, walk.length, place.lane);
          }
        }
        warpgroup_wait<0>(score);
        softmax.step(score, acc, visible, masked, to_base_2, place.c);

        uint32_t weights[kColumns / 16][4];
#pragma unroll
        for (int k = 0; k < kColumns / 16; ++k) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float (&pair)[4] = score[2 * k + i / 2];
            weights[k][i] = pack<T>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
          }
        }
        warpgroup_fence(acc, weights);
        multiply_values<T, kWidth>(acc, weights, keys + kTileBytes<kWidth>);
        warpgroup_wait<0>(acc);
      }
      if (step.is_last_use()) {
        __syncwarp();
        if (place.lane == 0) {
          barrier_arrive(empty(step.slot));
        }
      }
    }

    int token[2];
    tokens_of(token, walk, tile * (kRows / kRowTile), place);
    softmax.finish<T, kWidth>(call, acc, token, place);
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kAllThreads<kWidth>, 1) forward_sm90a_kernel(const __grid_constant__ Parameters p) {
  const AttentionForward& call = p.call;
  const Walk& walk = call.walk;
  Place place(call.heads);
  if (threadIdx.x == 0) {
    init_barriers<kWidth>(walk.slots);
    fence_async();
  }
  __syncthreads();

  constexpr int kQueryProducer = kConsumers<kWidth>;
  Fillings fillings;
  int tiles = 0;
  if (place.warp < kConsumers<kWidth>) {
    registers_claim<kConsumerRegisters<kWidth>>();
    for (; place.batch < call.batch; go_on(place, call.heads)) {
      consume<T, kWidth>(call, place, fillings, tiles);
    }
  } else {
    registers_release<kProducerRegisters<kWidth>>();
    const Producer<T, kWidth> producer{walk, p.runs, place};
    for (; place.batch < call.batch; go_on(place, call.heads)) {
      if (place.warp == kQueryProducer) {
        for (int tile = load(walk.part_tiles + blockIdx.y); tile < load(walk.part_tiles + blockIdx.y + 1); ++tile) {
          barrier_wait(queries_empty(), ++tiles % 2);
#pragma unroll 1
          for (int group = 0; group < kGroups<kWidth>; group += 2) {
            const int rows = kGroups<kWidth> * tile + group;
            producer.fill(query_tile<kWidth>(group), call.q, p.q, rows, call.q, p.q, rows + 1, queries_full());
          }
        }
        continue;
      }
      const int end = load(walk.tile_steps + load(walk.part_tiles + blockIdx.y + 1));
      for (int index = load(walk.tile_steps + load(walk.part_tiles + blockIdx.y)); index < end; ++index) {
        const PlannedStep step = planned_step(walk, index);
        if (!step.loads()) {
          continue;
        }
        fillings.count(step.slot);
        if (step.slot % kKeyProducers == place.warp - kQueryProducer - 1) {
          barrier_wait(empty(step.slot), fillings.parity_of_latest(step.slot) ^ 1);
          producer.fill(key_tile<kWidth>(step.slot), call.k, p.k, step.tile, call.v, p.v, step.tile, full(step.slot));
        }
      }
    }
  }
}

// Boxes of 64 tokens by 64 elements of one head.
template <class T>
TensorMap map_of(const Rows& rows, const AttentionForward& p) {
  const uint64_t sizes[4] = {static_cast<uint64_t>(p.width), static_cast<uint64_t>(p.walk.length),
                             static_cast<uint64_t>(p.heads), static_cast<uint64_t>(p.batch)};
  const int64_t elements[3] = {rows.strides[2], rows.strides[1], rows.strides[0]};
  uint64_t strides[3];
  for (int i = 0; i < 3; ++i) {
    strides[i] = sizes[i + 1] == 1 ? 16 : 2 * elements[i];  // the stride of a single entry may be anything
  }
  return tensor_map<T>(rows.data, sizes, strides, {kPanelColumns, kColumns, 1, 1});
}

template <class T, int kWidth>
void run_forward(const AttentionForward& p, const int32_t* runs, int blocks, void* stream) {
  const Parameters parameters{p, runs, map_of<T>(p.q, p), map_of<T>(p.k, p), map_of<T>(p.v, p)};
  const int shared_bytes = kBarrierBytes + (kGroups<kWidth> + 2 * p.walk.slots) * kTileBytes<kWidth>;
  const dim3 grid{static_cast<unsigned>(blocks), static_cast<unsigned>(p.walk.parts), 1};
  launch(forward_sm90a_kernel<T, kWidth>, grid, kAllThreads<kWidth>, shared_bytes, stream, parameters);
}

template <class T>
void choose_width(const AttentionForward& p, const int32_t* runs, int blocks, void* stream) {
  switch (p.width) {
    case 16:
      return run_forward<T, 16>(p, runs, blocks, stream);
    case 32:
      return run_forward<T, 32>(p, runs, blocks, stream);
    case 64:
      return run_forward<T, 64>(p, runs, blocks, stream);
    case 80:
      return run_forward<T, 80>(p, runs, blocks, stream);
    case 96:
      return run_forward<T, 96>(p, runs, blocks, stream);
    case 128:
      return run_forward<T, 128>(p, runs, blocks, stream);
  }
}

}  // namespace
