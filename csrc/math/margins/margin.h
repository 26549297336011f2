// psi(c): what a margin makes of the target cosine. Only the target column meets it.
//
// A margin is a struct of up to three numbers with operator()(c), psi and its slope in c, and slopes(c), those
// in its numbers. The table at the end gives it the number by which ops ask for it.
#pragma once

#include "math/host_device.h"

namespace nf::math {

constexpr double kPi = 3.14159265358979323846;

// d psi / d m1, m2, m3
struct MarginSlopes {
  double m1;
  double m2;
  double m3;
};

// theta = arccos c with its slope in c, in which sin theta is floored at kSinFloor: it is finite at c = +-1.
struct Angle {
  double theta;
  double slope;

  static constexpr double kSinFloor = 1e-4;

  NF_HD explicit Angle(double c) {
    const double sin_squared = (1.0 - c) * (1.0 + c);
    const bool floored = !(sin_squared > kSinFloor * kSinFloor);
    // What is below 0 is so by a rounding; NaN stays NaN.
    theta = std::atan2(std::sqrt(sin_squared < 0.0 ? 0.0 : sin_squared), c);
    const double sine = floored ? kSinFloor : std::sqrt(sin_squared);
    // -1/sin on the circle; with the sine held at its floor it is -sin/(sin^2 + c^2).
    slope = floored ? -sine / (sine * sine + c * c) : -1.0 / sine;
  }
};

enum Guard { kDefaultGuard = 0, kShiftGuard = 1, kJoinGuard = 2, kEasyGuard = 3, kNoGuard = 4 };

// psi = cos(m1 theta + m2) - m3,  m1 > 0: NormFace (1, 0, 0), CosFace (1, 0, m), ArcFace (1, m, 0).
// Past m1 theta + m2 = pi the cosine would rise again. What is done there is the guard:
//   shift   psi = c - m2 sin m2 - m3, the form ArcFace implementations share
//   join    psi = c - 1 - cos((pi - m2) / m1) - m3: slope 1 as well, and no jump where the guard begins
//   easy    nothing there, but psi = c - m3 wherever c <= 0 (MagFace, MV-Softmax)
//   none    nothing
// By default: shift where m1 = 1, join elsewhere.
struct CombinedMargin {
  double m1;
  double m2;
  double m3;
  int guard;

  NF_HD ValueAndSlope<double> operator()(double c) const {
    if ((m1 == 1.0 && m2 == 0.0) || eased(c)) return {c - m3, 1.0};
    const Angle at(c);
    const double angle = m1 * at.theta + m2;
    if (guarded(angle)) return {c - (shifted() ? m2 * std::sin(m2) : 1.0 + std::cos(join())) - m3, 1.0};
    return {std::cos(angle) - m3, -m1 * std::sin(angle) * at.slope};
  }

  NF_HD MarginSlopes slopes(double c) const {
    if (eased(c)) return {0.0, 0.0, -1.0};
    const double theta = Angle(c).theta, angle = m1 * theta + m2;
    if (!guarded(angle)) {
      const double sine = std::sin(angle);
      return {-sine * theta, -sine, -1.0};
    }
    if (shifted()) return {0.0, -(std::sin(m2) + m2 * std::cos(m2)), -1.0};
    const double place = join(), sine = std::sin(place);
    return {-sine * place / m1, -sine / m1, -1.0};
  }

 private:
  NF_HD bool eased(double c) const { return guard == kEasyGuard && c <= 0.0; }
  NF_HD bool guarded(double angle) const { return guard < kEasyGuard && angle > kPi; }
  NF_HD bool shifted() const { return guard == kShiftGuard || (guard == kDefaultGuard && m1 == 1.0); }
  // theta where the guard begins; 0 where it does from the start.
  NF_HD double join() const { return m2 < kPi ? (kPi - m2) / m1 : 0.0; }
};

// AdaFace as its authors' code has it: psi = cos(theta + m2) - m3 with c held in +-(1 - kEdge) and the angle in
// [kEdge, pi - kEdge], and slope 0 outside. m1 is not used.
struct HeldMargin {
  double m2;
  double m3;

  static constexpr double kEdge = 1e-3;

  NF_HD ValueAndSlope<double> operator()(double c) const {
    const double cosine = held(c, -1.0 + kEdge, 1.0 - kEdge);
    const Angle at(cosine);
    const double asked = at.theta + m2, angle = held(asked, kEdge, kPi - kEdge);
    const bool free = cosine == c && angle == asked;
    return {std::cos(angle) - m3, free ? -std::sin(angle) * at.slope : 0.0};
  }

  NF_HD MarginSlopes slopes(double c) const {
    const double angle = Angle(held(c, -1.0 + kEdge, 1.0 - kEdge)).theta + m2;
    return {0.0, angle == held(angle, kEdge, kPi - kEdge) ? -std::sin(angle) : 0.0, -1.0};
  }

 private:
  NF_HD static double held(double value, double low, double high) {
    return value < low ? low : value > high ? high : value;
  }
};

// Circle loss at class level: psi = [1 + m3 - c]_+ (c - 1 + m3). Its authors take the bracket for a weight: the
// slope is the bracket alone, and m2 of what is missing to the derivative of psi. m1 is not used.
struct CircleMargin {
  double m2;
  double m3;

  NF_HD ValueAndSlope<double> operator()(double c) const {
    const double bracket = 1.0 + m3 - c, past = c - 1.0 + m3;
    if (bracket <= 0.0) return {0.0, 0.0};
    return {bracket * past, bracket - m2 * past};
  }

  NF_HD MarginSlopes slopes(double c) const {
    const double bracket = 1.0 + m3 - c, past = c - 1.0 + m3;
    if (bracket <= 0.0) return {0.0, 0.0, 0.0};
    return {0.0, 0.0, bracket + m2 * past};
  }
};

// SphereFace: psi = (m2 c + phi(theta)) / (1 + m2), phi = (-1)^k cos(m1 theta) - 2 k, k = floor(m1 theta / pi).
// m1 > 0 is the margin m, m2 the lambda by which the plain cosine is blended in. m3 is not used.
struct SphereMargin {
  double m1;
  double m2;

  NF_HD ValueAndSlope<double> operator()(double c) const {
    const Angle at(c);
    const Phi phi(m1 * at.theta);
    return {(m2 * c + phi.value) / (1.0 + m2), (m2 + m1 * phi.slope * at.slope) / (1.0 + m2)};
  }

  NF_HD MarginSlopes slopes(double c) const {
    const double theta = Angle(c).theta;
    const Phi phi(m1 * theta);
    return {theta * phi.slope / (1.0 + m2), (c - phi.value) / ((1.0 + m2) * (1.0 + m2)), 0.0};
  }

 private:
  // Of the angle m1 theta, in which it falls all the way.
  struct Phi {
    double value, slope;

    NF_HD explicit Phi(double angle) {
      const double k = std::floor(angle / kPi);
      const double sign = k - 2.0 * std::floor(0.5 * k) == 0.0 ? 1.0 : -1.0;
      value = sign * std::cos(angle) - 2.0 * k;
      slope = -sign * std::sin(angle);
    }
  };
};

// A number that the table does not have: NaN, so that it shows.
struct UnknownMargin {
  NF_HD ValueAndSlope<double> operator()(double) const { return {NAN, NAN}; }
  NF_HD MarginSlopes slopes(double) const { return {NAN, NAN, NAN}; }
};

struct MarginValue {
  using Result = ValueAndSlope<double>;
  double c;
  template <class M>
  NF_HD Result operator()(const M& margin) const {
    return margin(c);
  }
};

struct MarginSlopesAt {
  using Result = MarginSlopes;
  double c;
  template <class M>
  NF_HD Result operator()(const M& margin) const {
    return margin.slopes(c);
  }
};

// A margin by its number.
struct Margin {
  int formula;
  double m1;
  double m2;
  double m3;
  int guard = kDefaultGuard;

  NF_HD ValueAndSlope<double> operator()(double c) const { return as_formula(MarginValue{c}); }
  NF_HD MarginSlopes slopes(double c) const { return as_formula(MarginSlopesAt{c}); }

 private:
  // The table of margins: `formula` of the Python value, and its row in reference.FORMULAS.
  template <class F>
  NF_HD typename F::Result as_formula(const F& take) const {
    switch (formula) {
      case 0:
        return take(CombinedMargin{m1, m2, m3, guard});
      case 1:
        return take(HeldMargin{m2, m3});
      case 2:
        return take(CircleMargin{m2, m3});
      case 3:
        return take(SphereMargin{m1, m2});
      default:
        return take(UnknownMargin{});
    }
  }
};

}  // namespace nf::math
