#include "emulator.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <random>
#include <sstream>

// Saves the callee-saved registers of one fiber and restores those of another (System V, x86-64).
extern "C" void emulation_switch(void** save, void* restore);
asm(R"(
.text
.globl emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, .-emulation_switch
)");

namespace emulation {

namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr uint64_t kGap = 1 << 20;  // between arrays, so that an overrun does not reach the next

}  // namespace

Machine& machine() {
  static Machine instance;
  return instance;
}

void Machine::fault(const std::string& what, Where where) {
  std::ostringstream text;
  const std::string file = where.file_name();
  text << file.substr(file.find_last_of('/') + 1) << ':' << where.line() << ": ";
  if (current_ != nullptr) {
    text << "block (" << block_index_.x << ", " << block_index_.y << ", " << block_index_.z << ") thread "
         << current_->id << ": ";
  }
  text << what;
  throw Fault(text.str());
}

// ---------------------------------------------------------------------------------------------------------------
// Threads

void Machine::fiber_main() {
  Machine& self = machine();
  try {
    (*self.kernel_)();
    if (!self.current_->open_copies.copies.empty() || !self.current_->copy_groups.empty()) {
      self.fault("exits with asynchronous copies under way", Where::current());
    }
  } catch (...) {
    self.failure_ = std::current_exception();
  }
  self.current_->finished = true;
  ++self.progress_;
  emulation_switch(&self.current_->stack_pointer, self.scheduler_stack_);
}

void Machine::wait(const char* what) {
  current_->waits_for = what;
  emulation_switch(&current_->stack_pointer, scheduler_stack_);
  current_->waits_for = nullptr;
}

void Machine::launch(dim3 grid, int threads, int shared_bytes, const std::function<void()>& kernel) {
  current_ = nullptr;
  if (threads < 1 || threads > 1024 || threads % kLanes != 0) {
    throw Fault("a block of " + std::to_string(threads) + " threads; wanted a multiple of 32 up to 1024");
  }
  if (shared_bytes > 227 * 1024) {
    throw Fault(std::to_string(shared_bytes) + " bytes of shared memory; a block has at most 232448");
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
    throw Fault("a grid of (" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " + std::to_string(grid.z) +
                ") blocks");
  }
  threads_.resize(threads);
  shared_.resize(shared_bytes);
  stacks_.resize(threads * kStackBytes);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index_ = {x, y, z};
        run_block(kernel);
      }
    }
  }
}

void Machine::run_block(const std::function<void()>& kernel) {
  const int count = static_cast<int>(threads_.size());
  const int warps = count / kLanes;
  kernel_ = &kernel;
  failure_ = nullptr;
  meetings_.assign(warps, {});
  barrier_ = {};
  clocks_.assign(warps, Clock(warps, 0));
  for (int warp = 0; warp < warps; ++warp) {
    clocks_[warp][warp] = 1;
  }
  const size_t units = (shared_.size() + kUnit - 1) / kUnit;
  units_.assign(units, {});
  reads_.assign(units * warps, {});
  std::fill(shared_.begin(), shared_.end(), static_cast<char>(0xff));
  for (int id = 0; id < count; ++id) {
    Thread& thread = threads_[id];
    thread = {};
    thread.id = id;
    thread.warp = id / kLanes;
    thread.lane = id % kLanes;
    thread.index = {static_cast<unsigned>(id), 0, 0};
    // As if fiber_main had been called: its return address slot leaves the stack 8 bytes off a multiple of 16.
    auto top = reinterpret_cast<uintptr_t>(stacks_.data() + (id + 1) * kStackBytes) & ~uintptr_t{15};
    auto* words = reinterpret_cast<void**>(top) - 8;
    std::fill(words, words + 6, nullptr);
    words[6] = reinterpret_cast<void*>(&Machine::fiber_main);
    words[7] = nullptr;
    thread.stack_pointer = words;
  }
  std::vector<int> order(warps);
  std::iota(order.begin(), order.end(), 0);
  std::mt19937_64 random(order_seed_);
  int running = count;
  while (running > 0) {
    if (order_seed_ != 0) {
      std::shuffle(order.begin(), order.end(), random);
    }
    const uint64_t before = progress_;
    for (const int warp : order) {
      for (int lane = 0; lane < kLanes; ++lane) {
        Thread& thread = threads_[warp * kLanes + lane];
        if (thread.finished) {
          continue;
        }
        current_ = &thread;
        emulation_switch(&scheduler_stack_, thread.stack_pointer);
        if (failure_) {
          current_ = nullptr;
          std::rethrow_exception(failure_);
        }
        running -= thread.finished ? 1 : 0;
      }
    }
    if (running > 0 && progress_ == before) {
      const std::string waiting = describe_waiting();
      current_ = nullptr;
      throw Fault("deadlock in block (" + std::to_string(block_index_.x) + ", " + std::to_string(block_index_.y) +
                  ", " + std::to_string(block_index_.z) + "): " + waiting);
    }
  }
  current_ = nullptr;
}

std::string Machine::describe_waiting() const {
  std::map<std::string, int> places;
  for (const Thread& thread : threads_) {
    ++places[thread.finished ? "have exited" : std::string("wait at ") + thread.waits_for];
  }
  std::string text;
  for (const auto& [place, count] : places) {
    text += (text.empty() ? "" : ", ") + std::to_string(count) + " threads " + place;
  }
  return text;
}

void Machine::meet(uint32_t mask, const char* instruction, void* operand,
                   const std::function<void(std::array<void*, kLanes>&)>& finish, Where where) {
  if ((mask >> current_->lane & 1) == 0) {
    fault(std::string(instruction) + ": the lane is not in its own mask", where);
  }
  Meeting& meeting = meetings_[current_->warp][mask];
  if (meeting.arrived == 0) {
    meeting.instruction = instruction;
  } else if (std::strcmp(meeting.instruction, instruction) != 0) {
    fault(
        std::string("lanes of one warp meet at different instructions, ") + meeting.instruction + " and " + instruction,
        where);
  }
  meeting.operands[current_->lane] = operand;
  meeting.arrived |= 1u << current_->lane;
  if (meeting.arrived == mask) {
    finish(meeting.operands);
    meeting.arrived = 0;
    ++meeting.generation;
    ++progress_;
    return;
  }
  const uint64_t generation = meeting.generation;
  while (meeting.generation == generation) {
    wait(instruction);
  }
}

void Machine::sync_warp(uint32_t mask, Where where) {
  meet(
      mask, "__syncwarp", nullptr,
      [&](auto&) {
        Clock& clock = clocks_[current_->warp];
        ++clock[current_->warp];
      },
      where);
}

void Machine::barrier() {
  ++barrier_.arrived;
  if (barrier_.arrived == static_cast<int>(threads_.size())) {
    Clock joined(clocks_.size(), 0);
    for (const Clock& clock : clocks_) {
      for (size_t i = 0; i < clock.size(); ++i) {
        joined[i] = std::max(joined[i], clock[i]);
      }
    }
    for (size_t warp = 0; warp < clocks_.size(); ++warp) {
      clocks_[warp] = joined;
      ++clocks_[warp][warp];
    }
    barrier_.arrived = 0;
    ++barrier_.generation;
    ++progress_;
    return;
  }
  const uint64_t generation = barrier_.generation;
  while (barrier_.generation == generation) {
    wait("__syncthreads");
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Memory

uint64_t Machine::register_array(void* host, uint64_t bytes, bool writable) {
  // The low bits are the host array's, so that an unaligned view is unaligned here too.
  const uint64_t address = next_array_ + (reinterpret_cast<uintptr_t>(host) & 0xff);
  arrays_[address] = {static_cast<char*>(host), bytes, writable};
  next_array_ += (bytes + 2 * kGap) / kGap * kGap;
  return address;
}

char* Machine::resolve_global(uint64_t address, int bytes, bool writes, Where where) {
  auto after = arrays_.upper_bound(address);
  if (address < kGlobalBase || after == arrays_.begin()) {
    fault("an address that belongs to no array", where);
  }
  const auto& [base, array] = *std::prev(after);
  const uint64_t offset = address - base;
  if (offset + bytes > array.bytes) {
    fault("global " + std::string(writes ? "write" : "read") + " of " + std::to_string(bytes) + " bytes at byte " +
              std::to_string(offset) + " of an array of " + std::to_string(array.bytes),
          where);
  }
  if (writes && !array.writable) {
    fault("a write to an array that is an input", where);
  }
  return array.host + offset;
}

char* Machine::update(uint64_t address, int bytes, Where where) {
  if (address < kSharedBase || address >= kGlobalBase) {
    return resolve(address, bytes, true, where);
  }
  const uint64_t first = (address - kSharedBase) / kUnit;
  const uint64_t last = first + bytes / kUnit;
  // Atomic operations on one address need no order among themselves, only with plain accesses.
  const bool inside = last <= units_.size();
  if (inside && units_[first].write_epoch == 0) {
    fault("an atomic operation on shared memory that is read before it was written", where);
  }
  if (!inside || !units_[first].atomic) {
    resolve(address, bytes, true, where);
  }
  for (uint64_t unit = first; unit < last; ++unit) {
    check_readers(unit, where);
    stamp_write(unit);
    units_[unit].atomic = true;
  }
  return shared_.data() + (address - kSharedBase);
}

char* Machine::resolve(uint64_t address, int bytes, bool writes, Where where) {
  if (address % bytes != 0) {
    fault("an access of " + std::to_string(bytes) + " bytes at an address that is " + std::to_string(address % bytes) +
              " past a multiple of that",
          where);
  }
  if (address < kSharedBase || address >= kGlobalBase) {
    return resolve_global(address, bytes, writes, where);
  }
  const uint64_t offset = address - kSharedBase;
  if (offset + bytes > shared_.size()) {
    fault("shared " + std::string(writes ? "write" : "read") + " of " + std::to_string(bytes) + " bytes at byte " +
              std::to_string(offset) + " of " + std::to_string(shared_.size()),
          where);
  }
  if (bytes < kUnit) {
    fault("a shared access of less than 4 bytes, which this emulation does not follow", where);
  }
  for (uint64_t unit = offset / kUnit; unit < (offset + bytes) / kUnit; ++unit) {
    if (writes) {
      check_write(unit, where);
      stamp_write(unit);
    } else {
      check_read(unit, where);
    }
  }
  return shared_.data() + offset;
}

// Whether what `thread` did in its warp's epoch is over for the current thread.
bool Machine::ordered(int thread, uint32_t epoch) const {
  if (thread == current_->id) {
    return true;
  }
  const int warp = thread / kLanes;
  const uint32_t known = clocks_[current_->warp][warp];
  return warp == current_->warp ? epoch < known : epoch <= known;
}

void Machine::check_read(uint64_t index, Where where) {
  const Unit& unit = units_[index];
  if (unit.pending) {
    fault("shared memory (byte " + std::to_string(index * kUnit) +
              ") is read while an asynchronous copy into it is under way: no wait",
          where);
  }
  if (unit.write_epoch == 0) {
    fault("shared memory (byte " + std::to_string(index * kUnit) + ") is read before it was written", where);
  }
  if (!ordered(unit.writer, unit.write_epoch)) {
    fault("shared memory (byte " + std::to_string(index * kUnit) + ") was written by thread " +
              std::to_string(unit.writer) + " and no barrier lies between",
          where);
  }
  const uint32_t epoch = clocks_[current_->warp][current_->warp];
  ReadMark& mark = reads_[index * clocks_.size() + current_->warp];
  mark.lane = mark.epoch == epoch && mark.lane != current_->lane ? kLanes : current_->lane;
  mark.epoch = epoch;
}

void Machine::check_write(uint64_t index, Where where) {
  const Unit& unit = units_[index];
  if (unit.pending) {
    fault("shared memory (byte " + std::to_string(index * kUnit) +
              ") is written while an asynchronous copy into it is under way",
          where);
  }
  if (unit.write_epoch != 0 && !ordered(unit.writer, unit.write_epoch)) {
    fault("shared memory (byte " + std::to_string(index * kUnit) + ") was written by thread " +
              std::to_string(unit.writer) + " too and no barrier lies between",
          where);
  }
  check_readers(index, where);
}

void Machine::check_readers(uint64_t index, Where where) {
  for (size_t warp = 0; warp < clocks_.size(); ++warp) {
    const ReadMark& mark = reads_[index * clocks_.size() + warp];
    if (mark.epoch == 0) {
      continue;
    }
    const bool own = static_cast<int>(warp) == current_->warp;
    const uint32_t known = clocks_[current_->warp][warp];
    if (own ? mark.epoch == known && mark.lane != current_->lane : mark.epoch > known) {
      fault("shared memory (byte " + std::to_string(index * kUnit) + ") is overwritten with no barrier after warp " +
                std::to_string(warp) + " read it",
            where);
    }
  }
}

void Machine::stamp_write(uint64_t index) {
  units_[index].write_epoch = clocks_[current_->warp][current_->warp];
  units_[index].writer = current_->id;
  units_[index].atomic = false;
}

void Machine::copy_async(uint64_t shared, uint64_t global, bool valid, Where where) {
  constexpr int bytes = 16;
  if (shared % bytes != 0 || (valid && global % bytes != 0)) {
    fault("an asynchronous copy of 16 bytes from or to an address that is no multiple of 16", where);
  }
  const uint64_t offset = shared - kSharedBase;
  if (shared < kSharedBase || offset + bytes > shared_.size()) {
    fault("an asynchronous copy to byte " + std::to_string(offset) + " of " + std::to_string(shared_.size()), where);
  }
  for (uint64_t unit = offset / kUnit; unit < (offset + bytes) / kUnit; ++unit) {
    check_write(unit, where);
    units_[unit].pending = true;
  }
  current_->open_copies.copies.push_back({offset, valid ? resolve_global(global, bytes, false, where) : nullptr});
}

void Machine::copy_async_commit() {
  current_->copy_groups.push_back(std::move(current_->open_copies));
  current_->open_copies = {};
}

// Copies arrive as late as they may: when they are waited for.
void Machine::copy_async_wait(size_t pending) {
  while (current_->copy_groups.size() > pending) {
    for (const CopyGroup::Copy& copy : current_->copy_groups.front().copies) {
      if (copy.source != nullptr) {
        std::memcpy(shared_.data() + copy.shared, copy.source, 16);
      } else {
        std::memset(shared_.data() + copy.shared, 0, 16);
      }
      for (uint64_t unit = copy.shared / kUnit; unit < copy.shared / kUnit + 16 / kUnit; ++unit) {
        units_[unit].pending = false;
        stamp_write(unit);
      }
    }
    current_->copy_groups.pop_front();
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Numbers

float from_bfloat16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

uint16_t to_bfloat16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) {
    return 0x7fff;
  }
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int fraction = bits & 1023;
  const float sign = bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) {
    return fraction != 0 ? std::nanf("") : sign * INFINITY;
  }
  return sign * (exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                               : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25));
}

uint16_t to_half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) {
    return 0x7fff;
  }
  if (magnitude >= 65520.0f) {  // halfway from the largest half to the next power of two
    return sign | 0x7c00;
  }
  if (magnitude == 0.0f) {
    return sign;
  }
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const int unit = std::max(exponent - 11, -24);  // exponent of the last place; nearbyint rounds to even
  const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, -unit)));
  // The leading bit of a normal number's steps adds the last unit of its exponent; so does a carry from rounding.
  return static_cast<uint16_t>(sign + (static_cast<uint32_t>(unit + 24) << 10) + steps);
}

}  // namespace emulation
