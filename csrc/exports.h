// What Python asks the library besides its ops, by ctypes (normface_ext/engine/native.py): plain C functions, so
// that one build serves every Python, and a process without Python too. None of them lets an exception out.
#pragma once

#include <string>

#define NF_EXPORT extern "C" __attribute__((visibility("default")))

namespace nf {

// Text that stays until the calling thread asks again; ctypes copies it before.
inline const char* answer(std::string text) {
  thread_local std::string last;
  last = std::move(text);
  return last.c_str();
}

}  // namespace nf
