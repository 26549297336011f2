// Python's signals during a long kernel. Its functions come as addresses, so that the library needs no Python.
#include <memory>
#include <stdexcept>

#include "cpu/interrupt.h"
#include "exports.h"

namespace pybind11 {

// torch's Python bindings turn an exception of this type into Python's by calling set_error. They know it by its
// name and the order of its virtual functions, which have been the same in every pybind11.
class __attribute__((visibility("default"))) builtin_exception : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
  virtual void set_error() const = 0;
};

}  // namespace pybind11

namespace nf {

// Of Python's stable ABI, in the order of normface_ext/engine/native.py.
struct PythonCalls {
  int (*is_initialized)();
  unsigned long (*this_thread)();
  int (*take_lock)();
  void (*give_lock)(int);
  int (*check_signals)();
  void (*fetch)(void** type, void** value, void** traceback);
  void (*restore)(void* type, void* value, void* traceback);
  void (*release)(void* object);
};

namespace {

PythonCalls python;
unsigned long main_thread = 0;  // Python's, the only one whose signals have handlers

struct Lock {
  int state = python.take_lock();
  ~Lock() { python.give_lock(state); }
};

// What a handler raised, out of Python until it is given back, by the thread that then holds its lock.
struct Raised {
  void* type = nullptr;
  void* value = nullptr;
  void* traceback = nullptr;

  Raised() { python.fetch(&type, &value, &traceback); }
  Raised(const Raised&) = delete;
  Raised& operator=(const Raised&) = delete;
  ~Raised() {
    if (type == nullptr || python.is_initialized() == 0) return;
    const Lock lock;
    python.release(type), python.release(value), python.release(traceback);
  }
  void give_back() {
    python.restore(type, value, traceback);  // takes the references
    type = value = traceback = nullptr;
  }
};

class Interrupted final : public pybind11::builtin_exception {
 public:
  Interrupted() : builtin_exception("normface_ext: interrupted by a signal") {}
  void set_error() const override { raised_->give_back(); }

 private:
  const std::shared_ptr<Raised> raised_ = std::make_shared<Raised>();
};

// Runs the handlers of signals that have come; what they raise, KeyboardInterrupt as a rule, is thrown.
void check_signals() {
  if (python.is_initialized() == 0 || python.this_thread() != main_thread) return;
  const Lock lock;
  if (python.check_signals() != 0) throw Interrupted();
}

}  // namespace
}  // namespace nf

NF_EXPORT void nf_watch_signals(const nf::PythonCalls* calls, unsigned long thread) {
  nf::python = *calls;
  nf::main_thread = thread;
  nf::cpu::set_interrupt_check(&nf::check_signals);
}
