#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <deque>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace dalle {
namespace {

constexpr size_t kSmallest = size_t(256) << 10;  // smaller blocks malloc keeps by itself
constexpr int32_t kNoIndex = -1;                 // of a device: memory from outside lies on "cpu", not on "cpu:0"
constexpr size_t kHugePage = size_t(2) << 20;

// What lies before the bytes that are handed out.
struct alignas(64) Block {
  size_t bytes;

  void* data() { return this + 1; }
};

// One part in eight at most is left over, so that a block fits what is a little larger or smaller next time.
size_t with_slack(size_t bytes) {
  size_t step = 4096;
  while (step * 16 <= bytes) step *= 2;
  return (bytes + sizeof(Block) + step - 1) / step * step;
}

// Fewer and cheaper faults the first time; where the system has no large pages to give, nothing is lost.
void prefer_large_pages(void* data, size_t bytes) {
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

int64_t limit_from_environment() {
  const char* text = std::getenv("DALLE_KERNELS_CPU_KEEP_MB");
  if (text == nullptr || *text == '\0') return int64_t(256) << 20;
  char* end = nullptr;
  const double megabytes = std::strtod(text, &end);
  if (*end != '\0' || !(megabytes >= 0 && megabytes < 1e9))
    throw std::invalid_argument(std::string("DALLE_KERNELS_CPU_KEEP_MB: got '") + text +
                                "', wanted a number of megabytes");
  return int64_t(megabytes * double(1 << 20));
}

// Held for a few instructions and never waited for: a thread that finds it taken (perhaps by a thread that a fork left
// behind) goes to the system instead.
class TriedLock {
 public:
  explicit TriedLock(std::atomic_flag& flag) : flag_(flag), held_(!flag.test_and_set(std::memory_order_acquire)) {}
  ~TriedLock() {
    if (held_) flag_.clear(std::memory_order_release);
  }
  TriedLock(const TriedLock&) = delete;
  explicit operator bool() const { return held_; }

 private:
  std::atomic_flag& flag_;
  const bool held_;
};

class Keeper {
 public:
  void* allocate(size_t bytes) {
    Block* block = take(bytes);
    return (block == nullptr ? fresh(bytes) : block)->data();
  }
  void give_back(void* data) {
    Block* block = static_cast<Block*>(data) - 1;
    const TriedLock lock(taken_);
    if (!lock || int64_t(block->bytes) > kept_limit()) return std::free(block);
    blocks_.push_back(block);
    kept_ += int64_t(block->bytes);
    shrink(kept_limit());
  }
  int64_t kept() const { return kept_; }
  void shrink_to(int64_t limit) {
    if (const TriedLock lock(taken_); lock) shrink(limit);
  }

 private:
  Block* take(size_t bytes) {
    const TriedLock lock(taken_);
    if (!lock) return nullptr;
    auto best = blocks_.end();
    for (auto it = blocks_.begin(); it != blocks_.end(); ++it)
      if ((*it)->bytes >= bytes && (*it)->bytes <= bytes + bytes / 4 &&
          (best == blocks_.end() || (*it)->bytes <= (*best)->bytes))
        best = it;
    if (best == blocks_.end()) return nullptr;
    Block* block = *best;
    blocks_.erase(best);
    kept_ -= int64_t(block->bytes);
    return block;
  }
  Block* fresh(size_t bytes) {
    const size_t total = with_slack(bytes);
    void* memory = std::aligned_alloc(alignof(Block), total);
    if (memory == nullptr) {  // what is kept may be what is missing
      shrink_to(0);
      memory = std::aligned_alloc(alignof(Block), total);
    }
    require(memory != nullptr, "dalle_kernels: cannot allocate ", int64_t(total), " bytes");
    prefer_large_pages(memory, total);
    return new (memory) Block{total - sizeof(Block)};
  }
  // With the lock held.
  void shrink(int64_t limit) {
    while (kept_ > limit) {
      kept_ -= int64_t(blocks_.front()->bytes);
      std::free(blocks_.front());
      blocks_.pop_front();
    }
  }

  std::atomic_flag taken_;
  std::deque<Block*> blocks_;  // oldest first
  std::atomic<int64_t> kept_ = 0;
};

// Never destroyed: tensors may outlive every static object.
Keeper& keeper() {
  static Keeper* const keeper = new Keeper;
  return *keeper;
}

std::atomic<int64_t>& limit() {
  static std::atomic<int64_t> limit{limit_from_environment()};
  return limit;
}

Tensor allocate(int64_t dimensions, const int64_t* sizes, const int64_t* strides, int64_t elements, DType dtype) {
  const size_t bytes = size_t(elements) * size_t(dtype_size(dtype));
  if (bytes < kSmallest || kept_limit() == 0) return empty_strided(dimensions, sizes, strides, dtype);
  void* data = keeper().allocate(bytes);
  AtenTensorHandle handle = nullptr;
  const AOTITorchError error = torch_from_blob(
      data, dimensions, sizes, strides, 0, torch_dtype(dtype), aoti_torch_device_type_cpu(), kNoIndex, &handle,
      aoti_torch_layout_strided(), nullptr, 0, [](void* given, void*) { keeper().give_back(given); }, nullptr);
  if (error != 0) keeper().give_back(data);
  succeeded(error, "make a tensor of memory");
  return Tensor(handle);
}

// Dimensions by their strides, smallest first, as torch orders them: an insertion sort in which equal strides go by
// size and a stride of 0 says nothing.
std::vector<int64_t> by_stride(const Tensor& tensor) {
  const auto compare = [&](int64_t a, int64_t b) -> int64_t {
    if (tensor.stride(a) == 0 || tensor.stride(b) == 0) return 0;
    if (tensor.stride(a) != tensor.stride(b)) return tensor.stride(a) - tensor.stride(b);
    return std::max<int64_t>(tensor.size(a) - tensor.size(b), 0);
  };
  std::vector<int64_t> order;
  for (int64_t d = tensor.dim() - 1; d >= 0; d--) {
    order.push_back(d);
    size_t at = order.size() - 1;
    for (size_t other = at; other-- > 0;) {
      const int64_t sign = compare(order[other], d);
      if (sign < 0) break;
      if (sign > 0) {
        std::swap(order[other], order[at]);
        at = other;
      }
    }
  }
  return order;
}

// Whether the elements fill a stretch of memory, each at a place of its own.
bool fills_its_memory(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dimensions;  // stride, size
  for (int64_t d = 0; d < tensor.dim(); d++)
    if (tensor.size(d) != 1) dimensions.emplace_back(tensor.stride(d), tensor.size(d));
  std::sort(dimensions.begin(), dimensions.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dimensions) {
    if (stride != expected) return tensor.numel() == 0;
    expected *= size;
  }
  return true;
}

}  // namespace

Tensor new_tensor(const std::vector<int64_t>& sizes, DType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1, elements = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
    elements *= sizes[i];
  }
  return allocate(int64_t(sizes.size()), sizes.data(), strides.data(), elements, dtype);
}

Tensor new_tensor_like(const Tensor& tensor, DType dtype) {
  std::vector<int64_t> strides(tensor.strides(), tensor.strides() + tensor.dim());
  if (!fills_its_memory(tensor)) {
    int64_t stride = 1;
    for (int64_t d : by_stride(tensor)) {
      strides[size_t(d)] = stride;
      stride *= std::max<int64_t>(tensor.size(d), 1);
    }
  }
  return allocate(tensor.dim(), tensor.sizes(), strides.data(), tensor.numel(), dtype);
}

Tensor new_rows_like(const Tensor& tensor) {
  Tensor result = new_tensor_like(tensor);
  if (result.stride(-1) == 1) return result;
  return new_tensor({tensor.sizes(), tensor.sizes() + tensor.dim()}, tensor.dtype());
}

int64_t kept_limit() { return limit().load(std::memory_order_relaxed); }

void set_kept_limit(int64_t bytes) {
  limit() = bytes;
  keeper().shrink_to(bytes);
}

int64_t kept_bytes() { return keeper().kept(); }

void release_kept() { keeper().shrink_to(0); }

}  // namespace dalle
