#include "clocks.h"

#include <algorithm>
#include <bit>
#include <utility>

namespace nf::emulation {

uint64_t now = 1;
uint64_t block_began = 1;
bool clocks_run = false;

namespace {

constexpr int kWarps = kMaxThreads / kWarp;

uint64_t block_synced[kMostBlocks];           // the last sync_block
uint64_t warp_synced[kWarps];                 // the last sync_warp of all lanes
uint64_t lanes_synced[kWarps][kWarp][kWarp];  // the last of fewer, for each pair of lanes

// By clocks, and of agents by waiting: known[a][b] is until when a knows of b.
uint64_t known[kMaxThreads][kActors];
// The same of b's stores that b has fenced.
uint64_t fenced[kMaxThreads][kMaxThreads];
uint64_t fenced_in_block[kMaxThreads];  // as of the last sync_block
uint64_t changed[kMaxThreads];          // when a row above did
uint64_t joined[kWarps];                // when a warp's rows were made one

std::vector<std::string> agents;

// The last sync_block of both.
uint64_t blocks_met(int me, int other) {
  return rank_of(me) == rank_of(other) ? block_synced[rank_of(me)] : 0;
}

int warp_of(int thread) { return thread / kWarp; }
int lane_of(int thread) { return thread % kWarp; }

uint64_t knows_until(int me, int other) {
  uint64_t until = std::max(blocks_met(me, other), known[me][other]);
  if (warp_of(me) != warp_of(other)) return until;
  return std::max({until, warp_synced[warp_of(me)], lanes_synced[warp_of(me)][lane_of(me)][lane_of(other)]});
}

void raise(uint64_t& value, uint64_t to) { value = std::max(value, to); }

}  // namespace

Touch touch_by(int actor) {
  return {now, 1u << lane_of(actor), static_cast<uint16_t>(warp_of(actor)), Touch::kPlain};
}

bool knows(int thread, const Touch& touch) {
  if (touch.warp >= kSeveralBlocks)
    return touch.warp == kSeveralWarps && touch.time < block_synced[rank_of(thread)];
  const bool of_agent = is_of_agent(touch);
  if (!of_agent && touch.time < blocks_met(thread, touch.warp * kWarp)) return true;
  if (!of_agent && touch.warp == warp_of(thread) && touch.time < warp_synced[touch.warp]) return true;
  for (unsigned lanes = touch.lanes; lanes != 0; lanes &= lanes - 1) {
    const int actor = touch.warp * kWarp + std::countr_zero(lanes);
    if (actor == thread) continue;
    if (touch.time >= (of_agent ? known[thread][actor] : knows_until(thread, actor))) return false;
  }
  return true;
}

bool sees_fenced(int thread, const Touch& store) {
  if (store.warp >= kSeveralBlocks) return false;
  for (unsigned lanes = store.lanes; lanes != 0; lanes &= lanes - 1) {
    const int actor = store.warp * kWarp + std::countr_zero(lanes);
    const uint64_t in_block = rank_of(thread) == rank_of(actor) ? fenced_in_block[actor] : 0;
    if (store.time >= std::max(fenced[thread][actor], in_block)) return false;
  }
  return true;
}

int new_agent(std::string name) {
  if (agents.size() == kMostAgents) fail("more than %d agents in a block of the emulation", kMostAgents);
  clocks_run = true;
  agents.push_back(std::move(name));
  return kMaxThreads + static_cast<int>(agents.size()) - 1;
}

const std::string& name_of_agent(int actor) { return agents[actor - kMaxThreads]; }

void waited_for(int agent, uint64_t time) {
  raise(known[place.thread][agent], time);
  changed[place.thread] = now;
}

uint64_t tick() { return ++now; }

void fence_for_agents() {
  clocks_run = true;
  fenced[place.thread][place.thread] = tick();
  changed[place.thread] = now;
}

void Clock::clear() {
  std::ranges::fill(known, 0);
  std::ranges::fill(fenced, 0);
}

void Clock::join(const Clock& other) {
  known.resize(std::max(known.size(), other.known.size()));
  fenced.resize(std::max(fenced.size(), other.fenced.size()));
  for (size_t i = 0; i < other.known.size(); ++i) raise(known[i], other.known[i]);
  for (size_t i = 0; i < other.fenced.size(); ++i) raise(fenced[i], other.fenced[i]);
}

void Clock::give(int agent, uint64_t time) {
  known.resize(std::max<size_t>(known.size(), agent + 1));
  raise(known[agent], time);
}

void Clock::release() {
  clocks_run = true;
  const int me = place.thread;
  known.resize(kActors);
  fenced.resize(place.threads);
  // Whole warps first: what a barrier of the block told is told of all.
  for (int other = 0; other < place.threads; ++other) {
    const bool same_block = rank_of(me) == rank_of(other);
    raise(known[other], std::max(blocks_met(me, other), emulation::known[me][other]));
    raise(fenced[other], std::max(same_block ? fenced_in_block[other] : 0, emulation::fenced[me][other]));
  }
  for (int other = warp_of(me) * kWarp; other < std::min((warp_of(me) + 1) * kWarp, place.threads); ++other)
    raise(known[other], knows_until(me, other));
  for (size_t agent = 0; agent < agents.size(); ++agent)
    raise(known[kMaxThreads + agent], emulation::known[me][kMaxThreads + agent]);
  known[me] = tick();
}

void Clock::acquire(int me) const {
  if (known.empty()) return;
  for (int other = 0; other < place.threads; ++other) raise(emulation::known[me][other], known[other]);
  for (size_t other = 0; other < fenced.size(); ++other) raise(emulation::fenced[me][other], fenced[other]);
  const size_t end = std::min(known.size(), kMaxThreads + agents.size());
  for (size_t agent = kMaxThreads; agent < end; ++agent) raise(emulation::known[me][agent], known[agent]);
  changed[me] = now;
}

void clocks_begin() {
  block_began = ++now;
  std::ranges::fill(block_synced, now);
  clocks_run = false;
  agents.clear();
}

void met_in_block() {
  block_synced[rank()] = ++now;
  if (!clocks_run) return;
  const int first = rank() * place.of_block, end = first + place.of_block;
  for (int thread = first; thread < end; ++thread) raise(fenced_in_block[thread], fenced[thread][thread]);
  const auto tell_all = [&](int actor) {
    uint64_t all = 0;
    for (int thread = first; thread < end; ++thread) raise(all, known[thread][actor]);
    for (int thread = first; thread < end; ++thread) known[thread][actor] = all;
  };
  for (int other = 0; other < place.threads; ++other)
    if (rank_of(other) != rank()) tell_all(other);
  for (size_t agent = kMaxThreads; agent < kMaxThreads + agents.size(); ++agent) tell_all(int(agent));
}

// What lanes have from clocks they tell one another.
static void join_rows(int warp, unsigned mask) {
  const int first = warp * kWarp;
  bool anything = false;
  for (int lane = 0; lane < kWarp; ++lane)
    anything |= (mask >> lane & 1) && changed[first + lane] >= joined[warp];
  if (!anything) return;
  std::vector<uint64_t> all_known(kMaxThreads + agents.size()), all_fenced(place.threads);
  const auto for_each_row = [&](const auto& visit) {
    for (int lane = 0; lane < kWarp; ++lane)
      if (mask >> lane & 1) visit(known[first + lane], fenced[first + lane]);
  };
  const auto skip_absent = [](size_t i) {
    return i == static_cast<size_t>(place.threads) ? size_t{kMaxThreads} : i;
  };
  for_each_row([&](uint64_t* of_known, uint64_t* of_fenced) {
    for (size_t i = 0; i < all_known.size(); i = skip_absent(i + 1)) raise(all_known[i], of_known[i]);
    for (int i = 0; i < place.threads; ++i) raise(all_fenced[i], of_fenced[i]);
  });
  for_each_row([&](uint64_t* of_known, uint64_t* of_fenced) {
    for (size_t i = 0; i < all_known.size(); i = skip_absent(i + 1)) of_known[i] = all_known[i];
    for (int i = 0; i < place.threads; ++i) of_fenced[i] = all_fenced[i];
  });
  if (mask == kFullMask) joined[warp] = now;
}

void met_in_warp(int warp, unsigned mask) {
  now += 1;
  if (clocks_run) join_rows(warp, mask);
  if (mask == kFullMask) {
    warp_synced[warp] = now;
    return;
  }
  // Who meets takes over what the others know from meetings of their own.
  uint64_t synced[kWarp] = {};
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    for (int other = 0; other < kWarp; ++other) {
      const bool here = mask >> other & 1;
      synced[other] = here ? now : std::max(synced[other], lanes_synced[warp][lane][other]);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1) std::copy_n(synced, kWarp, lanes_synced[warp][lane]);
  }
}

}  // namespace nf::emulation
