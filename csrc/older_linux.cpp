// Lets a library that was built on a new Linux run on an older one, glibc 2.28 and libstdc++ 8 (manylinux_2_28):
// what newer headers ask for is defined here, or asked for by its older version. Elsewhere this file is empty.
// tests/test_symbols.py holds the versions; setup.py links with --wrap for the functions of libm.
#include <cstdlib>
#include <sstream>
#include <string>

#if defined(__GLIBC__)

#if defined(__x86_64__)
#define NF_FIRST_GLIBC "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define NF_FIRST_GLIBC "GLIBC_2.17"
#else
#error "the first glibc of this machine is not known: see auditwheel's policies"
#endif

// glibc 2.29 gave these a second version, which differs in errno only.
#define NF_FIRST_VERSION(name)                                  \
  __asm__(".symver first_" #name "," #name "@" NF_FIRST_GLIBC); \
  extern "C" double first_##name(double);                       \
  extern "C" __attribute__((visibility("hidden"))) double __wrap_##name(double x) { return first_##name(x); }
NF_FIRST_VERSION(exp)
NF_FIRST_VERSION(exp2)
NF_FIRST_VERSION(log)
NF_FIRST_VERSION(log2)

// glibc 2.32's hint that counts of references need no atomics; this library never takes it.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;

#endif

#if defined(__GLIBCXX__)

// Templates that newer headers leave to the library (GLIBCXX_3.4.26, 3.4.29).
template std::ostringstream::basic_ostringstream();
template std::stringstream::basic_stringstream();
template std::string std::stringbuf::str() const&;
template std::string std::stringbuf::str() &&;

// std::__throw_bad_array_new_length (GLIBCXX_3.4.29): allocators ask for it where a size would overflow.
[[noreturn, gnu::visibility("hidden")]] void throw_bad_array_new_length() __asm__(
    "_ZSt28__throw_bad_array_new_lengthv");
void throw_bad_array_new_length() { throw std::bad_array_new_length(); }

#endif
