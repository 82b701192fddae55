// What sm_90a adds to the machine: phase barriers, bulk copies of boxes, products by warpgroups.

#include <algorithm>
#include <bit>
#include <random>

#include "emulator.h"

namespace emulation {

namespace {

constexpr int kPiece = 16;                                // bytes that the copy engine and the swizzle move together
constexpr int64_t kMostBytes = (1 << 20) - 1;             // that a phase can wait for
constexpr int kWarpgroup = 4;                             // warps
constexpr int kDepth = 16;                                // columns of A and rows of B in a product
const float kRunning = std::bit_cast<float>(0x7fc0dead);  // NaN that stands in sums whose product still runs

// Where the byte at `address` lies when bits 4 on get the `bits` bits from 7 on added.
uint64_t swizzle(uint64_t address, int bits) { return address ^ ((address >> 7 & ((1 << bits) - 1)) << 4); }

bool same(float value, float other) { return std::bit_cast<uint32_t>(value) == std::bit_cast<uint32_t>(other); }

}  // namespace

// ---------------------------------------------------------------------------------------------------------------
// Phase barriers

void Machine::phase_barrier_init(uint64_t address, int arrivals, Where where) {
  const int index = static_cast<int>(phase_barriers_.size());
  if (index == kPhaseBarriers || arrivals < 1 || arrivals > kMostBytes) {
    fault("barrier " + std::to_string(index) + " of the block, for " + std::to_string(arrivals) + " arrivals", where);
  }
  std::memset(resolve(address, 8, true, where), 0, 8);
  const uint64_t unit = (address - kSharedBase) / kUnit;
  units_[unit].barrier = units_[unit + 1].barrier = index;
  PhaseBarrier barrier;
  barrier.arrivals = barrier.missing = arrivals;
  phase_barriers_.push_back(barrier);
}

int Machine::find_phase_barrier(uint64_t address, Where where) {
  const uint64_t unit = (address - kSharedBase) / kUnit;
  if (address < kSharedBase || address % 8 != 0 || unit >= units_.size() || units_[unit].barrier < 0) {
    fault("no barrier was made at this address", where);
  }
  check_visible(unit, where);
  return units_[unit].barrier;
}

void Machine::end_phase(int index) {
  PhaseBarrier& barrier = phase_barriers_[index];
  if (barrier.missing == 0 && barrier.bytes == 0) {
    barrier.missing = barrier.arrivals;
    ++barrier.phase;
    barrier.released = barrier.arrived;
    barrier.released.resize(clocks_.size() + kPhaseBarriers, 0);
    barrier.released[clocks_.size() + index] = barrier.phase;
  }
}

void Machine::phase_barrier_arrive(uint64_t address, int64_t bytes, Where where) {
  const int index = find_phase_barrier(address, where);
  PhaseBarrier& barrier = phase_barriers_[index];
  if (barrier.missing == 0) {
    fault("more arrivals than the barrier's " + std::to_string(barrier.arrivals) + " in one phase", where);
  }
  barrier.bytes += bytes;
  if (barrier.bytes > kMostBytes) {
    fault("a barrier that expects " + std::to_string(barrier.bytes) + " bytes", where);
  }
  Clock& clock = clocks_[current_->warp];
  join(barrier.arrived, clock);
  ++clock[current_->warp];
  --barrier.missing;
  ++progress_;
  end_phase(index);
}

void Machine::phase_barrier_wait(uint64_t address, int parity, Where where) {
  const int index = find_phase_barrier(address, where);
  if (parity != 0 && parity != 1) {
    fault("a parity of " + std::to_string(parity), where);
  }
  while (static_cast<int>(phase_barriers_[index].phase & 1) == parity) {
    wait("a barrier in shared memory");
  }
  join(clocks_[current_->warp], phase_barriers_[index].released);
}

void Machine::fence_async() { current_->fences.push_back(clocks_[current_->warp][current_->warp]); }

// What an asynchronous reader or writer asks beyond order: ordinary stores must have been fenced by who made them.
void Machine::check_async(uint64_t index, Where where) {
  const Unit& unit = units_[index];
  if (unit.writer < 0 || unit.write_epoch == 0) {
    return;
  }
  const Thread& writer = threads_[unit.writer];
  if (writer.fences.size() <= unit.fences || !ordered(unit.writer, writer.fences[unit.fences])) {
    fault("shared memory (byte " + std::to_string(index * kUnit) + ") was written by an ordinary store of thread " +
              std::to_string(unit.writer) + " with no fence_async() before it is used asynchronously",
          where);
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Copies of boxes

void Machine::copy_box(uint64_t shared, const TensorMap& map, const std::array<int, 4>& at, uint64_t barrier,
                       Where where) {
  const int index = find_phase_barrier(barrier, where);
  check_async((barrier - kSharedBase) / kUnit, where);
  uint64_t bytes = map.strides[0];
  for (const uint32_t side : map.box) {
    bytes *= side;
  }
  const uint64_t offset = shared - kSharedBase;
  if (shared < kSharedBase || offset % 128 != 0 || offset + bytes > shared_.size()) {
    fault("a box of " + std::to_string(bytes) + " bytes to byte " + std::to_string(offset) + " of " +
              std::to_string(shared_.size()) + "; it must start at a multiple of 128",
          where);
  }
  Transfer transfer{{}, index, map.swizzle, phase_barriers_[index].phase, where};
  const uint64_t row_pieces = map.box[0] * map.strides[0] / kPiece;
  for (uint64_t piece = 0; piece < bytes / kPiece; ++piece) {
    // The piece's place in the box, then in the tensor.
    uint64_t rest = piece / row_pieces;
    int64_t place[4] = {static_cast<int64_t>(piece % row_pieces * kPiece / map.strides[0]) + at[0]};
    for (int i = 1; i < 4; ++i) {
      place[i] = static_cast<int64_t>(rest % map.box[i]) + at[i];
      rest /= map.box[i];
    }
    bool inside = true;
    uint64_t address = map.data;
    for (int i = 0; i < 4; ++i) {
      inside = inside && place[i] >= 0 && place[i] < static_cast<int64_t>(map.sizes[i]);
      address += place[i] * map.strides[i];
    }
    const uint64_t to = swizzle(offset + piece * kPiece, map.swizzle);
    for (uint64_t unit = to / kUnit; unit < (to + kPiece) / kUnit; ++unit) {
      check_write(unit, where);
      check_async(unit, where);
      units_[unit].pending = true;
    }
    transfer.pieces.copies.push_back({to, inside ? resolve_global(address, kPiece, false, where) : nullptr});
  }
  transfers_.push_back(std::move(transfer));
  ++progress_;
}

// Lets one bulk copy arrive: the first, or where warps run in a drawn order any one of them.
bool Machine::deliver() {
  if (transfers_.empty()) {
    return false;
  }
  std::mt19937_64 random(order_seed_ + progress_);
  const auto chosen = transfers_.begin() + (order_seed_ == 0 ? 0 : random() % transfers_.size());
  const Transfer transfer = std::move(*chosen);
  transfers_.erase(chosen);
  PhaseBarrier& barrier = phase_barriers_[transfer.barrier];
  if (barrier.phase != transfer.phase) {
    current_ = nullptr;
    fault("a box arrives when the phase in which its copy began is over: its bytes were not announced", transfer.where);
  }
  for (const CopyGroup::Copy& copy : transfer.pieces.copies) {
    if (copy.source != nullptr) {
      std::memcpy(shared_.data() + copy.shared, copy.source, kPiece);
    } else {
      std::memset(shared_.data() + copy.shared, 0, kPiece);
    }
    for (uint64_t unit = copy.shared / kUnit; unit < (copy.shared + kPiece) / kUnit; ++unit) {
      units_[unit] = {};
      units_[unit].write_epoch = transfer.phase + 1;
      units_[unit].writer = by_barrier(transfer.barrier);
      units_[unit].swizzle = transfer.swizzle;
    }
  }
  barrier.bytes -= static_cast<int64_t>(transfer.pieces.copies.size() * kPiece);
  end_phase(transfer.barrier);
  ++progress_;
  return true;
}

// ---------------------------------------------------------------------------------------------------------------
// Products by warpgroups

void Machine::warpgroup_fence(Where where) {
  meet(kFullMask, "wgmma.fence", nullptr, [&](auto&) { products_[current_->warp].fenced = true; }, where);
}

// Byte of shared memory where element (k, column) of operand B lies. PTX ISA, "Strides" and "Canonical layouts": rows
// of the swizzle's span; eight of them make a group, groups are `stride` apart; where the rows run along k (not
// transposed) they stand for columns, else for k, and columns beyond a row's are `leading` further.
uint64_t Machine::element_of_b(const WarpgroupProduct& product, int k, int column) {
  const int mode = static_cast<int>(product.b >> 62);  // 1: 128 bytes, 2: 64, 3: 32
  const uint64_t start = (product.b & 0x3fff) << 4;
  const uint64_t leading = (product.b >> 16 & 0x3fff) << 4;
  const uint64_t stride = (product.b >> 32 & 0x3fff) << 4;
  const uint64_t span = 256 >> mode;
  if (mode == 0 || (product.b >> 49 & 7) != 0) {
    fault("a matrix without swizzle or with a base offset, which this emulation does not follow", product.where);
  }
  if (start % (8 * span) >= span) {
    fault("a matrix that starts " + std::to_string(start % (8 * span)) + " bytes past a multiple of " +
              std::to_string(8 * span),
          product.where);
  }
  const int row = product.kind.transposed ? k : column;
  const uint64_t along = 2 * (product.kind.transposed ? column : k);
  const uint64_t place = start + row / 8 * stride + row % 8 * span + along / span * leading + along % span;
  const uint64_t address = swizzle(place, 4 - mode);
  if (address < kSharedWindow || address - kSharedWindow + 2 > shared_.size()) {
    fault("a matrix that leaves shared memory", product.where);
  }
  const uint64_t offset = address - kSharedWindow;
  const int swizzled = units_[offset / kUnit].swizzle;
  if (swizzled != kUnknown && swizzled != 4 - mode) {
    fault("a matrix that was copied with another swizzle than its descriptor says", product.where);
  }
  return offset;
}

void Machine::check_b(const WarpgroupProduct& product, bool mark) {
  for (int k = 0; k < kDepth; ++k) {
    for (int column = 0; column < product.kind.columns; ++column) {
      const uint64_t unit = element_of_b(product, k, column) / kUnit;
      check_visible(unit, product.where);
      check_async(unit, product.where);
      if (mark) {
        mark_read(unit);
      }
    }
  }
}

void Machine::warpgroup_multiply(const ProductKind& kind, float* sums, const uint32_t* a, uint64_t b, Where where) {
  struct Registers {
    float* sums;
    const uint32_t* a;
  } mine{sums, a};
  meet(
      kFullMask, "wgmma.mma_async", &mine,
      [&](std::array<void*, kLanes>& lanes) {
        WarpProducts& warp = products_[current_->warp];
        WarpgroupProduct product{kind, b, {}, {}, {}, where};
        for (int lane = 0; lane < kLanes; ++lane) {
          const auto* registers = static_cast<Registers*>(lanes[lane]);
          product.sums[lane] = registers->sums;
          product.a[lane] = registers->a;
          std::copy_n(registers->a, 4, product.a_then[lane].begin());
        }
        if (!warp.fenced) {
          fault("a product with no warpgroup_fence() since its registers may have changed", where);
        }
        const int group = current_->warp / kWarpgroup;
        if (static_cast<size_t>(group + 1) * kWarpgroup > clocks_.size()) {
          fault("a product by a warpgroup of fewer than four warps", where);
        }
        auto& agreed = agreed_[group];
        if (warp.issued == agreed.size()) {
          agreed.emplace_back(kind, b);
        }
        const auto& [first, first_b] = agreed[warp.issued++];
        if (first.columns != kind.columns || first.transposed != kind.transposed || first.adds != kind.adds ||
            first_b != b) {
          fault("the warps of a warpgroup run different products", where);
        }
        check_b(product, false);
        WarpProducts::Sums& kept = warp.sums[product.sums[0]];
        for (int lane = 0; lane < kLanes && kept.running == 0; ++lane) {
          kept.values[lane].assign(product.sums[lane], product.sums[lane] + kind.columns / 2);
          std::fill_n(product.sums[lane], kind.columns / 2, kRunning);
        }
        ++kept.running;
        warp.open.push_back(product);
      },
      where);
}

void Machine::warpgroup_commit(Where where) {
  meet(
      kFullMask, "wgmma.commit_group", nullptr,
      [&](auto&) {
        WarpProducts& warp = products_[current_->warp];
        warp.groups.push_back(std::move(warp.open));
        warp.open.clear();
      },
      where);
}

// Products are computed as late as they may be: when they are waited for.
void Machine::warpgroup_wait(size_t pending, Where where) {
  meet(
      kFullMask, "wgmma.wait_group", nullptr,
      [&](auto&) {
        WarpProducts& warp = products_[current_->warp];
        warp.fenced = false;
        while (warp.groups.size() > pending) {
          for (const WarpgroupProduct& product : warp.groups.front()) {
            finish(product);
          }
          warp.groups.pop_front();
        }
      },
      where);
}

void Machine::finish(const WarpgroupProduct& product) {
  const int columns = product.kind.columns;
  check_b(product, true);
  std::vector<float> b(kDepth * columns);
  for (int k = 0; k < kDepth; ++k) {
    for (int column = 0; column < columns; ++column) {
      uint16_t bits;
      std::memcpy(&bits, shared_.data() + element_of_b(product, k, column), 2);
      b[k * columns + column] = product.kind.widen(bits);
    }
  }
  float a[16][kDepth];
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!std::equal(product.a_then[lane].begin(), product.a_then[lane].end(), product.a[lane])) {
      fault("a fragment of A was changed while its product ran", product.where);
    }
    for (int i = 0; i < 8; ++i) {  // word i / 2, half i % 2
      const auto bits = static_cast<uint16_t>(product.a_then[lane][i / 2] >> (16 * (i % 2)));
      a[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i % 2 + i / 4 * 8] = product.kind.widen(bits);
    }
  }
  WarpProducts& warp = products_[current_->warp];
  WarpProducts::Sums& kept = warp.sums.at(product.sums[0]);
  --kept.running;
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < columns / 2; ++i) {
      const int row = lane / 4 + i / 2 % 2 * 8;
      const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float sum = product.kind.adds ? kept.values[lane][i] : 0.0f;
      for (int k = 0; k < kDepth; ++k) {
        sum += a[row][k] * b[k * columns + column];
      }
      kept.values[lane][i] = sum;
      if (!same(product.sums[lane][i], kRunning)) {
        fault("sums were changed while their product ran", product.where);
      }
      if (kept.running == 0) {
        product.sums[lane][i] = sum;
      }
    }
  }
  if (kept.running == 0) {
    warp.sums.erase(product.sums[0]);
  }
}

// What must be over when a thread ends.
void Machine::check_exit(Where where) {
  const WarpProducts& warp = products_[current_->warp];
  if (!warp.open.empty() || !warp.groups.empty()) {
    fault("exits with products under way", where);
  }
  const auto unfinished = [](const Thread& thread) { return !thread.finished; };
  if (std::count_if(threads_.begin(), threads_.end(), unfinished) > 1) {
    return;
  }
  if (!transfers_.empty()) {
    fault("exits with bulk copies under way", where);
  }
  for (size_t i = 0; i < products_.size(); ++i) {
    if (products_[i].issued != agreed_[i / kWarpgroup].size()) {
      fault("the warps of a warpgroup ran different numbers of products", where);
    }
  }
}

}  // namespace emulation
