// Ctrl-C during a long kernel: asked for between tiles, on the thread that called the kernel.
#pragma once

#include <atomic>
#include <chrono>
#include <exception>
#include <thread>

namespace nf::cpu {

// Throws where the process has been asked to stop. `_C` gives Python's own check; without Python, as in the
// tests' other builds of these files, there is none.
using InterruptCheck = void (*)();
void set_interrupt_check(InterruptCheck check);

// Of one kernel, made on the calling thread before its threads start.
class Interruption {
 public:
  Interruption();

  // Between tiles, on any thread: whether the rest is to be left out. Only the calling thread asks, and only
  // now and then: the check takes Python's lock, which somebody else may hold for milliseconds.
  bool stopped() {
    if (check_ != nullptr && std::this_thread::get_id() == caller_) ask();
    return stopped_.load(std::memory_order_relaxed);
  }

  // After the threads have joined, which also makes what the caller wrote its own again: an exception cannot
  // leave a parallel region with its type.
  void rethrow() const {
    if (why_) std::rethrow_exception(why_);
  }

 private:
  void ask();

  const InterruptCheck check_;
  const std::thread::id caller_;
  std::chrono::steady_clock::time_point next_;
  std::atomic<bool> stopped_{false};
  std::exception_ptr why_;
};

}  // namespace nf::cpu
