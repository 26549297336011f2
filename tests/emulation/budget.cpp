// The registers of a block, which its warpgroups give back and take (setmaxnreg). Who takes waits until others gave.
#include <algorithm>
#include <string>
#include <utility>

#include "block.h"
#include "threads.h"
#include "warpgroup.h"

namespace nf::emulation {
namespace {

constexpr int kRegisters = 64 * 1024;  // of a multiprocessor
constexpr int kMostOfAThread = 248;

struct Budget {
  int left[kMostBlocks];                    // of what each block was launched with
  int of_thread[kMaxThreads / kWarpgroup];  // of each warpgroup
  int wanted[kMaxThreads / kWarpgroup];     // 0 for nothing
};
Budget budget;

struct Asked {
  bool up;
  int count;
};

bool take(int group) {
  const int more = (budget.wanted[group] - budget.of_thread[group]) * kWarpgroup;
  int& left = budget.left[rank_of(group * kWarpgroup)];
  if (more > left) return false;
  left -= more;
  budget.of_thread[group] = std::exchange(budget.wanted[group], 0);
  return true;
}

void change(void* const* offers) {
  const Asked asked = *static_cast<const Asked*>(offers[0]);
  const int group = place.thread / kWarpgroup;
  const int has = budget.of_thread[group];
  if (asked.count < 24 || asked.count > 240 || asked.count % 8 != 0)
    fail("registers_%s to %d, expected a multiple of 8 from 24 to 240", asked.up ? "up" : "down",
         asked.count);
  if (asked.up ? asked.count < has : asked.count > has)
    fail("registers_%s to %d from %d", asked.up ? "up" : "down", asked.count, has);
  budget.wanted[group] = asked.count;
  take(group);
  for (int other = 0; other < place.threads / kWarpgroup; ++other) {
    if (budget.wanted[other] == 0 || other == group) continue;
    if (rank_of(other * kWarpgroup) != rank() || !take(other)) continue;
    for (int thread = other * kWarpgroup; thread < (other + 1) * kWarpgroup; ++thread)
      if (threads[thread]->on == &budget.wanted[other]) set_ready(thread);
  }
}

std::string wanted_of(const void* wanted) {
  return std::to_string(*static_cast<const int*>(wanted)) + " registers a thread, with " +
         std::to_string(budget.left[rank()] / kWarpgroup) + " more to be had";
}

}  // namespace

void set_registers(bool up, int count, Where where) {
  Asked asked{up, count};
  meet_warpgroup(up ? "registers_up" : "registers_down", where, &asked, change);
  int& wanted = budget.wanted[place.thread / kWarpgroup];
  if (wanted != 0) wait_for("registers_up", where, &wanted, wanted_of);
}

void budget_begins() {
  const int each = std::min(kRegisters / place.of_block / 8 * 8, kMostOfAThread);
  budget = {};
  std::ranges::fill(budget.of_thread, each);
}

}  // namespace nf::emulation
