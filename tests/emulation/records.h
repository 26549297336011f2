// What is remembered of memory: for every place who wrote it last, and who has read it since.
#pragma once

#include <cstdint>
#include <vector>

#include "clocks.h"

namespace nf::emulation {

// One place is two bytes, the smallest number that kernels compute with. (Two threads that write
// neighbouring single bytes would be accused wrongly.)
constexpr size_t kPlace = 2;

// Touches of which none is known to another: nearly always one.
class Touches {
 public:
  Touch first{};

  // f(touch) until one says no.
  template <class F>
  const Touch* first_not(const F& f) const {
    if (!f(first)) return &first;
    if (more_ != 0)
      for (const Touch& touch : lists()[more_])
        if (!f(touch)) return &touch;
    return nullptr;
  }
  void replace(const Touch& touch) {
    first = touch;
    if (more_ != 0) drop();
  }
  // Adds a touch and forgets those of which `is_done` says that whoever comes after it comes after them.
  template <class F>
  void add(const Touch& touch, const F& is_done);

  static std::vector<std::vector<Touch>>& lists();
  static void forget_all();

 private:
  uint32_t more_ = 0;  // the list of the others, 0 for none

  void drop();
  static uint32_t new_list();
};

struct Record {
  Touch write{};
  Touches read;
};

Record& record_at(uintptr_t address);
// All of them, once they are many. Nobody may hold one.
void forget_records_if_many();

// Calls visit(record, its address) for every place of a stretch of memory.
template <class Visit>
void for_each_place(const void* from, size_t bytes, const Visit& visit) {
  const auto first = reinterpret_cast<uintptr_t>(from);
  for (uintptr_t at = first; at < first + bytes; at += kPlace) visit(record_at(at), at);
}

template <class F>
void Touches::add(const Touch& touch, const F& is_done) {
  if (more_ == 0) {
    const bool alike = first.warp == touch.warp && first.time == touch.time && first.kind == touch.kind;
    if (alike) {
      first.lanes |= touch.lanes;
      return;
    }
    if (is_done(first)) {
      first = touch;
      return;
    }
    more_ = new_list();
    lists()[more_].push_back(touch);
    return;
  }
  std::vector<Touch>& list = lists()[more_];
  std::erase_if(list, is_done);
  if (is_done(first)) {
    first = touch;
    if (list.empty()) drop();
    return;
  }
  for (Touch& other : list) {
    if (other.warp != touch.warp || other.time != touch.time || other.kind != touch.kind) continue;
    other.lanes |= touch.lanes;
    return;
  }
  list.push_back(touch);
}

}  // namespace nf::emulation
