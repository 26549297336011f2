// Several neighbouring values moved by one instruction: up to 16 bytes per thread, which is what
// brings a memory-bound kernel to the bandwidth of the device.
//
// The address must be a multiple of the whole vector's size.
#pragma once

#include <cstring>
#include <device/launch.cuh>

namespace nf {

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

namespace detail {

// The built-in type that moves kBytes at once. A struct copied member by member would be several
// instructions for 16-bit members, so loads and stores go through these.
template <size_t kBytes>
struct Word;
template <>
struct Word<2> {
  using type = short;
};
template <>
struct Word<4> {
  using type = int;
};
template <>
struct Word<8> {
  using type = int2;
};
template <>
struct Word<16> {
  using type = int4;
};

}  // namespace detail

template <int N, class T>
NF_DEVICE Vector<T, N> load_vector(const T* from) {
  using Word = typename detail::Word<sizeof(T) * N>::type;
  const Word word = *reinterpret_cast<const Word*>(from);
  Vector<T, N> vector;
  memcpy(&vector, &word, sizeof(word));
  return vector;
}

// The same vector. Of 16-bit values the compiler forgets what it has made of them: where they are needed again, it
// would else keep each as a float, in twice the registers.
template <int N, class T>
NF_DEVICE Vector<T, N> as_stored(const Vector<T, N>& vector) {
  if constexpr (sizeof(T) == 2 && N >= 2) {
    unsigned words[N / 2];
    memcpy(words, &vector, sizeof(words));
#pragma unroll
    for (int k = 0; k < N / 2; ++k) asm volatile("" : "+r"(words[k]));
    Vector<T, N> same;
    memcpy(&same, words, sizeof(words));
    return same;
  } else {
    return vector;
  }
}

template <int N, class T>
NF_DEVICE void store_vector(T* to, const Vector<T, N>& vector) {
  using Word = typename detail::Word<sizeof(T) * N>::type;
  Word word;
  memcpy(&word, &vector, sizeof(word));
  *reinterpret_cast<Word*>(to) = word;
}

// Where it is known to be global memory: a single instruction even where registers are so short that the
// compiler would rather store the vector in parts.
template <int N, class T>
NF_DEVICE void store_vector_global(T* to, const Vector<T, N>& vector) {
  using Word = typename detail::Word<sizeof(T) * N>::type;
  Word word;
  memcpy(&word, &vector, sizeof(word));
  __stwb(reinterpret_cast<Word*>(to), word);
}

// For global memory that nobody reads again soon: first in line to leave the cache.
template <int N, class T>
NF_DEVICE void store_vector_streaming(T* to, const Vector<T, N>& vector) {
  using Word = typename detail::Word<sizeof(T) * N>::type;
  Word word;
  memcpy(&word, &vector, sizeof(word));
  __stcs(reinterpret_cast<Word*>(to), word);
}

}  // namespace nf
