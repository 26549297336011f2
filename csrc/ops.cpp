// The library `_C`: loading it registers every schema and the CPU kernels, and it says how it was built. What the
// ops do is reached through torch's dispatcher.
#include <algorithm>

#include "cpu/rows.h"
#include "engine/products.h"
#include "exports.h"
#include "json.h"
#include "math/softmax.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY(normface_ext, m) { nf::define_ops(m); }

namespace nf {
namespace {

const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

std::string build_config() {
  json::Object config;
  config.set("version", NF_VERSION);
  config.set("torch_built", NF_BUILD_TORCH);
  config.set("cuda_architectures", NF_CUDA_ARCHS);
  config.set("cuda_version", NF_CUDA_VERSION);
  config.set("compiler", compiler());
  config.set("simd", cpu::row_table().isa);
  return config.text();
}

std::string row_fields() {
  json::List fields;
  for (const FieldRule& rule : kRowRules)
    fields.add(json::list({json::of(rule.name), json::of(rule.over_shards)}));
  return fields.text();
}

std::string product_table() {
  json::List table;
  for (const Product& p : kProducts) {
    json::Object row;
    row.set("name", p.name);
    row.set("device", p.cuda ? "cuda" : "cpu");
    row.set("scores", p.scores);
    row.set("weight_gradient", p.weight_gradient);
    row.set("keeps_e", p.keeps_e());
    row.set("results", p.results);
    table.add(row.text());
  }
  return table.text();
}

}  // namespace
}  // namespace nf

// What holds for the life of the library: how it was built, the SIMD path in use, and the tables of csrc/engine
// (row_state.h, terms.h, products.h).
NF_EXPORT const char* nf_tables() {
  using namespace nf;
  json::Object tables;
  tables.put("build", build_config());
  tables.put("row_fields", row_fields());
  tables.put("slopes", json::names(kSlopeNames));
  tables.put("terms", json::names(kTermNames));
  tables.put("sinks", json::names(kSinkNames));
  tables.put("products", product_table());
  return answer(tables.text());
}

// Whether all of labels [count] are in [0, classes).
NF_EXPORT bool nf_labels_within(const int64_t* labels, int64_t count, int64_t classes) {
  return std::all_of(labels, labels + count,
                     [&](int64_t label) { return uint64_t(label) < uint64_t(classes); });
}

// Whether one kappa serves every row, or the largest logits have to be found (math/softmax.h).
NF_EXPORT bool nf_has_fixed_shift(double scale, double classes, bool float64, double lowest, double highest) {
  const auto window = float64 ? nf::math::fixed_shift_of<double>(classes, lowest, highest)
                              : nf::math::fixed_shift_of<float>(classes, lowest, highest);
  return window.serves(scale);
}
