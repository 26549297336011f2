// A fibre: a stack of its own and a place to go on from. One operating-system thread steps from
// fibre to fibre, so that hundreds of CUDA threads can each stop in the middle of a kernel.
#pragma once

#include <cstddef>

namespace nf::emulation {

constexpr int kMostFibres = 1024;
constexpr size_t kStack = 256 * 1024;

class Fibre {
 public:
  Fibre();  // at most kMostFibres, and they last
  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;

  // Makes the next resume() call `entry`, which never returns: it ends in a suspend() that nobody
  // resumes.
  void start(void (*entry)());
  // Goes on where the fibre stopped, and returns when it stops again.
  void resume();
  // Stops the running fibre.
  static void suspend();
  // Makes the stack as good as new, after a kernel that was left in the middle.
  void abandon();

 private:
  static void begin();

  char* stack_;
  size_t bytes_;  // from there to where the first frame begins
  void (*entry_)() = nullptr;
  void* context_ = nullptr;  // where to go on
};

// All stacks lie side by side, so that a local variable of any fibre is told by its address.
extern char* const all_stacks;
inline bool is_on_a_stack(const void* address) {
  return address >= all_stacks && address < all_stacks + kMostFibres * kStack;
}

}  // namespace nf::emulation
