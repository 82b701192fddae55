// Attention forward. A tile of 64 queries lies across the lanes: its transpose is made once, and keys and values are
// read where they are, a unit at a time. Scores are S^T = K Q^T, one row a key, so the softmax over keys runs down the
// rows without any horizontal step:
//
//     full tiles     64 keys x 64 queries at a time, no mask anywhere
//     pairs of keys  for each group of 16 queries, the keys that its masked tiles leave, up to 256 at a time
//
// and after each block of keys  m' = max(m, max s), l' = l exp(m - m') + sum exp(s - m'), o' = o exp(m - m') + P^T V,
// the factor applied as mix() loads its sums.
#pragma once

#include "attention/tiles.h"

DALLE_TARGET_BEGIN
namespace dalle::DALLE_ISA {

constexpr int kListed = 128;  // pairs of keys that a group takes at a time

template <class T, class Dot>
struct Forward {
  using Source = Rows<T, Dot>;
  static constexpr bool kPairs = Dot::kDepth == 2;

  Source q, k, v;
  float *transposed_q, *scores, *weights, *out, *maximum, *running, *sum, *factor;
  uint8_t *padded, *tile_padded;  // by position, by tile; null without padding
  Pair* listed;
  const Problem& problem;
  int width, rounded;
  float scale, steepness;  // of the score that the softmax is taken of: q . k, or tanh(steepness q . k)

  static int64_t floats(const Problem& problem) { return Forward(problem, nullptr).carve(nullptr); }

  Forward(const Problem& problem, float* memory)
      : problem(problem), width(int(problem.width)), rounded(round_up(int(problem.width), kLanes)) {
    carve(memory);
  }

  int64_t carve(float* memory) {
    Carver carver{memory};
    const int64_t positions = int64_t(problem.plan->tiles) * kTile;
    const int units = width / Dot::kDepth;
    float* zeros = carver.floats(rounded);
    transposed_q = carver.floats(int64_t(units) * kTile);
    scores = carver.floats(kTile * kTile);
    weights = kPairs ? carver.floats(kTile / 2 * kTile) : scores;
    out = carver.floats(int64_t(kTile) * rounded);
    maximum = carver.floats(kTile);
    running = carver.floats(kTile);
    sum = carver.floats(kTile);
    factor = carver.floats(kTile);
    listed = carver.of<Pair>(kListed);
    padded = problem.padding ? carver.of<uint8_t>(positions) : nullptr;
    tile_padded = problem.padding ? carver.of<uint8_t>(problem.plan->tiles) : nullptr;
    const Plan& plan = *problem.plan;
    q = Source{nullptr, 0,       plan.query_order, plan.query_length, width,
               rounded, nullptr, nullptr,          nullptr,           zeros};
    k = v = Source{nullptr, 0, plan.order, plan.length, width, rounded, nullptr, nullptr, nullptr, zeros};
    k.carve(carver, problem.plan->tiles, problem.scattered);
    v.carve(carver, problem.plan->tiles, problem.scattered);
    return carver.used;
  }

  // Turns to a head; what it packs stays for the head's other tiles.
  void enter(const ForwardArrays& arrays, int64_t head, Scratch& scratch) {
    const int64_t b = head / problem.heads, h = head % problem.heads;
    const auto attach = [&](Source& rows, const Array& array) {
      rows.base = (const T*)array.data + b * array.batch + h * array.head;
      rows.stride = array.row;
    };
    attach(q, arrays.q);
    attach(k, arrays.k);
    attach(v, arrays.v);
    scale = problem.scale;
    steepness = problem.steepness;
    if (scratch.owner == head) return;
    scratch.owner = head;
    const Plan& plan = *problem.plan;
    std::memset((void*)q.zeros, 0, size_t(rounded) * sizeof(float));
    k.forget(plan.tiles);
    v.forget(plan.tiles);
    if (padded) {
      const uint8_t* row = problem.padding + b * plan.length;
      for (int t = 0; t < plan.tiles; t++) {
        tile_padded[t] = 0;
        for (int p = t * kTile; p < (t + 1) * kTile; p++) {
          padded[p] = p < plan.length && row[plan.order[p]];
          tile_padded[t] |= padded[p];
        }
      }
    }
  }

  // The softmax step of the queries in lanes `lane` .. lane + kLanes - 1 over `count` rows of scores (in place, or
  // packed in pairs into `p`): pairs is null where every row is visible. `highest` is the largest raw score.
  template <bool kMasked>
  DALLE_METHOD void weigh(const float* s, float* p, ptrdiff_t ld, int count, const Pair* pairs, int first_bit,
                          float* highest, float* top, float* total, float* rescale) {
    if (problem.softcap != 0) return weigh_capped<kMasked>(s, p, ld, count, pairs, first_bit, highest, top, total, rescale);
    weigh_as<kMasked, false>(s, p, ld, count, pairs, first_bit, highest, top, total, rescale);
  }
  template <bool kMasked>
  DALLE_APART void weigh_capped(const float* s, float* p, ptrdiff_t ld, int count, const Pair* pairs, int first_bit,
                                float* highest, float* top, float* total, float* rescale) {
    weigh_as<kMasked, true>(s, p, ld, count, pairs, first_bit, highest, top, total, rescale);
  }
  template <bool kMasked, bool kCapped>
  DALLE_METHOD void weigh_as(const float* s, float* p, ptrdiff_t ld, int count, const Pair* pairs, int first_bit,
                             float* highest, float* top, float* total, float* rescale) {
    const F rise = set(steepness);
    const auto score = [&](const float* from) __attribute__((always_inline)) {
      return kCapped ? tanh(rise * load(from)) : load(from);
    };
    const F slope = set(scale * kLog2E), before = load(top), now = max(top_of<kPairs>(score(highest), slope), before);
    const F drop = kPairs ? before - now : (before - now) * slope;
    const F decay = power(max(set(kZeroExponent), drop));
    store(rescale, decay);
    store(top, now);
    F sums[2] = {zero(), zero()};
    const auto walk = [&](auto is_far) __attribute__((always_inline)) {
      for (int row = 0; row < count; row += 2, s += 2 * ld, p += ld * 2 / Dot::kDepth) {
        F e[2];
        DALLE_UNROLL for (int j = 0; j < 2; j++) {
          e[j] = exponential<kPairs, is_far.value>(score(s + j * ld), slope, now);
          if constexpr (kMasked) e[j] = select(from_bits(uint32_t(pairs->bits[j]) >> first_bit), e[j], zero());
          sums[j] += e[j];
        }
        if constexpr (kMasked) pairs++;
        if constexpr (kPairs) {
          store(p, as_float(Dot::pack(e[0], e[1])));
        } else {
          store(p, e[0]);
          store(p + ld, e[1]);
        }
      }
    };
    if (far<kPairs>(now)) {
      walk(Int<1>{});
    } else {
      walk(Int<0>{});
    }
    store(total, fma(load(total), decay, sums[0] + sums[1]));
  }

  void full_tile(int tile, bool fresh) {
    k.prepare(tile);
    v.prepare(tile);
    const float* rows[kTile];
    for (int i = 0; i < kTile; i++) rows[i] = k.units(tile * kTile + i);
    for (int i = 0; i < kTile; i += kLanes) store(maximum + i, set(-3e38f));
    const int units = width / Dot::kDepth;
    for (int lane = 0; lane < kTile; lane += kWide * kLanes)
      for_rows<kTileRows>(kTile, [&](auto m, int i) __attribute__((always_inline)) {
        constexpr int M = m.value;
        dot_rows<Dot, M, kWide, 1>(rows + i, transposed_q + lane, units,
                                   [&](const F(&sums)[M][kWide]) __attribute__((always_inline)) {
          float *const to = scores + i * kTile + lane, *const highest = maximum + lane;
          DALLE_UNROLL for (int w = 0; w < kWide; w++) {
            F high = load(highest + w * kLanes);
            DALLE_UNROLL for (int j = 0; j < M; j++) {
              store(to + j * kTile + w * kLanes, sums[j][w]);
              high = max(high, sums[j][w]);
            }
            store(highest + w * kLanes, high);
          }
        });
      });
    for (int lane = 0; lane < kTile; lane += kLanes)
      weigh<false>(scores + lane, weights + lane, kTile, kTile, nullptr, 0, maximum + lane, running + lane, sum + lane,
                   factor + lane);
    for (int u = 0; u < kTile / Dot::kDepth; u++) rows[u] = v.mixed(tile * (kTile / Dot::kDepth) + u);
    if (fresh) {
      mix<Dot, Start::zero, kTile>(weights, rows, kTile / Dot::kDepth, out, rounded, nullptr);
    } else {
      mix<Dot, Start::scale, kTile>(weights, rows, kTile / Dot::kDepth, out, rounded, factor);
    }
  }

  // Group g of the tile against `n` <= kListed pairs of keys.
  void some_pairs(const Pair* pairs, int n, int g, bool fresh) {
    const float *key_rows[2 * kListed], *value_rows[2 * kListed];
    for (int i = 0; i < n; i++) {
      const int index = pairs[i].index;
      const int tile = int(unsigned(index) / (kTile / 2));
      k.prepare(tile);
      v.prepare(tile);
      key_rows[2 * i] = k.units(2 * index);
      key_rows[2 * i + 1] = k.units(2 * index + 1);
      if constexpr (kPairs) {
        value_rows[i] = v.mixed(index);
      } else {
        value_rows[2 * i] = v.mixed(2 * index);
        value_rows[2 * i + 1] = v.mixed(2 * index + 1);
      }
    }
    const int lane = g * kGroup, units = width / Dot::kDepth;
    for (int i = 0; i < kGroup; i += kLanes) store(maximum + lane + i, set(-3e38f));
    for_rows<kListRows>(2 * n, [&](auto m, int i) __attribute__((always_inline)) {
      constexpr int M = m.value;
      dot_rows<Dot, M, kVectors, kListChains>(key_rows + i, transposed_q + lane, units,
                                              [&](const F(&sums)[M][kVectors]) __attribute__((always_inline)) {
        float *const to = scores + i * kGroup, *const highest = maximum + lane;
        const Pair* const pair = pairs + unsigned(i) / 2;
        DALLE_UNROLL for (int w = 0; w < kVectors; w++) {
          F high = load(highest + w * kLanes);
          DALLE_UNROLL for (int j = 0; j < M; j++) {
            store(to + j * kGroup + w * kLanes, sums[j][w]);
            const Mask seen = from_bits(uint32_t(pair[j / 2].bits[j % 2]) >> (w * kLanes));
            high = select(seen, max(high, sums[j][w]), high);
          }
          store(highest + w * kLanes, high);
        }
      });
    });
    for (int i = 0; i < kGroup; i += kLanes)
      weigh<true>(scores + i, weights + i, kGroup, 2 * n, pairs, i, maximum + lane + i, running + lane + i,
                  sum + lane + i, factor + lane + i);
    float* rows_out = out + int64_t(lane) * rounded;
    if (fresh) {
      mix<Dot, Start::zero, kGroup>(weights, value_rows, 2 * n / Dot::kDepth, rows_out, rounded, nullptr);
    } else {
      mix<Dot, Start::scale, kGroup>(weights, value_rows, 2 * n / Dot::kDepth, rows_out, rounded, factor + lane);
    }
  }

  // Adds a pair to the list, without its padded keys, and runs a full list.
  void list(const Pair& pair, int& n, int g, bool& fresh) {
    Pair kept = pair;
    for (int j = 0; j < 2; j++)
      if (padded[2 * pair.index + j]) kept.bits[j] = 0;
    if (!(kept.bits[0] | kept.bits[1])) return;
    listed[n++] = kept;
    if (n == kListed) flush(n, g, fresh);
  }
  void flush(int& n, int g, bool& fresh) {
    if (n == 0) return;
    some_pairs(listed, n, g, fresh);
    n = 0;
    fresh = false;
  }

  void query_tile(const ForwardArrays& arrays, int64_t head, int tile) {
    const Plan& plan = *problem.plan;
    const Lists& lists = plan.by_query;
    q.transpose_into(tile, transposed_q);
    if (scale < 0) {  // the largest score is that of the largest product only where the scale is positive
      const U sign = set(kPairs ? 0x80008000u : 0x80000000u);
      for (int i = 0; i < width / Dot::kDepth * kTile; i += kLanes)
        store(transposed_q + i, as_float(as_words(load(transposed_q + i)) ^ sign));
      scale = -scale;
      steepness = -steepness;
    }
    if (problem.softcap != 0) scale = problem.softcap;
    for (int i = 0; i < kTile; i += kLanes) {
      store(running + i, set(kNothing));
      store(sum + i, zero());
    }
    bool fresh = true;
    const int32_t full_begin = lists.full_offsets[tile], full_end = lists.full_offsets[tile + 1];
    for (int32_t i = full_begin; i < full_end; i++) {
      const int other = lists.full_tiles[i];
      if (padded && tile_padded[other]) continue;
      full_tile(other, fresh);
      fresh = false;
    }
    for (int g = 0; g < kGroups; g++) {
      bool group_fresh = fresh;
      const Pair* pairs = lists.pairs + lists.pair_offsets[tile * kGroups + g];
      const int count = lists.pair_offsets[tile * kGroups + g + 1] - lists.pair_offsets[tile * kGroups + g];
      if (padded) {
        int n = 0;
        for (int32_t i = full_begin; i < full_end; i++) {
          const int other = lists.full_tiles[i];
          if (!tile_padded[other]) continue;
          for (int p = 0; p < kTile / 2; p++) list({other * (kTile / 2) + p, {0xFFFF, 0xFFFF}}, n, g, group_fresh);
        }
        for (int i = 0; i < count; i++) list(pairs[i], n, g, group_fresh);
        flush(n, g, group_fresh);
      } else {
        for (int i = 0; i < count; i += kListed) {
          some_pairs(pairs + i, count - i < kListed ? count - i : kListed, g, group_fresh);
          group_fresh = false;
        }
      }
      if (group_fresh)
        std::memset(out + int64_t(g) * kGroup * rounded, 0, size_t(kGroup) * rounded * sizeof(float));
    }
    finish(arrays, head, tile);
  }

  void finish(const ForwardArrays& arrays, int64_t head, int tile) {
    const Plan& plan = *problem.plan;
    const int64_t b = head / problem.heads, h = head % problem.heads;
    for (int i = 0; i < kTile; i += kLanes) {
      const F total = load(sum + i);
      const Mask seen = ~equal(total, zero());
      store(factor + i, select(seen, set(1.f) / total, zero()));
      const F lse = fma(load(running + i), set(kPairs ? 1.f / kLog2E : scale), log(total));
      store(maximum + i, select(is_nan(total), total, select(seen, lse, set(-INFINITY))));
    }
    T* base = (T*)arrays.out.data + b * arrays.out.batch + h * arrays.out.head;
    for (int i = 0; i < kTile && tile * kTile + i < plan.query_length; i++) {
      const int query = plan.query_order[tile * kTile + i];
      arrays.lse[head * plan.query_length + query] = maximum[i];
      T* row = base + query * arrays.out.row;
      const F share = set(factor[i]);
      for (int d = 0; d < width; d += kLanes) store_row(row, d, width, share * load(out + int64_t(i) * rounded + d));
    }
  }

  static void run(const Problem& problem, const ForwardArrays& arrays, int64_t head, int32_t first, int32_t last,
                  Scratch& scratch) {
    Forward forward(problem, scratch.memory);
    for (int32_t tile = first; tile < last; tile++) {
      forward.enter(arrays, head, scratch);
      forward.query_tile(arrays, head, tile);
    }
  }
};

}  // namespace dalle::DALLE_ISA
DALLE_TARGET_END
