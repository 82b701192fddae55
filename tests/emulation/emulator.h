// A small emulation of the CUDA execution model: enough to run the sources of csrc/**/*.cu on a processor without a
// GPU, slowly, and to stop where hardware would go wrong silently.
//
// Every thread of a block is a fiber. A fiber runs until it has to wait for others (a barrier, a shuffle, an mma, a
// vote) and then yields to the next. When a whole round over the block's threads moves nobody on, the block is in a
// deadlock: a barrier that not all threads reach ends there, with a list of who waits where.
//
// Addresses that kernels see are not host addresses. Global memory consists of the arrays registered for the launch;
// shared memory is one array. Both lie where a host processor has no memory, so that a plain dereference crashes
// instead of passing unchecked. resolve() turns them into host pointers and faults on
//   - an address outside every registered array or outside the block's shared memory, and a write to a read-only array,
//   - a vector access that is not aligned to its size,
//   - shared memory read before anything was written there, or while an asynchronous copy into it is under way,
//   - shared memory that two threads touch, one of them writing, with nothing that orders the two accesses.
// The order of accesses is a happens-before relation kept in vector clocks, one component per warp: barriers join the
// clocks of those who meet, __syncwarp orders the lanes of a warp. So a missing barrier faults in whichever order the
// fibers happened to run.

#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace emulation {

using Where = std::source_location;

constexpr uint64_t kSharedBase = 0x6000'0000'0000'0000;  // not canonical: a dereference is a crash
constexpr uint64_t kGlobalBase = 0x7000'0000'0000'0000;
constexpr int kLanes = 32;
constexpr uint32_t kFullMask = 0xffffffffu;
constexpr int kUnit = 4;  // bytes of shared memory that one shadow entry covers, and the smallest shared access

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Per warp, the newest of its epochs that the owner knows to be over.
using Clock = std::vector<uint32_t>;

struct CopyGroup {
  struct Copy {
    uint64_t shared;
    const char* source;  // host memory; null: zeros
  };
  std::vector<Copy> copies;
};

struct Thread {
  int id = 0, warp = 0, lane = 0;
  dim3 index;
  void* stack_pointer = nullptr;
  bool finished = false;
  const char* waits_for = nullptr;
  CopyGroup open_copies;              // cp.async not yet committed
  std::deque<CopyGroup> copy_groups;  // committed, not yet waited for
};

// Lanes of one warp at one instruction that needs all of them.
struct Meeting {
  uint32_t arrived = 0;
  uint64_t generation = 0;
  const char* instruction = nullptr;
  std::array<void*, kLanes> operands{};
};

struct Barrier {
  int arrived = 0;
  uint64_t generation = 0;
  std::vector<int> threads;
};

struct Allocation {
  char* host;
  uint64_t bytes;
  bool writable;
};

// Shadow of four bytes of shared memory.
struct Unit {
  uint32_t write_epoch = 0;  // 0: never written
  int writer = -1;           // thread
  bool pending = false;      // an asynchronous copy is under way
  bool atomic = false;       // the last write was an atomic operation's, which another's may meet
};

struct ReadMark {
  uint32_t epoch = 0;
  int lane = -1;  // several lanes: kLanes
};

class Machine {
 public:
  // Global memory: makes a host array visible to kernels and returns the address that they may use.
  uint64_t register_array(void* host, uint64_t bytes, bool writable);
  void forget_arrays() {
    arrays_.clear();
    next_array_ = kGlobalBase;
  }

  void launch(dim3 grid, int threads, int shared_bytes, const std::function<void()>& kernel);

  // Threads of a block run in an order drawn from this seed (0: ascending).
  void set_order(uint64_t seed) { order_seed_ = seed; }

  Thread& thread() { return *current_; }
  dim3 block_index() const { return block_index_; }
  dim3 block_size() const { return {static_cast<unsigned>(threads_.size()), 1, 1}; }

  // Checked access; `bytes` is also the alignment that is demanded.
  char* read(uint64_t address, int bytes, Where where) { return resolve(address, bytes, false, where); }
  char* write(uint64_t address, int bytes, Where where) { return resolve(address, bytes, true, where); }
  char* update(uint64_t address, int bytes, Where where);  // for an atomic read and write

  void copy_async(uint64_t shared, uint64_t global, bool valid, Where where);
  void copy_async_commit();
  void copy_async_wait(size_t pending);

  // Waits for all lanes of `mask`; the last to come runs `finish` on everyone's operands.
  void meet(uint32_t mask, const char* instruction, void* operand,
            const std::function<void(std::array<void*, kLanes>&)>& finish, Where where);
  void sync_warp(uint32_t mask, Where where);
  void barrier();

  [[noreturn]] void fault(const std::string& what, Where where);

 private:
  void run_block(const std::function<void()>& kernel);
  void wait(const char* what);
  char* resolve(uint64_t address, int bytes, bool writes, Where where);
  char* resolve_global(uint64_t address, int bytes, bool writes, Where where);
  void check_read(uint64_t unit, Where where);
  void check_readers(uint64_t unit, Where where);
  void check_write(uint64_t unit, Where where);
  void stamp_write(uint64_t unit);
  bool ordered(int writer, uint32_t epoch) const;
  std::string describe_waiting() const;
  static void fiber_main();

  std::map<uint64_t, Allocation> arrays_;
  uint64_t next_array_ = kGlobalBase;
  uint64_t order_seed_ = 0;

  const std::function<void()>* kernel_ = nullptr;
  dim3 block_index_;
  std::vector<Thread> threads_;
  std::vector<char> stacks_;
  Thread* current_ = nullptr;
  void* scheduler_stack_ = nullptr;
  std::exception_ptr failure_;
  uint64_t progress_ = 0;

  std::vector<std::map<uint32_t, Meeting>> meetings_;  // per warp, per mask
  Barrier barrier_;
  std::vector<Clock> clocks_;  // per warp; its own component is its present epoch
  std::vector<char> shared_;
  std::vector<Unit> units_;
  std::vector<ReadMark> reads_;  // per unit and warp
};

Machine& machine();

// Values of IEEE half and bfloat16, rounded to nearest even, and tf32, cut off as the tensor cores do.
float from_half(uint16_t bits);
uint16_t to_half(float value);
float from_bfloat16(uint16_t bits);
uint16_t to_bfloat16(float value);

}  // namespace emulation
