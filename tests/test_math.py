"""csrc/math on its own: the formulas compiled by the host's C++ compiler, without torch."""

import math
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from normface_ext import reference
from normface_ext.engine.row_state import TERMS
from normface_ext.softmax.margins import NO_MARGIN

CSRC = Path(__file__).resolve().parent.parent / "csrc"
CXX = os.environ.get("CXX", "g++")

pytestmark = pytest.mark.skipif(shutil.which(CXX) is None, reason=f"no C++ compiler ({CXX})")

PROGRAM = r"""
#include <cstdio>
#include <cstdint>
#include <iostream>
#include <string>
#include <vector>
#include "engine/terms.h"
#include "math/exp.h"
#include "math/margins/margin.h"
#include "math/normalize.h"
#include "math/root.h"
#include "math/softmax.h"
using namespace nf::math;

template <class T>
void normalize(int p, double eps, double g_norm, const std::vector<double>& x, const std::vector<double>& g) {
  T sum = 0, dot = 0;
  for (double v : x) sum += norm_term<T>(p, T(v));
  const T n = norm_value<T>(p, sum, T(eps)), inverse = T(1) / n;
  for (size_t d = 0; d < x.size(); ++d) dot += T(x[d]) * inverse * T(g[d]);
  std::printf("%.17g", double(n));
  for (size_t d = 0; d < x.size(); ++d) {
    const T y = T(x[d]) * inverse;
    const T slope = norm_slope<T>(p, T(x[d]), y);
    std::printf(" %.17g", double(normalize_vjp<T>(T(g[d]), slope, dot, inverse, T(g_norm))));
  }
}

// exp of every float from the first to the last bit pattern, `stride` apart: the worst error in ulp.
void sweep_exp(uint32_t first, uint32_t last, uint32_t stride) {
  double worst = 0;
  float where = 0;
  for (uint64_t bits = first; bits <= last; bits += stride) {
    const uint32_t low = uint32_t(bits);
    float x;
    std::memcpy(&x, &low, 4);
    const double truth = std::exp(double(x));
    const float rounded = float(truth);
    const double ulp = double(std::nextafter(rounded, INFINITY)) - double(rounded);
    const double error = std::fabs(double(exp_float<float, uint32_t>(x)) - truth) / ulp;
    if (!(error <= worst)) worst = error, where = x;
  }
  std::printf("%.17g %.9g", worst, double(where));
}

int main() {
  std::string what;
  while (std::cin >> what) {
    const auto number = [] { std::string text; std::cin >> text; return std::stod(text); };
    if (what == "margin") {
      const double m1 = number(), m2 = number(), m3 = number();
      const auto psi = Margin{0, m1, m2, m3}(number());
      std::printf("%.17g %.17g", psi.value, psi.slope);
    } else if (what == "guarded_margin") {
      const double guard = number(), m1 = number(), m2 = number(), m3 = number(), c = number();
      const Margin margin{0, m1, m2, m3, int(guard)};
      const auto psi = margin(c);
      const auto slopes = margin.slopes(c);
      std::printf("%.17g %.17g %.17g %.17g %.17g", psi.value, psi.slope, slopes.m1, slopes.m2, slopes.m3);
    } else if (what == "exp_float") {
      std::printf("%.17g", double(exp_float<float, uint32_t>(float(number()))));
    } else if (what == "exp_double") {
      std::printf("%.17g", exp_double<double, uint64_t>(number()));
    } else if (what == "root_float") {
      std::printf("%.17g", double(root_float<float, int32_t>(float(number()))));
    } else if (what == "root_double") {
      std::printf("%.17g", root_double<double, int64_t>(number()));
    } else if (what == "formula") {
      const double formula = number(), m1 = number(), m2 = number(), m3 = number(), c = number();
      const Margin margin{int(formula), m1, m2, m3};
      const auto psi = margin(c);
      const auto slopes = margin.slopes(c);
      std::printf("%.17g %.17g %.17g %.17g %.17g", psi.value, psi.slope, slopes.m1, slopes.m2, slopes.m3);
    } else if (what == "sweep_exp") {
      const double first = number(), last = number(), stride = number();
      sweep_exp(uint32_t(first), uint32_t(last), uint32_t(stride));
    } else if (what == "shift_float" || what == "shift_double") {
      const double s = number(), classes = number(), lowest = number(), highest = number();
      const FixedShift window = what == "shift_float" ? fixed_shift_of<float>(classes, lowest, highest)
                                                      : fixed_shift_of<double>(classes, lowest, highest);
      std::printf("%d %.17g", window.serves(s), window.kappa(s));
    } else if (what == "term") {
      const double term = number(), cosine = number();
      const TermRow<double> row{number(), number(), number()};
      double numbers[kHardNumbers];
      for (double& v : numbers) v = number();
      nf::dispatch_term<double>(int64_t(term), [&]<class Term>() {
        const auto cell = Term(row, numbers).at(cosine, PlainExp());
        std::printf("%.17g %.17g %.17g", cell.value, cell.second, cell.coefficient);
      });
    } else if (what == "softmax") {
      const double sum = number(), kappa = number();
      const RowSoftmax row = softmax_row(sum, kappa, number());
      std::printf("%.17g %.17g %.17g", row.softplus, row.q, row.weight);
    } else if (what == "row") {
      // One row from its cosines, the target first: value and slopes of its loss. The margin is a shift.
      const double s = number(), smoothing = number(), kappa = number(), m3 = number();
      std::vector<double> c(static_cast<size_t>(number())), u(c.size());
      for (double& v : c) v = number();
      for (double& v : u) v = number();
      double sum = 0, sum_cosine = 0, weight_sum = 0, with_sum = 0;
      for (size_t j = 0; j < c.size(); ++j) {
        const double e = j == 0 ? 0.0 : std::exp(s * c[j] - kappa);
        sum += e, sum_cosine += e * c[j], weight_sum += u[j], with_sum += u[j] * c[j];
      }
      const double psi = c[0] - m3;
      const SmoothingTerms weights =
          smoothing_terms(smoothing, double(c.size()), u[0], weight_sum, psi, c[0], with_sum);
      const RowTerms row =
          row_terms({sum, sum_cosine, kappa}, s, {psi, 1.0}, weights);
      std::printf("%.17g %.17g %.17g", row.loss, row.scale, row.target + row.uniform * u[0]);
      for (size_t j = 1; j < c.size(); ++j)
        std::printf(" %.17g", row.others * std::exp(s * c[j] - kappa) + row.uniform * u[j]);
    } else if (what == "rescue_float" || what == "rescue_double") {
      const int p = int(number());
      const double sum = number(), eps = number();
      std::printf("%d", what == "rescue_float" ? norm_needs_rescue<float>(p, float(sum), float(eps))
                                               : norm_needs_rescue<double>(p, sum, eps));
    } else if (what == "normalize_float" || what == "normalize_double") {
      const int p = int(number());
      const double eps = number(), g_norm = number();
      std::vector<double> x(static_cast<size_t>(number())), g(x.size());
      for (double& v : x) v = number();
      for (double& v : g) v = number();
      if (what == "normalize_float") normalize<float>(p, eps, g_norm, x, g);
      else normalize<double>(p, eps, g_norm, x, g);
    } else {
      return 1;
    }
    std::printf("\n");
  }
}
"""


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """Answers of the program to a list of questions, each a line of numbers."""
    folder = tmp_path_factory.mktemp("math")
    (folder / "program.cpp").write_text(PROGRAM)
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
    built = subprocess.run(
        [CXX, *flags, "program.cpp", "-o", "program"], cwd=folder, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr

    def answers(questions):
        text = "\n".join(" ".join(str(part) for part in question) for question in questions)
        ran = subprocess.run([folder / "program"], input=text, capture_output=True, text=True, check=True)
        lines = [[float(number) for number in line.split()] for line in ran.stdout.splitlines()]
        assert len(lines) == len(questions)
        return lines

    return answers


def bits(value):
    return struct.unpack("I", struct.pack("f", value))[0]


# exp ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "last"), [(0.0, 88.7), (-0.0, -87.3), (1e-30, 1e-3)], ids=["positive", "negative", "small"]
)
def test_exp_float_is_within_its_error_over_the_whole_range(ask, first, last):
    """Every 997th float of the range that kappa keeps the scores in: 1.5 ulp, nothing flushed."""
    (worst, where), end = *ask([("sweep_exp", bits(first), bits(last), 997)]), ask([("exp_float", last)])
    assert worst <= 1.5, f"{worst} ulp at {where}"
    assert end[0][0] == pytest.approx(
        math.exp(struct.unpack("f", struct.pack("f", last))[0]), rel=2e-7, abs=0
    )


def test_exp_float_at_the_edge_of_its_range(ask):
    """The window of softmax.h reaches down to -87.3: the last terms there must not become 0."""
    points = [-87.3, -87.2, -87.1, -87.0, -86.99, -86.9, -86.0, 88.7, 88.0]
    for x, (y,) in zip(points, ask([("exp_float", x) for x in points]), strict=True):
        assert y == pytest.approx(math.exp(x), rel=1e-5, abs=0), x


@pytest.mark.parametrize("what", ["exp_float", "exp_double"])
def test_exp_at_its_ends(ask, what):
    beyond = {"exp_float": (-88.0, 88.8), "exp_double": (-709.0, 709.9)}[what]
    below, above, lowest, highest, nan, one = (
        answer[0] for answer in ask([(what, x) for x in (*beyond, "-inf", "inf", "nan", 0.0)])
    )
    assert (below, above, lowest, highest, one) == (0, math.inf, 0, math.inf, 1)
    assert math.isnan(nan)


def test_exp_double_is_exact_to_the_last_bits(ask):
    points = [-708 + 1417 * i / 4000 for i in range(4001)] + [1e-300, -1e-17, 0.34657359]
    for x, (y,) in zip(points, ask([("exp_double", repr(x)) for x in points]), strict=True):
        assert y == pytest.approx(math.exp(x), rel=4e-16, abs=0), x


# softmax --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [(-1, 1), (-1, 2), (-1, 1.2), (-3, 1)], ids=str)
@pytest.mark.parametrize(("what", "low", "high"), [("float", 80.0, 88.72), ("double", 690.0, 709.78)])
def test_the_shift_keeps_every_term_in_range(ask, what, low, high, ends):
    """No term so small that s / S overflows, no sum of C terms that does, for every scale with a shift."""
    cases = [
        (s * sign, classes)
        for s in (0, 1e-3, 1, 10, 30, 64, 72, 78, 79.5, 80, 82, 86, 87.9, 88, 100, 300, 650, 700, 800)
        for sign in (1, -1)
        for classes in (1, 2, 1000, 10_000_000)
    ]
    answers = ask([(f"shift_{what}", *case, *ends) for case in cases])
    reach = max(map(abs, ends))  # f, and slopes of four times that, meet E before it is summed
    high -= math.log(4 * reach) if reach > 1 else 0
    fixed = 0
    for (scale, classes), (has, kappa) in zip(cases, answers, strict=True):
        smallest, largest = sorted(scale * end for end in ends)
        if has:
            fixed += 1
            assert kappa - smallest <= low + 1e-9, (scale, classes)
            assert largest - kappa + math.log(classes) <= high + 1e-9, (scale, classes)
        else:
            assert largest - smallest + math.log(classes) > low + high - 0.05, (scale, classes)
    assert fixed > 20


def test_one_shift_serves_a_scale_of_76_at_ten_million_classes(ask):
    assert ask([("shift_float", 76, 1e7, -1, 1)])[0][0]


def exact_row(sum_, kappa, z):
    """loss, q and q / S in long arithmetic."""
    import mpmath

    with mpmath.workdps(60):
        t = mpmath.log(sum_) + kappa - z if sum_ > 0 else -mpmath.inf
        e = mpmath.exp(t)
        q = e / (1 + e)
        return float(mpmath.log1p(e)), float(q), float(q / sum_) if sum_ > 0 else 0.0


def test_rows_of_softmax_keep_their_digits(ask):
    """Down to losses of 1e-300, where 1 - p is zero in any floating type."""
    cases = [
        (s, kappa, z)
        for s in (1e-30, 1e-3, 1.0, 3.7, 1e20)
        for kappa in (-20.0, 0.0, 19.2)
        for z in (-700.0, -64.0, -1.0, 0.0, 0.5, 30.0, 64.0, 600.0)
    ]
    for case, row in zip(cases, ask([("softmax", *case) for case in cases]), strict=True):
        for got, truth in zip(row, exact_row(*case), strict=True):
            # log S + kappa - z is exact to an epsilon of its largest term.
            size = max(abs(math.log(case[0])), abs(case[1]), abs(case[2]), 1)
            assert got == pytest.approx(truth, rel=4 * size * 2.3e-16, abs=1e-307), case


def test_a_row_without_other_classes_has_no_loss(ask):
    assert ask([("softmax", 0, 0, 30), ("softmax", 0, 0, -30)]) == [[0, 0, 0]] * 2


def test_nan_passes_through_a_row(ask):
    rows = ask([("softmax", "nan", 0, 1), ("softmax", 1, 0, "nan")])
    for row in rows:
        assert math.isnan(row[0]) and math.isnan(row[1])


@pytest.mark.parametrize("weights", [[1.0] * 4, [0.5, 2.0, 0.0, 1.25]], ids=["equal", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("m3", [0.0, 0.35])
def test_value_and_slopes_of_a_row(ask, m3, smoothing, weights):
    """torch's cross_entropy of the same logits, and its gradient in every cosine and in the scale."""
    numbers = [0.4, 0.3, -0.8, 0.05]
    cosines = torch.tensor(numbers, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(12.0, dtype=torch.float64, requires_grad=True)
    shift = torch.tensor([m3, 0, 0, 0], dtype=torch.float64)
    truth = torch.nn.functional.cross_entropy(
        (scale * (cosines - shift))[None],
        torch.tensor([0]),
        torch.tensor(weights, dtype=torch.float64),
        label_smoothing=smoothing,
        reduction="sum",
    )
    truth.backward()
    value, slope, *slopes = ask([("row", 12.0, smoothing, 3.6, m3, 4, *numbers, *weights)])[0]
    assert value == pytest.approx(float(truth.detach()), rel=1e-13, abs=0)
    assert slope == pytest.approx(float(scale.grad), rel=1e-12, abs=1e-15)
    assert slopes == pytest.approx(cosines.grad.tolist(), rel=1e-12, abs=1e-14)


# square root ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("what, ulp", [("root_float", 2.0**-23), ("root_double", 2.0**-52)])
def test_square_roots_are_exact_to_the_last_bits(ask, what, ulp):
    """Of what stands below a sine, (1 - c)(1 + c), and of others; 0 stays 0, NaN stays NaN."""
    points = [1.0, 2.0, 0.5, 3.7, 1e-7, 1e-12, 1e-30, 1e30, *(k / 977 for k in range(1, 977))]
    narrow = what == "root_float"
    for x, (y,) in zip(points, ask([(what, repr(x)) for x in points]), strict=True):
        held = struct.unpack("f", struct.pack("f", x))[0] if narrow else x
        assert y == pytest.approx(math.sqrt(held), rel=ulp, abs=0), x
    (zero,), (none,) = ask([(what, "0"), (what, "nan")])
    assert zero == 0 and math.isnan(none)


# terms ----------------------------------------------------------------------------------------------


#: The six numbers of math/terms/hard_negatives.h.
NUMBERS = {
    "curricular": (1, 0.3, 0, 2, 0.3, 1),
    "fixed": (0, 1.2, 0.2, 0, 1.2, 1),
    "adaptive": (0, 1, 0.2, 0, 1, 1),
    "filter": (0, 0, 0, 0, 0, 1),
}
UNUSED = (0,) * 6
#: Name -> number, numbers, threshold, and dvalue / dcosine as a multiple of the coefficient.
TERM_CASES = {
    "softmax": (TERMS["softmax"], UNUSED, 0.0, 9.0),
    **{name: (TERMS["hard_negatives"], six, 0.25, 9.0) for name, six in NUMBERS.items()},
    "hinge": (TERMS["hinge"], UNUSED, 1.5, 2.0),
    "exponential hinge": (TERMS["exponential_hinge"], UNUSED, 1.5, 2.0),
    "sigmoid": (TERMS["sigmoid"], (6, 0.5, 3, 0, 0, 0), 0.0, 1.0),
    "angular sigmoid": (TERMS["angular_sigmoid"], (6, 0.5, 3, 0, math.cos(0.4), math.sin(0.4)), 0.0, 1.0),
}
SCALE, KAPPA = 9.0, 1.5


def cells(ask, name, cosines):
    """(value, second, coefficient) of every cosine."""
    number, six, threshold, _ = TERM_CASES[name]
    return ask([("term", number, repr(c), SCALE, KAPPA, threshold, *six) for c in cosines])


@pytest.mark.parametrize("name", TERM_CASES)
def test_the_coefficient_of_a_term_is_the_slope_of_its_value(ask, name):
    step, points = 1e-6, [-0.97 + 0.0613 * i for i in range(32)]
    found = cells(ask, name, [c + d for c in points for d in (-step, 0, step)])
    moving = 0
    for i, c in enumerate(points):
        (below, *_), (_, _, coefficient), (above, *_) = found[3 * i : 3 * i + 3]
        slope = TERM_CASES[name][3] * coefficient
        moving += slope != 0
        assert slope == pytest.approx((above - below) / (2 * step), rel=1e-6, abs=1e-8), c
    assert moving >= 10


@pytest.mark.parametrize("name", ["softmax", *NUMBERS])
def test_a_softmax_term_sums_e_and_e_times_its_logit(ask, name):
    number, (a2, a1, a0, *_), threshold, _ = TERM_CASES[name]
    for c in (-1.0, -0.3, 0.0, 0.25, 0.2500001, 0.6, 1.0):
        hard = number == TERMS["hard_negatives"] and c > threshold
        f = a2 * c * c + a1 * c + a0 if hard else c
        value, second, _ = cells(ask, name, [c])[0]
        assert value == pytest.approx(math.exp(SCALE * f - KAPPA), rel=1e-14)
        assert second == pytest.approx(value * f, rel=1e-14)


@pytest.mark.parametrize("name", ["hinge", "exponential hinge"])
def test_a_hinge_is_exactly_zero_but_where_it_is_active(ask, name):
    for c in (-1.0, 0.0, 0.25, 0.2500001, 0.6, 1.0):  # the distance of 0.25 is 1.5, the threshold
        value, active, coefficient = cells(ask, name, [c])[0]
        if c <= 0.25:
            assert (value, active, coefficient) == (0, 0, 0), c
            continue
        distance = 2 - 2 * c
        exponential = math.exp(-distance)
        assert active == 1
        assert value == pytest.approx(exponential if "exp" in name else 1.5 - distance, rel=1e-14, abs=1e-15)
        assert coefficient == pytest.approx(exponential if "exp" in name else 1, rel=1e-14)


@pytest.mark.parametrize("name", ["curricular", "fixed", "adaptive", "filter"])
def test_a_cosine_at_its_threshold_is_not_past_it(ask, name):
    """The class that is as near as the label's own is not a hard one: a tie is no mistake."""
    at, past = cells(ask, name, [0.25, math.nextafter(0.25, 1)])
    assert at == pytest.approx(cells(ask, "softmax", [0.25])[0], rel=1e-14)
    assert past != pytest.approx(at, rel=1e-6)


@pytest.mark.parametrize("name", TERM_CASES)
def test_a_cosine_that_is_nan_shows_in_its_term(ask, name):
    value, _, coefficient = cells(ask, name, [math.nan])[0]
    assert math.isnan(value) and (math.isnan(coefficient) or coefficient == 1)


# margin ---------------------------------------------------------------------------------------------


MARGINS = [
    (1, 0, 0),
    (1, 0, 0.35),
    (1, 0.5, 0),
    (1, 3.0, 0),
    (1.2, 0.3, 0.1),
    (2, 0, 0),
    (4, 0, 0),
    (1.35, 0, 0),
]
COSINES = [-1, -0.9999999, -0.999, -0.9, -0.5, -0.1, 0, 1e-9, 0.2, 0.7071, 0.9, 0.999, 0.99999999, 1]


@pytest.mark.parametrize("margin", MARGINS, ids=str)
def test_margins_are_those_of_the_specification(ask, margin):
    from normface_ext import CombinedMargin

    answers = ask([("margin", *margin, repr(float(c))) for c in COSINES])
    for c, (value, slope) in zip(COSINES, answers, strict=True):
        cos = torch.tensor(float(c), dtype=torch.float64, requires_grad=True)
        psi = reference.margin(
            cos, CombinedMargin(*margin) if any(margin[1:]) or margin[0] != 1 else NO_MARGIN
        )
        psi.backward()
        assert value == pytest.approx(float(psi.detach()), rel=1e-12, abs=1e-14), c
        assert math.isfinite(slope)
        if abs(c) < 0.9999999:
            assert slope == pytest.approx(float(cos.grad), rel=1e-9), c


@pytest.mark.parametrize("margin", MARGINS, ids=str)
def test_slopes_of_margins_are_derivatives(ask, margin):
    step = 1e-6
    points = [-0.97 + 0.0613 * i for i in range(32)]
    questions = [("margin", *margin, repr(c + d)) for c in points for d in (-step, 0, step)]
    answers = ask(questions)
    compared = 0
    for i, c in enumerate(points):
        (below, s0), (_, slope), (above, s2) = answers[3 * i : 3 * i + 3]
        if abs(s0 - s2) > 0.1:
            continue  # the guard begins between the two
        compared += 1
        assert slope == pytest.approx((above - below) / (2 * step), rel=2e-6, abs=1e-8), c
    assert compared >= 30


def test_margins_do_not_jump_up_where_the_guard_begins(ask):
    """A harder sample never pays less: psi rises with the cosine through the guard."""
    for m1, m2 in ((1, 0.5), (1.2, 0.3), (2, 0), (4, 0.2)):
        edge = math.cos((math.pi - m2) / m1)
        (below, _), (above, _) = ask([("margin", m1, m2, 0, repr(edge + d)) for d in (-1e-9, 1e-9)])
        assert below <= above + 1e-8, (m1, m2)


# normalize ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["normalize_float", "normalize_double"])
@pytest.mark.parametrize("eps", [0.0, 1e-12, 0.5])
@pytest.mark.parametrize("p", [1, 2])
def test_slopes_of_normalize_are_derivatives(ask, p, eps, what):
    x, g, g_norm, step = [0.5, -1.5, 2.0, -0.25], [1.0, 0.3, -2.0, 0.7], 0.9, 1e-6
    (norm, *dx) = ask([(what, p, eps, g_norm, len(x), *x, *g)])[0]

    def loss(x):
        total = sum(v * v for v in x) if p == 2 else sum(abs(v) for v in x)
        n = math.sqrt(total + eps) if p == 2 else total + eps
        return n, sum(gd * v / n for gd, v in zip(g, x, strict=True)) + g_norm * n

    tolerance = 1e-6 if what == "normalize_float" else 1e-8
    assert norm == pytest.approx(loss(x)[0], rel=tolerance)
    for d in range(len(x)):
        low, high = ([*x[:d], x[d] + by, *x[d + 1 :]] for by in (-step, step))
        difference = (loss(high)[1] - loss(low)[1]) / (2 * step)
        assert dx[d] == pytest.approx(difference, rel=tolerance, abs=tolerance)


def test_zero_entries_have_the_slopes_of_the_paper(ask):
    (norm, *dx) = ask([("normalize_double", 1, 0.5, 9.0, 2, 0.0, 0.0, 1.0, 2.0)])[0]
    assert (norm, dx) == (0.5, [2, 4])  # sign(0) = 0: the gradient of the norm does not act
    (norm, *dx) = ask([("normalize_double", 2, 4.0, 3.0, 2, 0.0, 0.0, 6.0, -2.0)])[0]
    assert (norm, dx) == (2, [3, -1])


def test_only_rows_out_of_range_are_rescued(ask):
    cases = {
        ("rescue_float", 2, 1.0, 0.0): 0,
        ("rescue_float", 2, 0.0, 1e-12): 0,  # eps rules: what was lost does not count
        ("rescue_float", 2, 0.0, 0.0): 1,
        ("rescue_float", 2, "inf", 1e-12): 1,
        ("rescue_float", 1, "inf", 1e-12): 1,
        ("rescue_float", 2, 1e38, 1e-12): 1,
        ("rescue_float", 2, 1e36, 1e-12): 0,
        ("rescue_float", 2, 1e-35, 0.0): 1,
        ("rescue_float", 1, 1e-35, 0.0): 0,  # a sum of magnitudes loses nothing
        ("rescue_float", 1, 1e-38, 0.0): 1,  # but it may have no reciprocal
        ("rescue_float", 1, 1e-38, 1e-12): 0,
        ("rescue_float", 2, "nan", 1e-12): 1,
        ("rescue_double", 2, 1e38, 0.0): 0,
        ("rescue_double", 2, 1e-35, 0.0): 0,
        ("rescue_double", 2, "inf", 0.0): 1,
        ("rescue_double", 2, 1e-290, 0.0): 1,
    }
    for (question, expected), (got,) in zip(cases.items(), ask(list(cases)), strict=True):
        assert got == expected, question


#: (formula, m1, m2, m3) of csrc/math/margins/margin.h's table, beside the combined ones above.
FORMULAS = [
    *((2, 1, detached, m) for detached in (0, 1) for m in (0, 0.25, 1)),
    *((3, m, blend, 0) for m in (1, 1.7, 2, 3, 4, 5.5) for blend in (0, 0.5, 5)),
]


@pytest.mark.parametrize("numbers", FORMULAS, ids=str)
def test_formulas_are_those_of_the_specification(ask, numbers):
    """Value, slope in the cosine, and slopes in the numbers that the formula uses."""
    formula, *given = numbers
    for c, (value, *slopes) in zip(
        COSINES, ask([("formula", *numbers, repr(float(c))) for c in COSINES]), strict=True
    ):
        leaves = [torch.tensor(float(v), dtype=torch.float64, requires_grad=True) for v in (c, *given)]
        psi = reference.FORMULAS[formula](*leaves, None)
        found = torch.autograd.grad(psi, leaves, allow_unused=True)
        assert value == pytest.approx(float(psi.detach()), rel=1e-12, abs=1e-14), c
        assert all(map(math.isfinite, slopes))
        if abs(c) < 0.9999999:
            # Circle's m2 says what its slope is, and is no number of its value.
            expected = [0.0 if g is None or (formula, i) == (2, 2) else float(g) for i, g in enumerate(found)]
            assert slopes == pytest.approx(expected, rel=1e-9, abs=1e-12), c


@pytest.mark.parametrize("numbers", [(2, 1, 1, 0.25), (3, 4, 0.5, 0), (3, 1.7, 0, 0)], ids=str)
def test_slopes_of_formulas_are_derivatives(ask, numbers):
    step, points = 1e-6, [-0.97 + 0.0613 * i for i in range(32)]
    found = ask([("formula", *numbers, repr(c + d)) for c in points for d in (-step, 0, step)])
    for i, c in enumerate(points):
        (below, s0, *_), (_, slope, *_), (above, s2, *_) = found[3 * i : 3 * i + 3]
        if abs(s2 - s0) < 1e-3:  # no kink in between
            assert slope == pytest.approx((above - below) / (2 * step), rel=1e-6, abs=1e-8), c
