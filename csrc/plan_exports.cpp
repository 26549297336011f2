// What Python asks about products and plans (engine/plan.h).
#include <algorithm>
#include <cstring>
#include <list>

#include "engine/plan.h"
#include "exports.h"
#include "json.h"

namespace nf {

// A step on a device, in the order of normface_ext/engine/native.py; the device's name comes beside it.
struct Step {
  int64_t batch, dim, classes, item, softmax, centers;
  int64_t cuda, threads, multiprocessors, shared, capability;  // 80 for compute capability 8.0
  int64_t budget;

  ProductShape shape() const { return {batch, dim, classes, item, softmax != 0, Held::kNothing, centers}; }
  DeviceFacts device(const char* name) const {
    return {cuda != 0, threads, multiprocessors, shared, capability, &rates_of(cuda != 0, name)};
  }
};

// A way as Python unpacks it.
struct WayRecord {
  int64_t product, store, chunk, bytes;
  double seconds;
  const char* refusal;  // null, or a sentence that stays until the thread asks again
};

namespace {

// Why a product is out of question; empty where it is not.
std::string sentence(Refusal refusal, const Product& p, const ProductShape& s, const DeviceFacts& d) {
  const std::string dim = "does not take D=" + std::to_string(s.dim);
  switch (refusal) {
    case Refusal::kNone:
      return "";
    case Refusal::kDevice:
      return std::string("is for ") + (p.cuda ? "CUDA" : "the CPU");
    case Refusal::kTerm:
      return "is the softmax's only";
    case Refusal::kHeld:
      return "leaves too little in memory";
    case Refusal::kCenters:
      return "does not write the scores, of which those of a class's centers are compared";
    case Refusal::kType:
      return "does not take operands of " + std::to_string(s.item) + " bytes";
    case Refusal::kAlignment:
      return dim + ": rows are to begin at multiples of 16 bytes";
    case Refusal::kColumns:
      return dim + ": at most " + std::to_string(p.most_columns);
    case Refusal::kCapability:
      return "needs compute capability " + std::to_string(p.capability / 10) + "." +
             std::to_string(p.capability % 10) + (p.wgmma ? " itself, and a build for it" : "");
    case Refusal::kSharedMemory:
      return dim + ": it needs " + std::to_string(p.shared(s)) + " bytes of shared memory, a block has " +
             std::to_string(d.shared_limit);
    case Refusal::kUnmeasured:
      return "has not yet passed on a GPU: to be asked for by name";
  }
  return "";
}

WayRecord described(const Way& way, const ProductShape& s, const DeviceFacts& d,
                    std::list<std::string>& sentences) {
  const char* refusal = nullptr;
  if (way.refusal != Refusal::kNone) {
    sentences.push_back(sentence(way.refusal, *way.product, s, d));
    refusal = sentences.back().c_str();
  }
  return {way.product - kProducts, way.store, way.chunk, way.bytes, way.seconds, refusal};
}

std::string listed(const Polynomial* p, int count) {
  json::List all;
  for (int k = 0; k < count; ++k)
    all.add(
        json::list({json::of(p[k].cell), json::of(p[k].klass), json::of(p[k].row), json::of(p[k].fixed)}));
  return all.text();
}

}  // namespace
}  // namespace nf

// How fast a device is, and where that was measured (engine/rates.h).
NF_EXPORT const char* nf_rates(bool cuda, const char* device) {
  using namespace nf;
  const Rates& rates = rates_of(cuda, device);
  json::Object table;
  table.set("kind", rates.kind);
  rates.each([&](const char* what, const Rate& rate) {
    if (rate.value != 0) table.put(what, json::list({json::of(rate.value), json::of(rate.results)}));
  });
  return answer(table.text());
}

// The way of a step that the ops take, and behind it every way there is on such a device; their count, of which
// at most `room` are written. The first's chunk is 0 where not even one class fits, and then its bytes are the
// least that would do.
NF_EXPORT int64_t nf_ways(const nf::Step* step, const char* device, nf::WayRecord* ways, int64_t room) {
  using namespace nf;
  thread_local std::list<std::string> sentences;
  sentences.clear();
  const ProductShape s = step->shape();
  const DeviceFacts d = step->device(device);
  int64_t count = 0;
  const auto add = [&](const Way& way) {
    if (count < room) ways[count] = described(way, s, d, sentences);
    ++count;
  };
  const bool kept = store_rule(kProducts, s, d)(step->batch, step->classes, step->budget);
  add(choose(kProducts, s, d, step->budget, kept));
  for (const Product& p : kProducts) {
    if (p.cuda != d.cuda) continue;
    for (const bool store : {true, false}) {
      if (store && !p.keeps_e()) continue;
      const Way way = fit(p, s, d, step->budget, store, false);
      if (store || way.refusal == Refusal::kNone || !p.keeps_e()) add(way);
    }
  }
  return count;
}

// The coefficients of StoreRule for every batch, class count and budget: [parts of a byte, memory, later, cells in
// the cache].
NF_EXPORT const char* nf_store_rule(const nf::Step* step, const char* device) {
  using namespace nf;
  const StoreRule rule = store_rule(kProducts, step->shape(), step->device(device));
  return answer(json::list({json::of(int64_t(kParts)), listed(rule.memory, rule.memories),
                            listed(rule.later, rule.laters), json::of(rule.cache_cells)}));
}

// What a product holds with so many classes at once and no E; -1 where the device has no such product.
NF_EXPORT int64_t nf_workspace_bytes(const char* product, const nf::Step* step, const char* device,
                                     int64_t chunk) {
  using namespace nf;
  const ProductShape s = step->shape();
  const DeviceFacts d = step->device(device);
  for (const Product& p : kProducts)
    if (std::strcmp(product, p.name) == 0 && p.cuda == d.cuda)
      return p.workspace(s, d, std::min(d.threads, tiles::ceil_div(step->classes, chunk)))
          .bytes(step->batch, step->classes, chunk);
  return -1;
}
