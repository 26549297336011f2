// How a step over the classes will run: whether E is kept (StoreRule), and by which product in chunks of how many
// classes (choose). Both devices ask at every launch, `_C` for nf.plan().
#pragma once

#include <algorithm>
#include <span>

#include "engine/products.h"

namespace nf {

// One product for a shape: with E kept or not, in chunks that fit the budget.
struct Way {
  const Product* product = nullptr;
  bool store = false;
  Refusal refusal = Refusal::kNone;
  int64_t chunk = 0;  // 0: nothing fits
  int64_t bytes = 0;  // held; where nothing fits, the least that would
  double seconds = 0;
};

// Classes per tile of a CPU. With few at once the library packs the operands of its products too often, with many
// a tile of E leaves the cache before it is made into coefficients; from 400 to 1000 a step takes the same to 2 %
// (benchmarks/results/cpu-epyc-zen4-2vcpu/head_floor.md). Rows of whole cache lines are made 8 % faster. Those of
// an odd number of lines are walked down 15 % faster than those of a power of two, which meet in the same sets of
// the cache.
constexpr int64_t kTileValues = 1 << 19, kLeastTile = 80, kMostTile = 688, kWholeTile = 256;
constexpr int64_t kTileStep = 16;  // floats of a cache line
constexpr int64_t whole_lines(int64_t classes) {
  return (tiles::ceil_div(classes, kTileStep) | 1) * kTileStep;
}
constexpr int64_t cpu_tile(const ProductShape& s, int64_t threads) {
  const int64_t room = kTileValues / tiles::at_least_one(s.dim + s.batch);
  const int64_t fits = whole_lines(std::clamp(room, kLeastTile, kMostTile) - 2 * kTileStep + 1);
  if (s.classes <= kWholeTile) return tiles::at_least_one(std::min(fits, s.classes));
  // The tiles of a thread: enough of them, and as many as leave the busiest thread the fewest classes.
  const int64_t least = std::max<int64_t>(4, tiles::ceil_div(s.classes, threads * fits));
  int64_t tile = 0, busiest = 0;
  for (int64_t count = least; count < least + 4; ++count) {
    const int64_t even = whole_lines(tiles::ceil_div(s.classes, threads * count));
    const int64_t most = tiles::ceil_div(tiles::ceil_div(s.classes, even), threads) * even;
    if (tile == 0 || most < busiest) tile = even, busiest = most;
  }
  return std::min(tile, s.classes);
}

// A float sum per chunk, and 32-bit places within it.
constexpr int64_t kMostChunk = 1 << 28, kMostSweepChunk = 1 << 30;
// Fewer classes at once would not fill a device: then the single sweep has to be asked for.
constexpr int64_t kLeastSweepChunk = 4096;

// Seconds of a step, forward and backward; what follows and precedes the sweep are three launches.
inline double seconds(const Product& p, const ProductShape& s, const DeviceFacts& d, bool store,
                      int64_t chunk) {
  Cost cost = p.forward(s, d) + p.backward(s, d);
  if (!store) cost = cost + p.again(s, d);
  const double chunks = double(tiles::ceil_div(s.classes, tiles::at_least_one(chunk)));
  return (cost.cell * double(s.batch) + cost.klass) * double(s.classes) +
         (3 + chunks * cost.launches) * d.rates->launch.value;
}

// E kept by this product, whole chunks: all classes at once on CUDA, `slots` tiles on a CPU.
inline int stored_memory(const Product& p, const ProductShape& s, const DeviceFacts& d, Polynomial* memory) {
  const int64_t T = d.cuda ? 1 : d.threads;
  const Workspace w = p.workspace(s, d, T);
  if (d.cuda) {
    for (int k = 0; k < w.count; ++k)
      memory[k] = w.fixed[k] + Polynomial{w.per_class.row, w.per_class.fixed, 0, 0};
    return w.count;
  }
  // Tiles in hand have at most 2 C classes; C / 4 + 2 kTileStep T of many, 2 kWholeTile of few; or kTileValues each.
  // A tile ends with a class, of whose centers there may be more than it would have had.
  const int64_t whole = s.centers - 1, least = kLeastTile + whole;
  const int64_t row = w.per_class.row / T, fixed = w.per_class.fixed / T,
                extra = T * (s.centers + 2 * kTileStep) + 2 * kWholeTile;
  const Polynomial all = w.fixed[0] + Polynomial{w.stored, 0, 0, 0};
  memory[0] = all + Polynomial{2 * row, 2 * fixed, 0, 0};
  memory[1] = all + Polynomial{row / 4, fixed / 4, extra * row, extra * fixed};
  memory[2] = all + Polynomial{0, 0, T * least * row, T * (least * fixed + 2 * kTileValues * row)};
  return 3;
}

// With as many classes at once as the budget allows.
inline Way fit(const Product& p, const ProductShape& s, const DeviceFacts& d, int64_t budget, bool store,
               bool asked) {
  Way way{&p, store, p.refusal(s, d)};
  if (way.refusal != Refusal::kNone) return way;
  if (p.results == nullptr && !asked) way.refusal = Refusal::kUnmeasured;
  const int64_t tile = cpu_tile(s, d.threads);
  const int64_t usual = d.cuda && store ? s.classes
                        : !d.cuda       ? tile
                        : p.keeps_e()   ? kMostChunk / tiles::at_least_one(s.batch + s.dim)
                                        : kMostSweepChunk / s.dim;
  const auto whole = [&](int64_t rows) { return std::max(s.centers, rows / s.centers * s.centers); };
  int64_t chunk = whole(std::clamp<int64_t>(usual, 1, tiles::at_least_one(s.classes)));
  const auto held = [&](int64_t slots) { return p.workspace(s, d, slots); };
  if (store) {
    Polynomial memory[3] = {};
    const int memories = stored_memory(p, s, d, memory);
    way.bytes = whole_bytes(least(memory, memories, s.batch, s.classes));
  } else {
    way.bytes = held(std::min(d.threads, tiles::ceil_div(s.classes, chunk))).bytes(s.batch, s.classes, chunk);
  }
  if (!store && way.bytes > budget) {
    const Workspace shrunk = held(std::min(d.threads, s.classes));  // walked by all threads
    const int64_t wanted = p.keeps_e() || asked ? 1 : std::min(s.classes, kLeastSweepChunk);
    chunk = whole(std::max(wanted, std::min(chunk, shrunk.most_chunk(s.batch, s.classes, budget))));
    way.bytes = shrunk.bytes(s.batch, s.classes, chunk);
  }
  way.chunk = way.bytes <= budget || (store && asked) ? chunk : 0;
  way.seconds = seconds(p, s, d, store, chunk);
  return way;
}

// Whether E is kept, for one D, operand type, term and device: where it fits the budget (the least of `memory` does, in
// kParts) and either stays in the cache, or is the faster way (one of `later`, in 1e-18 s, is not above 0).
struct StoreRule {
  static constexpr int kMost = 16;
  Polynomial memory[kMost] = {};
  int memories = 0;
  Polynomial later[kMost] = {};
  int laters = 0;
  int64_t cache_cells = 0;

  bool operator()(int64_t batch, int64_t classes, int64_t budget) const {
    if (memories == 0 || bytes(batch, classes) > budget) return false;
    if (laters == 0 || __int128(batch) * classes <= cache_cells) return true;
    return std::any_of(later, later + laters, [&](const Polynomial& p) { return p.at(batch, classes) <= 0; });
  }
  int64_t bytes(int64_t batch, int64_t classes) const {
    return whole_bytes(least(memory, memories, batch, classes));
  }
};

constexpr bool by_itself(const Product& p, const ProductShape& s, const DeviceFacts& d) {
  return p.takes(s, d) && p.results != nullptr;
}

// `bound` joins others of which the least counts, unless one of them is never above it.
inline void add_bound(Polynomial* bounds, int& count, const Polynomial& bound) {
  const auto below = [](const Polynomial& a, const Polynomial& b) {
    return a.cell <= b.cell && a.klass <= b.klass && a.row <= b.row && a.fixed <= b.fixed;
  };
  if (std::any_of(bounds, bounds + count, [&](const Polynomial& p) { return below(p, bound); })) return;
  count = int(std::remove_if(bounds, bounds + count, [&](const Polynomial& p) { return below(bound, p); }) -
              bounds);
  bounds[count++] = bound;
}

inline StoreRule store_rule(std::span<const Product> table, const ProductShape& of, const DeviceFacts& d) {
  const ProductShape s{0, of.dim, 0, of.item, of.softmax, Held::kNothing, of.centers};
  const auto cost = [&](const Product& p) { return p.forward(s, d) + p.backward(s, d); };
  const auto sweep = std::find_if(table.begin(), table.end(),
                                  [&](const Product& p) { return !p.keeps_e() && by_itself(p, s, d); });
  StoreRule rule;
  rule.cache_cells = d.rates->cache / s.item;
  for (const Product& p : table) {
    if (!p.keeps_e() || !by_itself(p, s, d)) continue;
    Polynomial memory[3] = {};
    const int memories = stored_memory(p, s, d, memory);
    for (int k = 0; k < memories && rule.memories < StoreRule::kMost; ++k)
      add_bound(rule.memory, rule.memories, memory[k]);
    if (sweep == table.end() || rule.laters == StoreRule::kMost) continue;
    const Cost mine = cost(p), theirs = cost(*sweep);
    const auto atto = [](double value) { return int64_t(value * 1e18); };
    add_bound(rule.later, rule.laters,
              {atto(mine.cell - theirs.cell), atto(mine.klass - theirs.klass), 0,
               atto((mine.launches - theirs.launches) * d.rates->launch.value)});
  }
  return rule;
}

// The fastest way that fits, or `name`'s, which with E kept is not asked whether it does; a way without a chunk if
// there is none.
inline Way choose(std::span<const Product> table, const ProductShape& s, const DeviceFacts& d, int64_t budget,
                  bool store, std::string_view name = "auto") {
  Way best, least;
  for (const Product& p : table) {
    const bool asked = name == p.name;
    if (p.cuda != d.cuda || (name != "auto" && !asked) || (store && !p.keeps_e())) continue;
    const Way way = fit(p, s, d, budget, store, asked);
    if (asked &&
        (way.refusal == Refusal::kTerm || way.refusal == Refusal::kHeld || way.refusal == Refusal::kCenters))
      return choose(table, s, d, budget, store);  // a name is for where it may be
    if (way.refusal != Refusal::kNone) {
      if (asked) return way;
      continue;
    }
    if (way.chunk > 0 && (best.chunk == 0 || way.seconds < best.seconds)) best = way;
    if (way.chunk == 0 && (least.product == nullptr || way.bytes < least.bytes)) least = way;
  }
  return best.chunk > 0 ? best : least;
}

}  // namespace nf
