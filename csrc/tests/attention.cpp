// The attention and decoding kernels on plain memory, for the sanitizers: every array is a separate allocation of
// exactly its size, filled with NaN where it is output, and every result is compared with sums in double precision.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "attention/kernels.h"
#include "bf16.h"
#include "decode/kernels.h"
#include "isa.h"

namespace {

using namespace dalle;
using namespace dalle::attention;

int failures = 0;

void expect(bool holds, const char* what, const char* name, int length, int width) {
  if (holds) return;
  std::printf("%s: %s, S = %d, D = %d\n", name, what, length, width);
  failures++;
}

template <class T>
T rounded(float x);
template <>
float rounded<float>(float x) {
  return x;
}
template <>
bf16 rounded<bf16>(float x) {
  uint32_t word;
  std::memcpy(&word, &x, sizeof word);
  return {uint16_t((word + 0x8000u) >> 16)};
}

// A mask as one direction of a schedule: full tiles first, then masked ones.
struct Side {
  std::vector<int32_t> offsets{0}, others, ids, full_counts, masks;

  template <class Sees>
  Side(int length, const Sees& sees) : masks(kTile * 2, -1) {
    const int tiles = (length + kTile - 1) / kTile;
    for (int t = 0; t < tiles; t++) {
      std::vector<int32_t> masked, masked_ids;
      int full = 0;
      for (int o = 0; o < tiles; o++) {
        std::vector<int32_t> bits(kTile * 2, 0);
        bool all = true, any = false;
        for (int row = 0; row < kTile; row++)
          for (int lane = 0; lane < kTile; lane++) {
            const int walked = o * kTile + row, held = t * kTile + lane;
            const bool seen = walked < length && held < length && sees(held, walked);
            all &= seen;
            any |= seen;
            if (seen) bits[row * 2 + lane / 32] |= int32_t(1u << (lane % 32));
          }
        if (all) others.push_back(o), ids.push_back(0), full++;
        if (!any || all) continue;
        masked.push_back(o);
        masked_ids.push_back(int32_t(masks.size() / (kTile * 2)));
        masks.insert(masks.end(), bits.begin(), bits.end());
      }
      others.insert(others.end(), masked.begin(), masked.end());
      ids.insert(ids.end(), masked_ids.begin(), masked_ids.end());
      full_counts.push_back(full);
      offsets.push_back(int32_t(others.size()));
    }
  }
  ListStorage lists(int length) const {
    return build_lists({offsets.data(), others.data(), ids.data(), full_counts.data(), masks.data()}, length, length);
  }
};

Lists view(const ListStorage& s) {
  return {s.full_offsets.data(), s.full_tiles.data(), s.pair_offsets.data(), s.pairs.data()};
}

struct AlignedMemory {
  float* data;
  explicit AlignedMemory(int64_t floats)
      : data(static_cast<float*>(std::aligned_alloc(64, size_t(floats + 15) / 16 * 64))) {
    for (int64_t i = 0; i < floats; i++) data[i] = NAN;
  }
  ~AlignedMemory() { std::free(data); }
};

template <class T>
void attention_case(const Kernels& kernels, const char* name, int length, int width, int cut, bool with_padding,
                    float softcap) {
  const double tolerance = sizeof(T) == 2 ? 4e-2 : 2e-5;
  const auto sees = [&](int i, int j) { return j <= i && i != 2 && (j < 70 || i - j < 9 || (i - j) % 13 == 0); };
  std::vector<int32_t> order;  // every third token last: a gather
  for (int i = 0; i < length; i++)
    if (i < 70 || i % 3) order.push_back(i);
  for (int i = 0; i < length; i++)
    if (i >= 70 && i % 3 == 0) order.push_back(i);
  const Side by_query(length, [&](int q, int k) { return sees(order[q], order[k]); });
  const Side by_key(length, [&](int k, int q) { return sees(order[q], order[k]); });
  const ListStorage query_lists = by_query.lists(length), key_lists = by_key.lists(length);
  const int tiles = (length + kTile - 1) / kTile;
  const Plan plan{length, tiles, order.data(), length, tiles, order.data(), view(query_lists), view(key_lists)};

  std::mt19937 generator(7);
  std::normal_distribution<float> normal;
  const auto values = [&] {
    std::vector<T> x(size_t(length) * width);
    for (T& e : x) e = rounded<T>(normal(generator));
    return x;
  };
  std::vector<T> q = values(), k = values(), v = values(), grad = values();
  std::vector<T> out(q.size(), rounded<T>(NAN)), dq = out, dk = out, dv = out;
  std::vector<float> lse(size_t(length), NAN), grad_lse(size_t(length), 0.25f);
  std::vector<uint8_t> padding(size_t(length), 0);
  for (int i = 0; with_padding && i < length; i += 5) padding[i] = 1;
  const auto array = [&](std::vector<T>& x) {
    return Array{x.data(), int64_t(length) * width, int64_t(length) * width, width};
  };
  const float scale = 0.4f;
  for (const bool scattered : {false, true}) {
    const Problem problem{&plan,
                          1,
                          1,
                          width,
                          scale,
                          softcap,
                          softcap > 0 ? scale / softcap : 0,
                          with_padding ? padding.data() : nullptr,
                          scattered};
    {
      AlignedMemory memory(kernels.forward_floats(problem));
      Scratch scratch{memory.data, -1};
      const ForwardArrays arrays{array(q), array(k), array(v), array(out), lse.data()};
      kernels.forward(problem, arrays, 0, 0, tiles, scratch);
    }
    {
      AlignedMemory memory(kernels.backward_floats(problem));
      Scratch scratch{memory.data, -1};
      const std::vector<int32_t> cuts =
          cut > 0 && cut < tiles ? std::vector<int32_t>{0, cut, tiles} : std::vector<int32_t>{0, tiles};
      const Ranges shared = share_keys(plan, cuts);
      const int64_t slot = 2 * kTile * kernels.rounded_width(width);
      std::vector<float> partial(size_t(shared.slot_offsets.back() * slot), NAN);
      const auto backward = [&](const Array& to_q, const Array& to_k, const Array& to_v) {
        const BackwardArrays arrays{array(q), array(k), array(v), array(out), array(grad),
                                    to_q,     to_k,     to_v,     lse.data(), grad_lse.data()};
        for (size_t r = 0; r + 1 < cuts.size(); r++)
          kernels.backward(problem, arrays, 0, cuts[r], cuts[r + 1], shared.destinations.data() + r * size_t(tiles),
                           partial.data(), scratch);
        for (int t = 0; t < tiles; t++)
          if (const int32_t count = shared.slot_offsets[t + 1] - shared.slot_offsets[t])
            kernels.reduce_keys(problem, arrays, 0, t, partial.data() + shared.slot_offsets[t] * slot, count);
      };
      backward(array(dq), array(dk), array(dv));
      for (int needs = 1; needs < 7; needs++) {  // some of the three: the same bits, and no other array is there
        std::vector<T> some[3];
        Array to[3] = {};
        for (int i = 0; i < 3; i++)
          if (needs >> i & 1) {
            some[i].assign(q.size(), rounded<T>(NAN));
            to[i] = array(some[i]);
          }
        backward(to[0], to[1], to[2]);
        const std::vector<T>* all[] = {&dq, &dk, &dv};
        for (int i = 0; i < 3; i++)
          if (needs >> i & 1)
            expect(std::memcmp(some[i].data(), all[i]->data(), q.size() * sizeof(T)) == 0,
                   "a gradient depends on which others are asked for", name, length, width);
      }
    }

    std::vector<double> want_dq(q.size()), want_dk(q.size()), want_dv(q.size());
    double worst[5] = {};
    const auto worse = [&](int which, double mine, double want) {
      const double error = std::fabs(mine - want);
      if (!(error <= worst[which])) worst[which] = std::isnan(error) ? INFINITY : error;
    };
    for (int i = 0; i < length; i++) {
      std::vector<double> p(size_t(length), 0.0), bent = p;
      double total = 0, delta = -double(grad_lse[i]);
      const auto visible = [&](int j) { return sees(i, j) && !padding[j]; };
      for (int j = 0; j < length; j++) {
        double s = 0;
        for (int d = 0; d < width; d++) s += double(to_float(q[i * width + d])) * to_float(k[j * width + d]);
        bent[j] = softcap > 0 ? std::tanh(scale * s / softcap) : 0.0;
        if (visible(j)) total += p[j] = std::exp(softcap > 0 ? softcap * bent[j] : scale * s);
      }
      if (total == 0) {
        expect(lse[i] == -INFINITY, "a query without keys has a log-sum-exp", name, length, width);
      } else {
        worse(1, lse[i], std::log(total));
      }
      for (int d = 0; d < width; d++) {
        double o = 0;
        for (int j = 0; j < length; j++) o += total > 0 ? p[j] / total * to_float(v[j * width + d]) : 0;
        worse(0, to_float(out[i * width + d]), o);
        delta += o * to_float(grad[i * width + d]);
      }
      for (int j = 0; j < length && total > 0; j++) {
        if (!visible(j)) continue;
        double dp = 0;
        for (int d = 0; d < width; d++) dp += double(to_float(grad[i * width + d])) * to_float(v[j * width + d]);
        const double weight = p[j] / total, slope = scale * weight * (dp - delta) * (1 - bent[j] * bent[j]);
        for (int d = 0; d < width; d++) {
          want_dq[i * width + d] += slope * to_float(k[j * width + d]);
          want_dk[j * width + d] += slope * to_float(q[i * width + d]);
          want_dv[j * width + d] += weight * to_float(grad[i * width + d]);
        }
      }
    }
    for (size_t i = 0; i < q.size(); i++) {
      worse(2, to_float(dq[i]), want_dq[i]);
      worse(3, to_float(dk[i]), want_dk[i]);
      worse(4, to_float(dv[i]), want_dv[i]);
    }
    const char* parts[] = {"out", "lse", "dq", "dk", "dv"};
    for (int i = 0; i < 5; i++)
      expect(worst[i] <= tolerance * (i < 2 ? 1 : width / 8.0), parts[i], name, length, width);
  }
}

template <class T>
void decode_case(const decode::Kernels& kernels, const char* name, int prefix, int listed, int width, float softcap,
                 bool eight_bit) {
  const int count = prefix + listed;
  std::mt19937 generator(3);
  std::normal_distribution<float> normal;
  const auto values = [&](int rows) {
    std::vector<T> x(size_t(rows) * width);
    for (T& e : x) e = rounded<T>(normal(generator));
    return x;
  };
  const int held_rows = count + listed;
  const std::vector<T> q = values(1), keys = values(held_rows), rows = values(held_rows);
  // As the cache has them: T itself, or eight bits and their scales.
  const size_t element = eight_bit ? 1 : sizeof(T);
  std::vector<char> held_keys(size_t(held_rows) * width * element), held_values(held_keys.size());
  std::vector<float> scales(size_t(held_rows) * 2);
  for (int i = 0; i < held_rows; i++) {
    const size_t at = size_t(i) * width;
    scales[2 * i] = kernels.write(keys.data() + at, width, held_keys.data() + at * element);
    scales[2 * i + 1] = kernels.write(rows.data() + at, width, held_values.data() + at * element);
  }
  const auto held_value = [&](const std::vector<char>& held, int row, int d, int which) {
    const size_t at = size_t(row) * width + d;
    if (eight_bit) return double(int8_t(held[at])) * scales[2 * row + which];
    T x;
    std::memcpy(&x, held.data() + at * element, sizeof x);
    return double(to_float(x));
  };
  const decode::Held held{held_keys.data(), held_values.data(), width, eight_bit ? scales.data() : nullptr};
  std::vector<int32_t> slots;
  for (int i = 0; i < listed; i++) slots.push_back(prefix + 2 * i);
  const decode::Visible visible{prefix, listed, slots.data()};
  constexpr int kParts = 3;
  const int64_t stride = (width + decode::kAlign - 1) / decode::kAlign * decode::kAlign;
  std::vector<float> sums(size_t(kParts * stride), NAN);
  decode::Part parts[kParts];
  for (int i = 0; i < kParts; i++)
    parts[i] = kernels.attend(q.data(), held, width, softcap > 0 ? 0.4f / softcap : 0.4f, softcap, visible,
                              count * i / kParts, count * (i + 1) / kParts, sums.data() + i * stride);
  std::vector<T> out(size_t(width), rounded<T>(NAN));
  kernels.combine(parts, sums.data(), stride, kParts, width, out.data());

  std::vector<double> want(size_t(width), 0.0);
  double total = 0;
  for (int j = 0; j < count; j++) {
    const int row = j < prefix ? j : slots[j - prefix];
    double s = 0;
    for (int d = 0; d < width; d++) s += double(to_float(q[d])) * held_value(held_keys, row, d, 0);
    const double weight = std::exp(softcap > 0 ? softcap * std::tanh(0.4 * s / softcap) : 0.4 * s);
    total += weight;
    for (int d = 0; d < width; d++) want[d] += weight * held_value(held_values, row, d, 1);
  }
  for (int d = 0; d < width; d++) {
    const double exact = count ? want[d] / total : 0.0, error = std::fabs(to_float(out[d]) - exact);
    expect(error <= (sizeof(T) == 2 ? 2e-2 : 1e-5), "decoding", name, count, width);
  }
}

}  // namespace

int main() {
  for (const std::string& isa : supported_isas()) {
    set_isa(isa);
    const char* name = isa.c_str();
    for (const int length : {1, 67, 201})
      for (const int width : {8, 40, 64})
        for (const bool padding : {false, true})
          for (const float softcap : {0.f, 3.f}) {
            attention_case<float>(attention_kernels().f32, name, length, width, length / kTile / 2, padding, softcap);
            attention_case<bf16>(attention_kernels().bf16, name, length, width, length / kTile / 2, padding, softcap);
          }
    for (const int width : {8, 24, 64, 256})
      for (const int prefix : {0, 5, 300})
        for (const int listed : {0, 1, 33})
          for (const float softcap : {0.f, 3.f}) {
            decode_case<float>(decode_kernels().f32, name, prefix, listed, width, softcap, false);
            decode_case<bf16>(decode_kernels().bf16, name, prefix, listed, width, softcap, false);
            decode_case<float>(decode_kernels().f32_eight_bit, name, prefix, listed, width, softcap, true);
            decode_case<bf16>(decode_kernels().bf16_eight_bit, name, prefix, listed, width, softcap, true);
          }
    std::printf("%s done\n", name);
  }
  return failures != 0;
}
