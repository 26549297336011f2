// A fibre: a stack of its own and a place to go on from. One operating-system thread steps from
// fibre to fibre, so that hundreds of CUDA threads can each stop in the middle of a kernel.
#pragma once

#include <cstddef>

namespace nf::emulation {

class Fibre {
 public:
  Fibre();
  ~Fibre();
  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;

  // Makes the next resume() call `entry`, which never returns: it ends in a suspend() that nobody
  // resumes.
  void start(void (*entry)());
  // Goes on where the fibre stopped, and returns when it stops again.
  void resume();
  // Stops the running fibre.
  static void suspend();

 private:
  static void begin();

  char* stack_;
  size_t bytes_;  // of it in use, at most
  void (*entry_)() = nullptr;
  void* context_ = nullptr;  // where to go on
};

}  // namespace nf::emulation
