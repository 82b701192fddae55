#include "memory.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace dalle {
namespace {

constexpr size_t kSmallest = size_t(256) << 10;  // smaller blocks malloc keeps by itself
constexpr at::DispatchKeySet kCpu(at::DispatchKey::CPU);
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
    throw std::invalid_argument(std::string("DALLE_KERNELS_CPU_KEEP_MB: got '") + text + "', wanted a number of megabytes");
  return int64_t(megabytes * double(1 << 20));
}

class Keeper final : public at::Allocator {
 public:
  at::DataPtr allocate(size_t bytes) override {
    Block* block = take(bytes);
    if (block == nullptr) block = fresh(bytes);
    c10::profiledCPUMemoryReporter().New(block->data(), block->bytes);
    return {block->data(), block->data(), &give_back, at::Device(at::kCPU)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

  int64_t kept() {
    const std::lock_guard lock(mutex_);
    return kept_;
  }
  void release() {
    if (const std::unique_lock lock(mutex_, std::try_to_lock); lock) shrink(0);
  }

 private:
  // Taking and keeping never wait: a thread that finds the lock taken (perhaps by a thread that a fork left behind) goes
  // to torch's allocator instead.
  Block* take(size_t bytes) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    auto best = blocks_.end();
    for (auto it = blocks_.begin(); it != blocks_.end(); ++it)
      if ((*it)->bytes >= bytes && (*it)->bytes <= bytes + bytes / 4 && (best == blocks_.end() || (*it)->bytes <= (*best)->bytes))
        best = it;
    if (best == blocks_.end()) return nullptr;
    Block* block = *best;
    blocks_.erase(best);
    kept_ -= int64_t(block->bytes);
    return block;
  }
  Block* fresh(size_t bytes) {
    const size_t total = with_slack(bytes);
    Block* block = nullptr;
    try {
      block = static_cast<Block*>(c10::alloc_cpu(total));
    } catch (const c10::Error&) {  // what is kept may be what is missing
      release();
      block = static_cast<Block*>(c10::alloc_cpu(total));
    }
    prefer_large_pages(block, total);
    block->bytes = total - sizeof(Block);
    return block;
  }
  void keep(Block* block) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock || int64_t(block->bytes) > kept_limit()) return c10::free_cpu(block);
    blocks_.push_back(block);
    kept_ += int64_t(block->bytes);
    shrink(kept_limit());
  }
  // With the lock held.
  void shrink(int64_t limit) {
    while (kept_ > limit) {
      kept_ -= int64_t(blocks_.front()->bytes);
      c10::free_cpu(blocks_.front());
      blocks_.pop_front();
    }
  }
  static void give_back(void* data);

  std::mutex mutex_;
  std::deque<Block*> blocks_;  // oldest first
  int64_t kept_ = 0;
};

// Never destroyed: tensors may outlive every static object.
Keeper& keeper() {
  static Keeper* const keeper = new Keeper;
  return *keeper;
}

void Keeper::give_back(void* data) {
  c10::profiledCPUMemoryReporter().Delete(data);
  keeper().keep(static_cast<Block*>(data) - 1);
}

// torch fills fresh memory where it is asked for deterministic results, and small blocks are no trouble.
bool leave_to_torch(size_t bytes) {
  const at::Context& context = at::globalContext();
  return bytes < kSmallest || (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory());
}

}  // namespace

at::Tensor new_tensor(at::IntArrayRef sizes, at::TensorOptions options) {
  const at::ScalarType dtype = c10::typeMetaToScalarType(options.dtype());
  if (leave_to_torch(size_t(c10::multiply_integers(sizes)) * c10::elementSize(dtype))) return at::empty(sizes, options);
  return at::Tensor(at::detail::empty_generic(sizes, &keeper(), kCpu, dtype, std::nullopt));
}

at::Tensor new_tensor_like(const at::Tensor& tensor, std::optional<at::ScalarType> wanted) {
  const at::ScalarType dtype = wanted.value_or(tensor.scalar_type());
  if (leave_to_torch(size_t(tensor.numel()) * c10::elementSize(dtype)))
    return at::empty_like(tensor, tensor.options().dtype(dtype));
  const std::vector<int64_t> strides = tensor.is_non_overlapping_and_dense()
                                           ? tensor.strides().vec()
                                           : at::infer_dense_strides(tensor.sizes(), tensor.strides());
  return at::Tensor(at::detail::empty_strided_generic(tensor.sizes(), strides, &keeper(), kCpu, dtype));
}

at::Tensor new_rows_like(const at::Tensor& tensor) {
  at::Tensor result = new_tensor_like(tensor);
  return result.stride(-1) == 1 ? result : new_tensor(tensor.sizes(), tensor.options());
}

int64_t kept_limit() {
  static const int64_t limit = limit_from_environment();
  return limit;
}

int64_t kept_bytes() { return keeper().kept(); }

void release_kept() { keeper().release(); }

}  // namespace dalle
