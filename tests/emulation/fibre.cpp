// Switching stacks. A kernel switches some thousand times per block, so the switch is six registers
// and a stack pointer where we know how, and the C library's swapcontext (with two system calls to
// save and restore a signal mask nobody changes) elsewhere.
#include "fibre.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace nf::emulation {
namespace {

constexpr size_t kPage = 4096;

char* map_stacks() {
  void* memory = mmap(nullptr, kMostFibres * kStack, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(memory);
}

int made = 0;

// If all stacks began at the same place in their pages, their innermost frames would contend for
// the same few cache lines. Each begins some lines further down than the one before.
constexpr size_t kLine = 64;
size_t stagger(int number) { return number % (kPage / kLine) * kLine; }

void* scheduler = nullptr;  // where resume() was called, while a fibre runs
Fibre* running = nullptr;

}  // namespace

// Pages are only backed by memory once touched.
char* const all_stacks = map_stacks();

#if defined(__x86_64__)

// Pushes what the calling convention says a function must preserve, leaves the stack pointer in
// *from, takes up the one in `to` and pops the same from there. It jumps where one would return: the
// processor predicts returns by counting calls, which this is about to upset (measured: 3 times the
// speed).
extern "C" void nf_emulation_switch(void** from, void* to);
asm(R"(
.text
.globl nf_emulation_switch
.hidden nf_emulation_switch
.type nf_emulation_switch, @function
nf_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
.size nf_emulation_switch, .-nf_emulation_switch
)");

namespace {

// A stack that looks as if the fibre had switched away just before calling `entry`.
void* first_context(char* stack, size_t bytes, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;  // no caller: also what keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int preserved = 0; preserved < 6; ++preserved) *--top = nullptr;
  return top;
}

void switch_context(void** from, void* to) { nf_emulation_switch(from, to); }

}  // namespace

#else

namespace {

// The context lives at the low end of the stack it belongs to.
void* first_context(char* stack, size_t bytes, void (*entry)()) {
  auto* context = new (stack + kPage) ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack + 2 * kPage;
  context->uc_stack.ss_size = bytes - 2 * kPage;
  makecontext(context, entry, 0);
  return context;
}

void switch_context(void** from, void* to) {
  static ucontext_t of_scheduler;
  if (*from == nullptr) *from = &of_scheduler;
  swapcontext(static_cast<ucontext_t*>(*from), static_cast<ucontext_t*>(to));
}

}  // namespace

#endif

// AddressSanitizer follows the stack in use, to tell a local variable from a stray pointer, and takes
// a jump nobody announced for a broken one. So both ends of a switch are announced to it.

namespace {

void announce_leaving([[maybe_unused]] void** frames, [[maybe_unused]] const void* stack,
                      [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(frames, stack, size);
#endif
}

void announce_arrival([[maybe_unused]] void* frames, [[maybe_unused]] const void** left_stack,
                      [[maybe_unused]] size_t* left_size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(frames, left_stack, left_size);
#endif
}

const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;

}  // namespace

Fibre::Fibre() : stack_(all_stacks + made * kStack), bytes_(kStack - stagger(made)) {
  if (made++ == kMostFibres) throw std::bad_alloc();
  // A kernel that overruns its stack faults here instead of writing into its neighbour's.
  mprotect(stack_, kPage, PROT_NONE);
}

void Fibre::abandon() {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(stack_, kStack);  // the frames left standing have red zones
#endif
}

void Fibre::start(void (*entry)()) {
  entry_ = entry;
  context_ = first_context(stack_, bytes_, &Fibre::begin);
}

void Fibre::begin() {
  announce_arrival(nullptr, &scheduler_stack, &scheduler_stack_size);
  running->entry_();
}

void Fibre::resume() {
  running = this;
  void* frames = nullptr;
  announce_leaving(&frames, stack_, bytes_);
  switch_context(&scheduler, context_);
  announce_arrival(frames, nullptr, nullptr);
}

void Fibre::suspend() {
  Fibre* const self = running;
  void* frames = nullptr;
  announce_leaving(&frames, scheduler_stack, scheduler_stack_size);
  switch_context(&self->context_, scheduler);
  announce_arrival(frames, &scheduler_stack, &scheduler_stack_size);
}

}  // namespace nf::emulation
