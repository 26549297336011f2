#include "records.h"

#include <algorithm>
#include <memory>
#include <unordered_map>

namespace nf::emulation {
namespace {

// Page by page, for as much of memory as kernels have touched.
constexpr size_t kPage = 4096;
constexpr size_t kMostPages = 4096;  // records take 24 times the memory they describe
std::unordered_map<uintptr_t, std::unique_ptr<Record[]>> pages;

struct Recent {
  uintptr_t page;
  Record* records;
};
Recent recent[64];

std::vector<uint32_t> free_lists;

}  // namespace

std::vector<std::vector<Touch>>& Touches::lists() {
  static std::vector<std::vector<Touch>> all(1);  // number 0 stands for none
  return all;
}

uint32_t Touches::new_list() {
  if (free_lists.empty()) {
    lists().emplace_back();
    return static_cast<uint32_t>(lists().size() - 1);
  }
  const uint32_t list = free_lists.back();
  free_lists.pop_back();
  return list;
}

void Touches::drop() {
  lists()[more_].clear();
  free_lists.push_back(more_);
  more_ = 0;
}

void Touches::forget_all() {
  lists().assign(1, {});
  free_lists.clear();
}

Record& record_at(uintptr_t address) {
  const uintptr_t page = address / kPage;
  Recent& entry = recent[page % std::size(recent)];
  if (entry.page != page) {
    std::unique_ptr<Record[]>& records = pages[page];
    if (!records) records = std::make_unique<Record[]>(kPage / kPlace);
    entry = {page, records.get()};
  }
  return entry.records[address % kPage / kPlace];
}

void forget_records_if_many() {
  if (pages.size() <= kMostPages) return;
  pages.clear();
  Touches::forget_all();
  std::fill(std::begin(recent), std::end(recent), Recent{});
}

}  // namespace nf::emulation
