#include "attention/plan.h"

#include <algorithm>

namespace dalle::attention {

ListStorage build_lists(const ScheduleSide& side, int32_t length, int32_t walked) {
  ListStorage lists;
  const int32_t tiles = (length + kTile - 1) / kTile;
  lists.full_offsets.push_back(0);
  lists.pair_offsets.push_back(0);
  std::vector<int32_t> masked;
  for (int32_t t = 0; t < tiles; t++) {
    const int32_t begin = side.offsets[t], middle = begin + side.full_counts[t], end = side.offsets[t + 1];
    lists.full_tiles.insert(lists.full_tiles.end(), side.others + begin, side.others + middle);
    lists.full_offsets.push_back(int32_t(lists.full_tiles.size()));
    for (int g = 0; g < kGroups; g++) {
      // Lanes past the end see nothing, whatever the schedule's bits say there.
      const int lanes = std::clamp(length - t * kTile - g * kGroup, 0, kGroup);
      const uint32_t alive = (1u << lanes) - 1u;
      for (int32_t entry = middle; entry < end; entry++) {
        const int32_t other = side.others[entry];
        const int32_t* rows = side.masks + int64_t(side.mask_ids[entry]) * kTile * 2 + g / 2;
        for (int p = 0; p < kTile; p += 2) {
          Pair pair{(other * kTile + p) / 2, {0, 0}};
          for (int j = 0; j < 2; j++)
            if (other * kTile + p + j < walked)
              pair.bits[j] = uint16_t((uint32_t(rows[(p + j) * 2]) >> (g % 2 * kGroup)) & alive);
          if (pair.bits[0] | pair.bits[1]) lists.pairs.push_back(pair);
        }
      }
      lists.pair_offsets.push_back(int32_t(lists.pairs.size()));
    }
  }
  return lists;
}

Seen seen_by(const Lists& lists, int32_t t, int32_t first, int32_t last) {
  const auto before = [](const Pair& pair, int32_t tile) { return pair.index < tile * (kTile / 2); };
  Seen seen;
  const int32_t *full = lists.full_tiles + lists.full_offsets[t],
                *full_end = lists.full_tiles + lists.full_offsets[t + 1];
  seen.full = std::lower_bound(full, full_end, first);
  seen.full_end = std::lower_bound(full, full_end, last);
  for (int g = 0; g < kGroups; g++) {
    const Pair* begin = lists.pairs + lists.pair_offsets[t * kGroups + g];
    const Pair* end = lists.pairs + lists.pair_offsets[t * kGroups + g + 1];
    seen.pairs[g] = std::lower_bound(begin, end, first, before);
    seen.pairs_end[g] = std::lower_bound(begin, end, last, before);
  }
  return seen;
}

Ranges share_keys(const Plan& plan, const std::vector<int32_t>& cuts) {
  const size_t ranges = cuts.size() - 1, tiles = size_t(plan.tiles);
  Ranges shared{std::vector<int32_t>(ranges * tiles, kElsewhere), {0}};
  std::vector<size_t> among;
  for (size_t t = 0; t < tiles; t++) {
    among.clear();
    for (size_t r = 0; r < ranges; r++)
      if (seen_by(plan.by_key, int32_t(t), cuts[r], cuts[r + 1]).any()) among.push_back(r);
    int32_t slots = shared.slot_offsets.back();
    if (among.empty()) shared.destinations[t] = kHere;  // nobody sees these keys: the first range writes zeros
    if (among.size() == 1) shared.destinations[among[0] * tiles + t] = kHere;
    if (among.size() > 1)
      for (size_t r : among) shared.destinations[r * tiles + t] = slots++;
    shared.slot_offsets.push_back(slots);
  }
  return shared;
}

}  // namespace dalle::attention
