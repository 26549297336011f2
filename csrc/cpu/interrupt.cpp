// When the calling thread asks whether to stop, and how it tells the others.
#include "cpu/interrupt.h"

namespace nf::cpu {
namespace {

// Kernels that are done before never ask, so that a small call pays nothing but a look at the clock.
constexpr std::chrono::milliseconds kPatience(50);

std::atomic<InterruptCheck> registered{nullptr};

}  // namespace

void set_interrupt_check(InterruptCheck check) { registered.store(check); }

Interruption::Interruption()
    : check_(registered.load()),
      caller_(std::this_thread::get_id()),
      next_(std::chrono::steady_clock::now() + kPatience) {}

void Interruption::ask() {
  if (why_ || std::chrono::steady_clock::now() < next_) return;
  try {
    check_();
  } catch (...) {
    why_ = std::current_exception();
    stopped_.store(true, std::memory_order_relaxed);
  }
  next_ = std::chrono::steady_clock::now() + kPatience;
}

}  // namespace nf::cpu
