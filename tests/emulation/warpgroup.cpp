#include "warpgroup.h"

#include <algorithm>
#include <array>
#include <bitset>
#include <cstring>
#include <list>
#include <string>
#include <vector>

#include "clocks.h"
#include "factor.h"

namespace nf::emulation {

int products_in_flight = 0;

namespace {

constexpr int kRows = 64;                 // of d
constexpr uint32_t kPoison = 0x7fedbed5;  // a NaN that no computation makes
constexpr int kWarpgroups = kMaxThreads / kWarpgroup;

// A product that was started.
struct Started {
  Number number;
  bool add;
  InShared a, b;
  std::vector<float> a_values;  // [64, depth], if a was in registers
  int group;
};

// Products into the same registers, one after another.
struct Chain {
  std::array<float*, kWarpgroup> d;
  int registers;
  std::vector<float> values;  // [64, 2 registers], of the products worked out
  std::vector<Started> started;
  int last_group;
  std::bitset<kWarpgroup> delivered;  // to whom
};

struct Warpgroup {
  int agent = 0;  // who reads factors, 0 for none yet
  std::list<Chain> chains;
  std::vector<uint64_t> closed;  // when each group was
};
Warpgroup warpgroups[kWarpgroups];

// Registers as they were at the thread's last fence of them.
struct Held {
  const unsigned char* at;
  std::vector<unsigned char> was;
};
struct OfThread {
  int committed = 0;
  std::vector<Held> held;
};
OfThread of_thread[kMaxThreads];

Warpgroup& mine() { return warpgroups[place.thread / kWarpgroup]; }
int first_thread() { return place.thread / kWarpgroup * kWarpgroup; }

// Where register i of d of a thread of the warpgroup lies in d.
int place_in(int columns, int thread, int i) {
  const int lane = thread % kWarp;
  return (16 * (thread / kWarp) + 8 * (i / 2 % 2) + lane / 4) * columns + 8 * (i / 4) + 2 * (lane % 4) +
         i % 2;
}

void check_held(int thread, const void* registers, size_t bytes, const char* name) {
  const auto* at = static_cast<const unsigned char*>(registers);
  for (const Held& held : of_thread[thread].held) {
    if (at < held.at || at + bytes > held.at + held.was.size()) continue;
    if (memcmp(at, held.was.data() + (at - held.at), bytes) == 0) return;
    fail("wgmma: registers of %s of thread %d were written after its wgmma_fence", name, thread);
  }
  fail("wgmma: registers of %s of thread %d, and no wgmma_fence of them since they could be touched", name,
       thread);
}

void check_untouched(const Chain& chain, int thread) {
  for (int i = 0; i < chain.registers; ++i) {
    uint32_t bits;
    memcpy(&bits, chain.d[thread] + i, sizeof(bits));
    if (bits != kPoison)
      fail("register %d of d of thread %d was written between wgmma and the wgmma_wait for it", i,
           first_thread() + thread);
  }
}

[[gnu::optimize("O3")]] void multiply(float* d, const float* a, const float* b, int columns, int depth) {
  for (int i = 0; i < kRows; ++i)
    for (int k = 0; k < depth; ++k) {
      const float factor = a[i * depth + k];
      for (int j = 0; j < columns; ++j) d[i * columns + j] += factor * b[k * columns + j];
    }
}

void work_out(Chain& chain, const Started& product) {
  const int columns = 2 * chain.registers;
  const int depth = depth_of(product.number);
  if (!product.add) std::ranges::fill(chain.values, 0.0f);
  std::vector<float> a = product.a_values;
  if (a.empty()) {
    a.resize(kRows * depth);
    read_factor(product.a, product.number, a.data(), depth, 1);
  }
  std::vector<float> b(depth * columns);
  read_factor(product.b, product.number, b.data(), 1, columns);
  multiply(chain.values.data(), a.data(), b.data(), columns, depth);
}

// a[64, depth] from the registers of all threads; where each element lies is the table of tensor_core.cuh.
std::vector<float> gather_a(const std::array<const Product*, kWarpgroup>& offers) {
  const Number number = offers[0]->number;
  const int depth = depth_of(number);
  std::vector<float> a(kRows * depth);
  for (int thread = 0; thread < kWarpgroup; ++thread) {
    const int row = thread / kWarp * 16 + thread % kWarp / 4;
    const int t = thread % 4;
    for (int word = 0; word < 4; ++word) {
      float* const of_row = &a[(row + 8 * (word % 2)) * depth];
      const uint32_t bits = offers[thread]->a[word];
      if (number == Number::kTf32) {
        of_row[t + 4 * (word / 2)] = tf32_of(bits);
      } else {
        of_row[2 * t + 8 * (word / 2)] = value_of(number, uint16_t(bits));
        of_row[2 * t + 8 * (word / 2) + 1] = value_of(number, uint16_t(bits >> 16));
      }
    }
  }
  return a;
}

Chain& new_chain(const std::array<const Product*, kWarpgroup>& offers) {
  const Product& product = *offers[0];
  Chain& chain = mine().chains.emplace_back();
  products_in_flight += 1;
  chain.registers = product.registers;
  const int columns = 2 * product.registers;
  chain.values.assign(kRows * columns, 0.0f);
  for (int thread = 0; thread < kWarpgroup; ++thread) {
    float* const d = chain.d[thread] = offers[thread]->d;
    check_held(first_thread() + thread, d, product.registers * sizeof(float), "d");
    std::erase_if(of_thread[first_thread() + thread].held,
                  [&](const Held& held) { return static_cast<const void*>(held.at) == d; });
    for (int i = 0; i < product.registers; ++i) {
      chain.values[place_in(columns, thread, i)] = d[i];
      memcpy(d + i, &kPoison, sizeof(kPoison));
    }
  }
  return chain;
}

void check_alike(const std::array<const Product*, kWarpgroup>& offers) {
  const Product& one = *offers[0];
  for (int thread = 1; thread < kWarpgroup; ++thread) {
    const Product& other = *offers[thread];
    const bool alike = one.number == other.number && one.add == other.add &&
                       one.registers == other.registers && !one.a == !other.a &&
                       one.a_descriptor == other.a_descriptor && one.b_descriptor == other.b_descriptor &&
                       of_thread[first_thread()].committed == of_thread[first_thread() + thread].committed;
    if (!alike)
      fail("wgmma: threads %d and %d bring other factors, or have committed other groups", first_thread(),
           first_thread() + thread);
  }
}

// What the last of the warpgroup to come does for all.
void start(void* const* offered) {
  std::array<const Product*, kWarpgroup> offers;
  for (int thread = 0; thread < kWarpgroup; ++thread)
    offers[thread] = static_cast<const Product*>(offered[thread]);
  check_alike(offers);
  const Product& product = *offers[0];
  const int columns = 2 * product.registers;
  if (columns < 8 || columns > 256 || columns % 8 != 0) fail("wgmma with %d columns", columns);
  Started started{product.number,
                  product.add,
                  {product.a_descriptor, product.a_rows_of_k, kRows},
                  {product.b_descriptor, product.b_rows_of_k, columns},
                  {},
                  of_thread[place.thread].committed};

  Warpgroup& group = mine();
  if (group.agent == 0)
    group.agent = new_agent("wgmma of threads " + std::to_string(first_thread()) + "-" +
                            std::to_string(first_thread() + kWarpgroup - 1));
  int starters[kWarpgroup / kWarp];
  for (int warp = 0; warp < kWarpgroup / kWarp; ++warp) starters[warp] = first_thread() + warp * kWarp;
  check_factor("b", started.b);
  watch_factor(started.b, group.agent, starters, kWarpgroup / kWarp);
  if (product.a == nullptr) {
    check_factor("a", started.a);
    watch_factor(started.a, group.agent, starters, kWarpgroup / kWarp);
  } else {
    for (int thread = 0; thread < kWarpgroup; ++thread)
      check_held(first_thread() + thread, offers[thread]->a, 4 * sizeof(uint32_t), "a");
    started.a_values = gather_a(offers);
  }

  const auto found = std::ranges::find_if(group.chains, [&](const Chain& c) { return c.d[0] == product.d; });
  if (found != group.chains.end()) {
    for (int thread = 0; thread < kWarpgroup; ++thread) {
      if (found->d[thread] != offers[thread]->d || found->registers != product.registers)
        fail("wgmma into some registers of a product that has not been waited for, of another shape");
      check_untouched(*found, thread);
    }
  }
  Chain& chain = found != group.chains.end() ? *found : new_chain(offers);
  chain.last_group = started.group;
  chain.started.push_back(std::move(started));
}

// The running thread's registers of d become what the products made them.
void deliver(Chain& chain, std::initializer_list<Registers> named) {
  const int thread = place.thread - first_thread();
  float* const d = chain.d[thread];
  check_untouched(chain, thread);
  const bool is_named = std::ranges::any_of(named, [&](const Registers& r) {
    const auto* const first = static_cast<const float*>(r.at);
    return d >= first && d + chain.registers <= first + r.bytes / sizeof(float);
  });
  if (!is_named) fail("wgmma_wait for products into registers that it does not name");
  for (int i = 0; i < chain.registers; ++i) d[i] = chain.values[place_in(2 * chain.registers, thread, i)];
  chain.delivered.set(thread);
}

}  // namespace

void start_product(const Product& product, Where where) {
  Product offer = product;
  meet_warpgroup("wgmma", where, &offer, start);
}

void fence_products(std::initializer_list<Registers> registers) {
  std::vector<Held>& held = of_thread[place.thread].held;
  for (const Registers& one : registers) {
    const auto* at = static_cast<const unsigned char*>(one.at);
    std::erase_if(held,
                  [&](const Held& old) { return old.at < at + one.bytes && at < old.at + old.was.size(); });
    held.push_back({at, {at, at + one.bytes}});
  }
}

void commit_products() {
  Warpgroup& group = mine();
  const int number = of_thread[place.thread].committed++;
  if (number == static_cast<int>(group.closed.size())) group.closed.push_back(tick());
}

void wait_products(int groups_left, std::initializer_list<Registers> registers) {
  Warpgroup& group = mine();
  const int done = of_thread[place.thread].committed - groups_left;  // groups before this one
  if (done <= 0) return;
  for (Chain& chain : group.chains) {
    std::erase_if(chain.started, [&](const Started& product) {
      if (product.group >= done) return false;
      work_out(chain, product);
      return true;
    });
    if (chain.last_group < done && !chain.delivered[place.thread - first_thread()]) deliver(chain, registers);
  }
  products_in_flight -= std::erase_if(group.chains, [](const Chain& chain) { return chain.delivered.all(); });
  if (group.agent != 0) waited_for(group.agent, group.closed[done - 1]);
}

void check_registers(const void* address) {
  const int thread = place.thread - first_thread();
  for (const Chain& chain : mine().chains) {
    const auto* const at = static_cast<const float*>(address);
    if (!chain.delivered[thread] && at >= chain.d[thread] && at < chain.d[thread] + chain.registers)
      fail("register %ld of d is touched between wgmma and the wgmma_wait for it",
           long(at - chain.d[thread]));
  }
}

void products_begin() {
  products_in_flight = 0;
  for (Warpgroup& group : warpgroups) group = {};
  for (int thread = 0; thread < place.threads; ++thread) of_thread[thread] = {};
}

void products_end() {
  for (const Chain& chain : mine().chains)
    if (!chain.delivered[place.thread - first_thread()])
      fail("exits with a wgmma that no wgmma_wait waited for");
}

}  // namespace nf::emulation
