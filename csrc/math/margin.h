// psi(c): what a margin makes of the target cosine. Only the target column meets it.
//   combined (m1, m2, m3):  psi = cos(m1 theta + m2) - m3,  theta = arccos c
//   NormFace (1, 0, 0), CosFace (1, 0, m), ArcFace (1, m, 0).
// Past m1 theta + m2 = pi the cosine would rise again; there psi = c - k - m3, slope 1 (monotone
// guard), with k = m2 sin m2 for m1 = 1 (the form ArcFace implementations share) and otherwise the k
// that joins continuously at -1.
// sin(theta) is floored at kSinFloor, so value and slope stay finite at c = +-1.
#pragma once

#include "math/host_device.h"

namespace nf::math {

struct Margin {
  double m1;
  double m2;
  double m3;

  static constexpr double kSinFloor = 1e-4;

  NF_HD ValueAndSlope<double> operator()(double c) const {
    if (m1 == 1.0 && m2 == 0.0) return {c - m3, 1.0};
    const double kPi = 3.14159265358979323846;
    const double sin_squared = (1.0 - c) * (1.0 + c);
    const bool floored = !(sin_squared > kSinFloor * kSinFloor);
    const double sine = floored ? kSinFloor : std::sqrt(sin_squared);
    const double theta = std::atan2(sine, c);
    const double angle = m1 * theta + m2;
    if (angle > kPi) {
      const double k = m1 == 1.0 ? m2 * std::sin(m2) : 1.0 + std::cos((kPi - m2) / m1);
      return {c - k - m3, 1.0};
    }
    // d theta / dc = -1/sin on the circle; with the sine held at its floor it is -sin/(sin^2 + c^2).
    const double theta_slope = floored ? -sine / (sine * sine + c * c) : -1.0 / sine;
    return {std::cos(angle) - m3, -m1 * std::sin(angle) * theta_slope};
  }
};

}  // namespace nf::math
