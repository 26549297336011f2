#include "block.h"

#include <algorithm>
#include <bit>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bulk.h"
#include "fibre.h"
#include "mbarrier.h"
#include "shared.h"
#include "threads.h"
#include "warpgroup.h"
#include "watch.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace nf::emulation {

Place place;
thread_local bool in_kernel = false;
std::vector<std::unique_ptr<Thread>> threads;
std::vector<Warp> warps;

int thread_id() { return place.thread % place.of_block; }
int threads_per_block() { return place.of_block; }
int64_t block_id() { return place.block_x + rank(); }
int64_t block_count() { return place.blocks_x; }
int64_t block_y() { return place.block_y; }
int64_t block_count_y() { return place.blocks_y; }

std::string text_of(Where where) {
  const char* slash = strrchr(where.file_name(), '/');
  return std::string(slash ? slash + 1 : where.file_name()) + ":" + std::to_string(where.line());
}

bool same(Where a, Where b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || strcmp(a.file_name(), b.file_name()) == 0);
}

void stop(Thread::State state, const char* kind, Where where) {
  Thread& self = current();
  self.state = state;
  self.kind = kind;
  self.where = where;
  current_warp().ready &= ~current_bit();
  Fibre::suspend();
}

void wait_for(const char* kind, Where where, const void* on, Describe describe) {
  current().on = on;
  current().describe = describe;
  stop(Thread::kWaiting, kind, where);
  current().on = nullptr;
  current().describe = nullptr;
}

void set_ready(int thread) {
  threads[thread]->state = Thread::kReady;
  warps[thread / kWarp].ready |= 1u << thread % kWarp;
}

namespace {

// One launch at a time has the whole of what follows to itself.
std::mutex one_at_a_time;

int exited = 0;
const std::function<void()>* kernel = nullptr;
std::string kernel_name;
std::string failure;
std::string launched;  // names of kernels since somebody asked, a line each

std::string block_name() {
  return kernel_name + ": block (" + std::to_string(block_id()) + ", " + std::to_string(place.block_y) + ")";
}

#if defined(__SANITIZE_ADDRESS__)
// AddressSanitizer ends the process after its report; it knows the line, we know the thread.
void say_who(const char*) {
  if (!in_kernel) return;
  fprintf(stderr, "%s, thread %d\n", block_name().c_str(), place.thread);
}
const bool saying_who = (__asan_set_error_report_callback(say_who), true);
#endif

// Who goes first, where CUDA promises nothing.
class Order {
 public:
  Order() {
    const char* chosen = getenv("NORMFACE_EMULATION_ORDER");
    const std::string name = chosen ? chosen : "forward";
    if (name == "forward") return;
    reverse_ = name == "reverse";
    if (reverse_) return;
    shuffle_ = true;
    random_.seed(std::strtoul(chosen, nullptr, 10));
  }

  std::vector<int64_t> arrange(int64_t count) {
    std::vector<int64_t> all(count);
    std::iota(all.begin(), all.end(), 0);
    if (reverse_) std::reverse(all.begin(), all.end());
    if (shuffle_) std::shuffle(all.begin(), all.end(), random_);
    return all;
  }

  int pick_lane(unsigned ready) {
    if (reverse_) return kWarp - 1 - std::countl_zero(ready);
    if (!shuffle_) return std::countr_zero(ready);
    const int turn = static_cast<int>(random_() % kWarp);
    return (std::countr_zero(std::rotr(ready, turn)) + turn) % kWarp;
  }

 private:
  bool reverse_ = false;
  bool shuffle_ = false;
  std::mt19937 random_;
};

void run_thread() {
  (*kernel)();
  barriers_end();
  stores_end();
  products_end();
  current().state = Thread::kExited;
  current_warp().ready &= ~current_bit();
  current_warp().exited |= current_bit();
  exited += 1;
  Fibre::suspend();
}

// "threads 0-31 wait in sync_block (reduce.cuh:12); threads 32-63 exited"
std::string who_waits_where() {
  std::string text;
  const auto alike = [](const Thread& a, const Thread& b) {
    if (a.state != b.state || a.state == Thread::kExited) return a.state == b.state;
    // The mask of threads that wait for the block is that of a meeting long past.
    const bool masks = a.state != Thread::kInWarpMeeting || a.mask == b.mask;
    return a.kind == b.kind && masks && a.on == b.on && same(a.where, b.where);
  };
  for (int first = 0, next; first < place.threads; first = next) {
    const Thread& thread = *threads[first];
    for (next = first; next < place.threads && alike(thread, *threads[next]);) next += 1;
    text += text.empty() ? "" : "; ";
    text += next - first == 1 ? "thread " : "threads ";
    text += std::to_string(first);
    if (next - first > 1) text += "-" + std::to_string(next - 1);
    if (thread.state == Thread::kExited) {
      text += " exited";
    } else {
      text += std::string(" wait in ") + thread.kind + " (" + text_of(thread.where) + ")";
      if (thread.describe != nullptr) text += " for " + thread.describe(thread.on);
    }
  }
  return text;
}

// A warp runs until none of its lanes can go on before the next has its turn. That is as far apart
// as warps can drift between two barriers of the block.
void run_block(size_t shared_bytes, Order& order) {
  const int count = place.threads;
  exited = 0;
  warps.assign((count + kWarp - 1) / kWarp, Warp{});
  for (int thread = 0; thread < count; ++thread) {
    threads[thread]->fibre.start(run_thread);
    threads[thread]->state = Thread::kReady;
    threads[thread]->on = nullptr;
    threads[thread]->describe = nullptr;
    warps[thread / kWarp].present |= 1u << thread % kWarp;
  }
  for (Warp& warp : warps) warp.ready = warp.present;
  block_begins();
  begin_shared(shared_bytes, count);
  meetings_begin();
  barriers_begin();
  stores_begin();
  products_begin();
  budget_begins();

  const std::vector<int64_t> warp_order = order.arrange(static_cast<int64_t>(warps.size()));
  for (bool progress = true; progress;) {
    progress = false;
    for (const int64_t warp : warp_order) {
      while (warps[warp].ready != 0) {
        progress = true;
        place.thread = static_cast<int>(warp) * kWarp + order.pick_lane(warps[warp].ready);
        in_kernel = true;
        current().fibre.resume();
        in_kernel = false;
        if (!failure.empty()) throw std::runtime_error(failure);
      }
    }
  }
  if (exited < count) {
    throw std::runtime_error(block_name() + ": deadlock: " + who_waits_where());
  }
}

void check_limits(const char* name, int64_t blocks_x, int64_t blocks_y, int cluster, int threads_per_block,
                  size_t shared_bytes) {
  const auto check = [&](const char* what, int64_t least, int64_t most, int64_t got) {
    if (got >= least && got <= most) return;
    throw std::runtime_error(std::string(name) + ": expected " + what + " in [" + std::to_string(least) +
                             ", " + std::to_string(most) + "], got " + std::to_string(got));
  };
  check("blocks along x", 0, INT32_MAX, blocks_x);
  check("blocks along y", 0, 65535, blocks_y);
  check("blocks of a cluster", 1, kMostBlocks, cluster);
  check("blocks beyond whole clusters", 0, 0, blocks_x % cluster);
  check("threads per block", 1, kMaxThreads / cluster, threads_per_block);
  check("threads beyond whole warpgroups in a cluster", 0, 0,
        cluster > 1 ? threads_per_block % kWarpgroup : 0);
  check("bytes of shared memory", 0, kSharedLimit, static_cast<int64_t>(shared_bytes));
}

}  // namespace

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  failure = block_name() + ", thread " + std::to_string(place.thread) + ": " + text;
  for (;;) Fibre::suspend();
}

void run(const char* name, int64_t blocks_x, int64_t blocks_y, int cluster, int threads_per_block,
         size_t shared_bytes, const std::function<void()>& kernel_of_thread) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  check_limits(name, blocks_x, blocks_y, cluster, threads_per_block, shared_bytes);
  kernel = &kernel_of_thread;
  kernel_name = name;
  launched += kernel_name + "\n";
  failure.clear();
  place.of_block = threads_per_block;
  place.threads = cluster * threads_per_block;
  while (threads.size() < static_cast<size_t>(place.threads)) {
    threads.push_back(std::make_unique<Thread>());
  }
  launch_begins();
  Order order;
  try {
    const int64_t clusters_x = blocks_x / cluster;
    for (const int64_t block : order.arrange(clusters_x * blocks_y)) {
      place.block_x = block % clusters_x * cluster;
      place.block_y = block / clusters_x;
      place.blocks_x = blocks_x;
      place.blocks_y = blocks_y;
      run_block(shared_bytes, order);
    }
  } catch (...) {
    for (const auto& thread : threads) thread->fibre.abandon();
    throw;
  }
}

}  // namespace nf::emulation

// For tests, through ctypes: what was launched since the last call. The answer holds until the next.
extern "C" [[gnu::visibility("default")]] const char* nf_emulation_launched() {
  static std::string answer;
  answer = std::exchange(nf::emulation::launched, {});
  return answer.c_str();
}
