// Elementwise loops over arrays of one shape in any layout.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "parallel.h"
#include "tensor.h"

namespace dalle {

template <size_t arrays>
class Strided {
 public:
  // The first array's layout says in which order elements are visited.
  Strided(const std::array<const Tensor*, arrays>& tensors, const std::array<void*, arrays>& data) {
    for (size_t a = 0; a < arrays; a++) data_[a] = static_cast<char*>(data[a]);
    const Tensor& first = *tensors[0];
    std::vector<int64_t> order;
    for (int64_t d = first.dim() - 1; d >= 0; d--)
      if (first.size(d) != 1) order.push_back(d);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return first.stride(a) < first.stride(b); });
    for (int64_t d : order) {
      Dimension dimension{first.size(d), {}};
      for (size_t a = 0; a < arrays; a++) dimension.strides[a] = tensors[a]->stride(d) * tensors[a]->element_size();
      if (dimensions_.empty() || !dimensions_.back().continued_by(dimension))
        dimensions_.push_back(dimension);
      else
        dimensions_.back().size *= dimension.size;
    }
    if (dimensions_.empty()) {
      dimensions_.push_back({1, {}});
      for (size_t a = 0; a < arrays; a++) dimensions_[0].strides[a] = tensors[a]->element_size();
    }
    for (const Dimension& dimension : dimensions_) count_ *= dimension.size;
  }

  // run(pointers, strides in bytes, count) for stretches along the innermost dimension; a thread takes `grain` elements
  // or more.
  template <class Run>
  void for_each(int64_t grain, const Run& run) const {
    if (count_ == 0) return;
    parallel_for(0, count_, grain, [&](int64_t begin, int64_t end) {
      const Dimension& inner = dimensions_[0];
      while (begin < end) {
        std::array<char*, arrays> at = data_;
        int64_t rest = begin;
        for (const Dimension& dimension : dimensions_) {
          const int64_t index = rest % dimension.size;
          for (size_t a = 0; a < arrays; a++) at[a] += index * dimension.strides[a];
          rest /= dimension.size;
        }
        const int64_t count = std::min(inner.size - begin % inner.size, end - begin);
        run(at, inner.strides, count);
        begin += count;
      }
    });
  }

 private:
  struct Dimension {
    int64_t size;
    std::array<int64_t, arrays> strides;  // in bytes

    bool continued_by(const Dimension& outer) const {
      for (size_t a = 0; a < arrays; a++)
        if (outer.strides[a] != size * strides[a]) return false;
      return true;
    }
  };

  std::array<char*, arrays> data_;
  std::vector<Dimension> dimensions_;  // innermost first
  int64_t count_ = 1;
};

}  // namespace dalle
