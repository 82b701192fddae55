// What the attention kernels share: fragments of row tiles, column tiles in shared memory, masks, and the walk.
//
// A block owns a tile of kRowTile rows at a time. A warp has 16 of them or, in `kParts` = 2 parts, 32, kept in
// registers as operand A of m16n8k16. A block walks over column tiles that lie in slots of shared memory. Which tile
// goes to which slot, and when, was planned on the host for the whole walk (the tile that is needed last makes room),
// so text keys stay where they are and a window of image keys slides along, without the kernel knowing of either. Loads
// run kAhead steps in front of the products.

#pragma once

#include "attention/cuda.h"
#include "cuda/fragments.cuh"
#include "cuda/launch.cuh"

// Where a thread stands: its block's head, its warp's rows, and its place (g, c) in their fragments.
struct Place {
  int lane, warp, g, c, batch, head;
  DEVICE explicit Place(int heads)
      : lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        g(lane / 4),
        c(lane % 4),
        batch(blockIdx.x / heads),
        head(blockIdx.x % heads) {}

  // Row g of one of a warp's parts, among the rows of the block's tile.
  DEVICE int row(int part = 0, int parts = 1) const { return (warp * parts + part) * 16 + g; }
};

// The block's head: the first element of its first row, and its rows.
template <class T>
DEVICE T* head_data(const Rows& rows, const Place& place) {
  return static_cast<T*>(rows.data) + place.batch * rows.strides[0] + place.head * rows.strides[1];
}

template <class T>
DEVICE HeadRows<T> head_of(const Rows& rows, const Place& place) {
  return {head_data<T>(rows, place), rows.strides[2]};
}

// Starts the copy of column tile `tile` of two tensors, one after the other: keys and values, or queries and the
// gradients of their outputs. Rows past the end are zeros.
template <class T, int kWidth>
DEVICE void copy_tiles(char* tiles, const HeadRows<T>& first, const HeadRows<T>& second, const Walk& walk, int tile) {
  constexpr int kPieces = kWidth / 8;
#pragma unroll 1  // unrolled, its addresses would take registers that the products need
  for (int i = threadIdx.x; i < kColumns * kPieces; i += kThreads<kWidth>) {
    const int row = static_cast<unsigned>(i) / kPieces;
    const int piece = static_cast<unsigned>(i) % kPieces;
    const int position = tile * kColumns + row;
    const bool valid = position < walk.length;
    const int token = valid ? load(walk.order + position) : 0;
    char* to = tiles + row * kPitch<kWidth> + 16 * piece;
    copy_async(to, first.row(token) + 8 * piece, valid);
    copy_async(to + kTileBytes<kWidth>, second.row(token) + 8 * piece, valid);
  }
}

// sums[part][n] += A B^T for the rows 8 n to 8 n + 7 of B, which begins at `tile`: scores of the warp's rows against
// the tile's.
template <class T, int kParts, int kFragments, int kSteps>
DEVICE void multiply_transposed(float (&sums)[kParts][kFragments][4], const uint32_t (&a)[kParts][kSteps][4],
                                const char* tile, int lane) {
  constexpr int kBytes = kPitch<16 * kSteps>;
  const char* mine = tile + (lane / 16 * 8 + lane % 8) * kBytes + lane / 8 % 2 * 16;
#pragma unroll
  for (int n = 0; n < kFragments / 2; ++n) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t b[4];
      load_matrix(b, mine + n * 16 * kBytes + k * 32);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        mma<T>(sums[part][2 * n], a[part][k], b[0], b[1]);
        mma<T>(sums[part][2 * n + 1], a[part][k], b[2], b[3]);
      }
    }
  }
}

// sums[part][n] += weights B for columns 8 n to 8 n + 7 of B, which begins at `tile`; weights are the warp's rows
// against the tile's.
template <class T, int kParts, int kSums, int kFragments>
DEVICE void multiply(float (&sums)[kParts][kSums][4], const float (&weights)[kParts][kFragments][4], const char* tile,
                     int lane) {
  constexpr int kBytes = kPitch<8 * kSums>;
  const char* mine = tile + (lane / 8 % 2 * 8 + lane % 8) * kBytes + lane / 16 * 16;
#pragma unroll
  for (int k = 0; k < kFragments / 2; ++k) {
    uint32_t a[kParts][4];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = weights[part][2 * k + i / 2] + i % 2 * 2;
        a[part][i] = pack<T>(pair[0], pair[1]);
      }
    }
#pragma unroll
    for (int n = 0; n < kSums / 2; ++n) {
      uint32_t b[4];
      load_matrix_transposed(b, mine + k * 16 * kBytes + n * 32);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        mma<T>(sums[part][2 * n], a[part], b[0], b[1]);
        mma<T>(sums[part][2 * n + 1], a[part], b[2], b[3]);
      }
    }
  }
}

struct Step {
  int tile, slot, mask;
  bool loads;
};

DEVICE Step read_step(const Walk& walk, int index) {
  const uint4 step = load(reinterpret_cast<const uint4*>(walk.steps) + index);
  return {static_cast<int>(step.x), static_cast<int>(step.y), static_cast<int>(step.z), step.w != 0};
}

// What a lane sees in its fragments of a step's products, a bit each: element i of fragment n of part p, which is
// column 8 n + 2 c + i % 2 of the part's row g or (i >= 2) g + 8, is bit 8 n + 4 p + i.
template <int kParts>
struct Visible {
  uint32_t bits;

  // Reads mask `step.mask`; of keys that are columns, those that `padding` removes are not seen. False where no lane of
  // the warp sees anything.
  DEVICE bool read(const Walk& walk, const Step& step, const Place& place, const bool* padding = nullptr) {
    bits = 0;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int32_t* mask = walk.masks + static_cast<int64_t>(step.mask) * kRowTile + place.row(part, kParts);
      bits |= own(load(mask), place.c) << 4 * part;
      bits |= own(load(mask + 8), place.c) << (4 * part + 2);
    }
    if (padding != nullptr) {
      const int position = step.tile * kColumns + place.lane;
      const int token = position < walk.length ? load(walk.order + position) : -1;
      padding += static_cast<int64_t>(place.batch) * walk.length;
      uint32_t kept = own(__ballot_sync(0xffffffffu, token >= 0 && !load(padding + token)), place.c);
      kept |= kept << 2;
      bits &= kept | kept << 4;
    }
    return __any_sync(0xffffffffu, bits != 0);
  }

  // The part's values that are not visible become `hidden`; values are its fragments from `first` on.
  template <int kFragments>
  DEVICE void hide(float (&values)[kFragments][4], int part, float hidden, int first = 0) const {
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        values[n][i] = (bits >> (8 * (first + n) + 4 * part + i) & 1) != 0 ? values[n][i] : hidden;
      }
    }
  }

 private:
  // Of a word of columns the two that a lane has of each eight, in the low bits of each byte.
  static DEVICE uint32_t own(uint32_t word, int c) { return word >> 2 * c & 0x03030303u; }
};

// The row tiles first_tile to last_tile - 1 of part blockIdx.y, and their steps, each visited when its column tile lies
// in its slot: `copy(column tile, slot)` has started kAhead steps in front.
template <class Copy>
class Walker {
 public:
  int first_tile, last_tile;

  DEVICE Walker(const Walk& walk, const Copy& copy)
      : first_tile(load(walk.part_tiles + blockIdx.y)),
        last_tile(load(walk.part_tiles + blockIdx.y + 1)),
        walk_(walk),
        copy_(copy),
        last_step_(load(walk.tile_steps + last_tile)) {
    const int first_step = load(walk.tile_steps + first_tile);
    for (int step = first_step; step < first_step + kAhead; ++step) {
      load_ahead(step);
    }
  }

  // Step `index` (row tile t has those from walk.tile_steps[t] on), once its column tile lies in its slot.
  DEVICE Step arrive(int index) const {
    const Step step = read_step(walk_, index);
    copy_async_wait<kAhead - 1>();
    __syncthreads();  // the tile is whole, and nobody reads the slot that is loaded next
    load_ahead(index + kAhead);
    return step;
  }

 private:
  DEVICE void load_ahead(int index) const {
    if (index < last_step_) {
      const Step step = read_step(walk_, index);
      if (step.loads) {
        copy_(step.tile, step.slot);
      }
    }
    copy_async_commit();  // one group a step, empty or not, so that waiting can count
  }

  const Walk& walk_;
  const Copy& copy_;
  int last_step_;
};

// The tokens at `position` and position + 8; -1 past the end.
DEVICE void tokens_of(int (&token)[2], const Walk& walk, int position) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int own = position + 8 * half;
    token[half] = own < walk.length ? load(walk.order + own) : -1;
  }
}

// Runs a kernel whose blocks walk: one for each head and part, with slots of `slot_bytes`.
template <int kWidth, class Parameters>
void launch_walk(void (*kernel)(Parameters), int slot_bytes, const Parameters& p, void* stream) {
  const dim3 grid{static_cast<unsigned>(p.batch * p.heads), static_cast<unsigned>(p.walk.parts), 1};
  launch(kernel, grid, kThreads<kWidth>, p.walk.slots * slot_bytes, stream, p);
}
