// The terms of the sweep (math/terms) under their numbers, and what is collected besides their sums. Without
// torch: the CPU's rows, compiled once per instruction set, know the terms too.
#pragma once

#include "math/terms/hard_negatives.h"
#include "math/terms/hinge.h"
#include "math/terms/sigmoid.h"
#include "math/terms/softmax.h"

namespace nf {

enum Term {
  kSoftmaxTerm,
  kHardNegativesTerm,
  kHingeTerm,
  kExponentialHingeTerm,
  kSigmoidTerm,
  kAngularSigmoidTerm,
  kTerms
};
constexpr const char* kTermNames[kTerms] = {"softmax",           "hard_negatives", "hinge",
                                            "exponential_hinge", "sigmoid",        "angular_sigmoid"};

// f.template operator()<Term>() for the term of that number; Term<T> is a struct of math/terms.
template <class T, class F>
auto dispatch_term(int64_t term, const F& f) {
  switch (term) {
    case kHardNegativesTerm:
      return f.template operator()<math::HardNegativesTerm<T>>();
    case kHingeTerm:
      return f.template operator()<math::HingeTerm<T>>();
    case kExponentialHingeTerm:
      return f.template operator()<math::ExponentialHingeTerm<T>>();
    case kSigmoidTerm:
      return f.template operator()<math::SigmoidTerm<T>>();
    case kAngularSigmoidTerm:
      return f.template operator()<math::AngularSigmoidTerm<T>>();
    default:
      return f.template operator()<math::SoftmaxTerm<T>>();
  }
}

enum Sink {
  kNoSink,
  kActiveList,  // the first `capacity` classes with a coefficient that is not 0, in their order
  kHardest,     // the class of the largest cosine, of equal ones the first; NaN counts as the largest
  kSinks
};
constexpr const char* kSinkNames[kSinks] = {"none", "active", "hardest"};

}  // namespace nf
