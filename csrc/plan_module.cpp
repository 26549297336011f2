#include "plan_module.h"

#include <pybind11/stl.h>

#include <string>

#include "engine/plan.h"

namespace nf {
namespace {

namespace py = pybind11;

// cuda, threads, multiprocessors, bytes of shared memory, 80 for compute capability 8.0, name
using Facts = std::tuple<bool, int64_t, int64_t, int64_t, int64_t, std::string>;

DeviceFacts facts_of(const Facts& facts) {
  const auto& [cuda, threads, multiprocessors, shared, capability, name] = facts;
  return {cuda, threads, multiprocessors, shared, capability, &rates_of(cuda, name)};
}

py::object results_of(const char* file) { return file != nullptr ? py::object(py::str(file)) : py::none(); }

py::list product_table() {
  py::list table;
  for (const Product& p : kProducts) {
    py::dict row;
    row["name"] = p.name;
    row["device"] = p.cuda ? "cuda" : "cpu";
    row["scores"] = p.scores;
    row["weight_gradient"] = p.weight_gradient;
    row["keeps_e"] = p.keeps_e();
    row["results"] = results_of(p.results);
    table.append(row);
  }
  return table;
}

py::dict rate_table(bool cuda, const std::string& name) {
  const Rates& rates = rates_of(cuda, name);
  py::dict table;
  table["kind"] = rates.kind;
  rates.each([&](const char* what, const Rate& rate) {
    if (rate.value != 0) table[what] = py::make_tuple(rate.value, results_of(rate.results));
  });
  return table;
}

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
             std::to_string(p.capability % 10);
    case Refusal::kSharedMemory:
      return dim + ": it needs " + std::to_string(p.shared(s)) + " bytes of shared memory, a block has " +
             std::to_string(d.shared_limit);
    case Refusal::kUnmeasured:
      return "has not yet passed on a GPU: to be asked for by name";
  }
  return "";
}

py::dict described(const Way& way, const ProductShape& s, const DeviceFacts& d) {
  py::dict row;
  row["product"] = way.product->name;
  row["scores"] = way.product->scores;
  row["weight_gradient"] = way.product->weight_gradient;
  row["store"] = way.store;
  row["sweeps"] = !way.product->keeps_e();
  row["refusal"] = sentence(way.refusal, *way.product, s, d);
  row["chunk"] = way.chunk;
  row["bytes"] = way.bytes;
  row["seconds"] = way.seconds;
  return row;
}

// The way that nf.plan() tells and the ops take; its chunk is 0 where not even one class fits, and then its bytes
// are the least that would do.
py::dict chosen_way(int64_t batch, int64_t dim, int64_t classes, int64_t item, bool softmax, int64_t centers,
                    const Facts& facts, int64_t budget) {
  const ProductShape s{batch, dim, classes, item, softmax, Held::kNothing, centers};
  const DeviceFacts d = facts_of(facts);
  const StoreRule rule = store_rule(kProducts, s, d);
  const bool store = rule(batch, classes, budget);
  return described(choose(kProducts, s, d, budget, store), s, d);
}

// Every way there is on such a device.
py::list all_ways(int64_t batch, int64_t dim, int64_t classes, int64_t item, bool softmax, int64_t centers,
                  const Facts& facts, int64_t budget) {
  const ProductShape s{batch, dim, classes, item, softmax, Held::kNothing, centers};
  const DeviceFacts d = facts_of(facts);
  py::list ways;
  for (const Product& p : kProducts) {
    if (p.cuda != d.cuda) continue;
    for (const bool store : {true, false}) {
      if (store && !p.keeps_e()) continue;
      const Way way = fit(p, s, d, budget, store, false);
      if (store || way.refusal == Refusal::kNone || !p.keeps_e()) ways.append(described(way, s, d));
    }
  }
  return ways;
}

// The coefficients of StoreRule: (parts of a byte, memory, later, cells in the cache).
py::tuple rule_of(int64_t dim, int64_t item, bool softmax, int64_t centers, const Facts& facts) {
  const ProductShape shape{0, dim, 0, item, softmax, Held::kNothing, centers};
  const StoreRule rule = store_rule(kProducts, shape, facts_of(facts));
  const auto listed = [](const Polynomial* p, int count) {
    py::tuple all(static_cast<size_t>(count));
    for (int k = 0; k < count; ++k)
      all[static_cast<size_t>(k)] = py::make_tuple(p[k].cell, p[k].klass, p[k].row, p[k].fixed);
    return all;
  };
  return py::make_tuple(kParts, listed(rule.memory, rule.memories), listed(rule.later, rule.laters),
                        rule.cache_cells);
}

// What a product holds with so many classes at once, without E kept.
int64_t workspace_bytes(const std::string& name, int64_t batch, int64_t dim, int64_t classes, int64_t item,
                        const Facts& facts, int64_t chunk, int64_t centers) {
  const ProductShape s{batch, dim, classes, item, true, Held::kNothing, centers};
  const DeviceFacts d = facts_of(facts);
  for (const Product& p : kProducts)
    if (name == p.name && p.cuda == d.cuda)
      return p.workspace(s, d, std::min(d.threads, tiles::ceil_div(classes, chunk)))
          .bytes(batch, classes, chunk);
  throw py::value_error("expected the name of a product, got " + name);
}

}  // namespace

void define_plan(py::module_& m) {
  m.def("products", &product_table, "The ways to make products (csrc/engine/products.h).");
  m.def("rates", &rate_table, "How fast a device is, and where that was measured (csrc/engine/rates.h).");
  m.def("chosen_way", &chosen_way, "The way of a step over the classes (csrc/engine/plan.h).");
  m.def("all_ways", &all_ways, "Every way of that step, with what speaks against it.");
  m.def("store_rule", &rule_of, "Polynomials in N and C that say whether E is kept.");
  m.def("workspace_bytes", &workspace_bytes, py::arg("name"), py::arg("batch"), py::arg("dim"),
        py::arg("classes"), py::arg("item"), py::arg("facts"), py::arg("chunk"), py::arg("centers") = 1,
        "Bytes that a product holds with so many classes at once and no E.");
}

}  // namespace nf
