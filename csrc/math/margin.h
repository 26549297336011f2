// psi(c): what a margin makes of the target cosine. Only the target column meets it.
//   combined (m1, m2, m3):  psi = cos(m1 theta + m2) - m3,  theta = arccos c,  m1 > 0
//   NormFace (1, 0, 0), CosFace (1, 0, m), ArcFace (1, m, 0).
// Past m1 theta + m2 = pi the cosine would rise again. What is done there is the guard:
//   shift   psi = c - m2 sin m2 - m3, the form ArcFace implementations share
//   join    psi = c - 1 - cos((pi - m2) / m1) - m3: slope 1 as well, and no jump where the guard begins
//   easy    nothing there, but psi = c - m3 wherever c <= 0 (MagFace, MV-Softmax)
//   none    nothing
// By default: shift where m1 = 1, join elsewhere.
// sin(theta) is floored at kSinFloor, so value and slope stay finite at c = +-1.
#pragma once

#include "math/host_device.h"

namespace nf::math {

enum Guard { kDefaultGuard = 0, kShiftGuard = 1, kJoinGuard = 2, kEasyGuard = 3, kNoGuard = 4 };

// d psi / d m1, m2, m3
struct MarginSlopes {
  double m1;
  double m2;
  double m3;
};

struct Margin {
  double m1;
  double m2;
  double m3;
  int guard = kDefaultGuard;

  static constexpr double kSinFloor = 1e-4;
  static constexpr double kPi = 3.14159265358979323846;

  NF_HD ValueAndSlope<double> operator()(double c) const {
    if ((m1 == 1.0 && m2 == 0.0) || eased(c)) return {c - m3, 1.0};
    const Angle angle = angle_of(c);
    if (guarded(angle)) return {c - (shifted() ? m2 * std::sin(m2) : 1.0 + std::cos(join())) - m3, 1.0};
    // d theta / dc = -1/sin on the circle; with the sine held at its floor it is -sin/(sin^2 + c^2).
    const double theta_slope =
        angle.floored ? -angle.sine / (angle.sine * angle.sine + c * c) : -1.0 / angle.sine;
    return {std::cos(angle.value) - m3, -m1 * std::sin(angle.value) * theta_slope};
  }

  NF_HD MarginSlopes slopes(double c) const {
    if (eased(c)) return {0.0, 0.0, -1.0};
    const Angle angle = angle_of(c);
    if (!guarded(angle)) {
      const double sine = std::sin(angle.value);
      return {-sine * angle.theta, -sine, -1.0};
    }
    if (shifted()) return {0.0, -(std::sin(m2) + m2 * std::cos(m2)), -1.0};
    const double place = join(), sine = std::sin(place);
    return {-sine * place / m1, -sine / m1, -1.0};
  }

 private:
  struct Angle {
    double theta, sine;
    bool floored;
    double value;  // m1 theta + m2
  };

  NF_HD Angle angle_of(double c) const {
    const double sin_squared = (1.0 - c) * (1.0 + c);
    const bool floored = !(sin_squared > kSinFloor * kSinFloor);
    const double sine = floored ? kSinFloor : std::sqrt(sin_squared);
    const double theta = std::atan2(sine, c);
    return {theta, sine, floored, m1 * theta + m2};
  }
  NF_HD bool eased(double c) const { return guard == kEasyGuard && c <= 0.0; }
  NF_HD bool guarded(const Angle& angle) const { return guard < kEasyGuard && angle.value > kPi; }
  NF_HD bool shifted() const { return guard == kShiftGuard || (guard == kDefaultGuard && m1 == 1.0); }
  // theta where the guard begins; 0 where it does from the start.
  NF_HD double join() const { return m2 < kPi ? (kPi - m2) / m1 : 0.0; }
};

}  // namespace nf::math
