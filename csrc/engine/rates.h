// How fast a kind of device is: one table each, and for every number the file under benchmarks/results that it was
// taken from, or none where it is a prediction. products.h makes seconds of them.
//
// A kernel's rate is that of its arithmetic alone: what is left of a measured time when its exponentials and its
// traffic are taken off. Of the H100's (N = 1024, C = 1,000,000; W of float32):
//   sm80_scores      D = 512, 3.68 ms: E written .68, w_hat read .34, exponentials .28; 2.38 ms for 1.05e12
//   single_sweep     D = 128, 1.80 ms: w_hat read twice .17, exponentials .28; 1.35 ms for 0.52e12
//   sweep_gradient   D = 128, 2.33 ms: W read and dW written .65, w_hat .09, exponentials .28; 1.31 ms
//   weight_gradient  6.5 ms at D = 512, 0.307 ms at 256 x 512 x 85,742: two equations for its arithmetic and the
//                    rate at which it reads E and W and writes dW
#pragma once

#include <cstdint>
#include <string_view>

namespace nf {

struct Rate {
  double value;
  const char* results;  // a file, or null: predicted
};

// Operations, bytes or exponentials per second, unless said otherwise.
struct Rates {
  const char* kind;
  bool cuda;
  Rate bandwidth;        // of kernels that only pass over memory
  Rate cache_bandwidth;  // of what comes from the L2 cache
  Rate pass;             // of class_gradients: product and W read, dW written
  Rate epilogue;         // of our own products of dW, for E, W and dW
  Rate exponentials;
  Rate launch;                           // seconds of a launch, its kernel's first and last wave included
  Rate library16, library32, library64;  // products by cuBLAS, or by BLAS per thread
  Rate pairs16;                          // of a CPU's threads, by instructions for pairs of bfloat16
  Rate simt32, simt64;
  Rate sm80_scores, sm80_weight_gradient, sm80_single_sweep, sm80_sweep_gradient;
  Rate sm90_scores, sm90_weight_gradient, sm90_single_sweep, sm90_sweep_gradient;
  Rate tf32x3_scores, tf32x3_sums, tf32x3_gradient;  // a product counted once
  int64_t cache;  // bytes of E that stay in the L2 cache from kernel to kernel

  template <class F>
  void each(F&& f) const {
    f("bandwidth", bandwidth);
    f("cache_bandwidth", cache_bandwidth);
    f("pass", pass);
    f("epilogue", epilogue);
    f("exponentials", exponentials);
    f("launch", launch);
    f("library16", library16);
    f("library32", library32);
    f("library64", library64);
    f("pairs16", pairs16);
    f("simt32", simt32);
    f("simt64", simt64);
    f("sm80_scores", sm80_scores);
    f("sm80_weight_gradient", sm80_weight_gradient);
    f("sm80_single_sweep", sm80_single_sweep);
    f("sm80_sweep_gradient", sm80_sweep_gradient);
    f("sm90_scores", sm90_scores);
    f("sm90_weight_gradient", sm90_weight_gradient);
    f("sm90_single_sweep", sm90_single_sweep);
    f("sm90_sweep_gradient", sm90_sweep_gradient);
    f("tf32x3_scores", tf32x3_scores);
    f("tf32x3_sums", tf32x3_sums);
    f("tf32x3_gradient", tf32x3_gradient);
  }
};

namespace results {
constexpr const char* kH100 = "benchmarks/results/README.md";
constexpr const char* kH100Steps = "benchmarks/results/h100/kernels.jsonl";
constexpr const char* kCpu = "benchmarks/results/cpu-epyc-zen3-2vcpu/kernels_amortised.jsonl";
constexpr const char* kPairs = "benchmarks/results/cpu-epyc-zen4-2vcpu/pairs.md";
constexpr const char* kPredicted = nullptr;
}  // namespace results

// Fitted to steps of that machine; it stands for every CPU. Products are its threads' own.
constexpr Rates kCpuRates = {
    .kind = "CPU",
    .cuda = false,
    .bandwidth = {26e9, results::kCpu},
    .cache_bandwidth = {},
    .pass = {26e9, results::kCpu},
    .epilogue = {26e9, results::kCpu},
    .exponentials = {0.95e9, results::kCpu},
    .launch = {0, results::kCpu},
    .library16 = {72e9, results::kCpu},
    .library32 = {72e9, results::kCpu},
    .library64 = {36e9, results::kPredicted},
    .pairs16 = {200e9, results::kPairs},
    .simt32 = {},
    .simt64 = {},
    .sm80_scores = {},
    .sm80_weight_gradient = {},
    .sm80_single_sweep = {},
    .sm80_sweep_gradient = {},
    .sm90_scores = {},
    .sm90_weight_gradient = {},
    .sm90_single_sweep = {},
    .sm90_sweep_gradient = {},
    .tf32x3_scores = {},
    .tf32x3_sums = {},
    .tf32x3_gradient = {},
    .cache = 0,
};

constexpr Rates kH100Rates = {
    .kind = "H100",
    .cuda = true,
    .bandwidth = {3.0e12, results::kH100},
    .cache_bandwidth = {5.5e12, results::kPredicted},
    .pass = {2.0e12, results::kH100},
    .epilogue = {1.57e12, results::kH100},
    .exponentials = {3.6e12, results::kPredicted},  // 16 per clock and multiprocessor
    .launch = {20e-6, results::kH100Steps},         // 256 x 512 x 10,572 by CUDA graph: 195 us
    .library16 = {766e12, results::kH100},
    .library32 = {50e12, results::kH100Steps},  // 256 x 512 x 85,742 in float32: 2.21 ms
    .library64 = {50e12, results::kPredicted},
    .pairs16 = {},
    .simt32 = {39e12, results::kPredicted},  // as long as cuBLAS at 6e9 operations
    .simt64 = {20e12, results::kPredicted},
    .sm80_scores = {441e12, results::kH100},
    .sm80_weight_gradient = {407e12, results::kH100},
    .sm80_single_sweep = {388e12, results::kH100},
    .sm80_sweep_gradient = {400e12, results::kH100},
    .sm90_scores = {766e12, results::kPredicted},           // as cuBLAS
    .sm90_weight_gradient = {700e12, results::kPredicted},  // nine tenths of it
    .sm90_single_sweep = {700e12, results::kPredicted},
    .sm90_sweep_gradient = {700e12, results::kPredicted},
    // A third of what mma.sync gives (62 % of 495e12 by wgmma), at 70 and 60 % of the time.
    .tf32x3_scores = {72e12, results::kPredicted},
    .tf32x3_sums = {68e12, results::kPredicted},
    .tf32x3_gradient = {62e12, results::kPredicted},
    .cache = 32 << 20,
};

// The same arithmetic with a faster memory.
constexpr Rates predicted(const char* kind, double memory) {
  const Rates& h100 = kH100Rates;
  const auto guess = [](const Rate& rate, double factor) { return Rate{factor * rate.value, nullptr}; };
  return {
      .kind = kind,
      .cuda = true,
      .bandwidth = guess(h100.bandwidth, memory),
      .cache_bandwidth = guess(h100.cache_bandwidth, 1),
      .pass = guess(h100.pass, memory),
      .epilogue = guess(h100.epilogue, memory),
      .exponentials = guess(h100.exponentials, 1),
      .launch = guess(h100.launch, 1),
      .library16 = guess(h100.library16, 1),
      .library32 = guess(h100.library32, 1),
      .library64 = guess(h100.library64, 1),
      .pairs16 = {},
      .simt32 = guess(h100.simt32, 1),
      .simt64 = guess(h100.simt64, 1),
      .sm80_scores = guess(h100.sm80_scores, 1),
      .sm80_weight_gradient = guess(h100.sm80_weight_gradient, 1),
      .sm80_single_sweep = guess(h100.sm80_single_sweep, 1),
      .sm80_sweep_gradient = guess(h100.sm80_sweep_gradient, 1),
      .sm90_scores = guess(h100.sm90_scores, 1),
      .sm90_weight_gradient = guess(h100.sm90_weight_gradient, 1),
      .sm90_single_sweep = guess(h100.sm90_single_sweep, 1),
      .sm90_sweep_gradient = guess(h100.sm90_sweep_gradient, 1),
      .tf32x3_scores = guess(h100.tf32x3_scores, 1),
      .tf32x3_sums = guess(h100.tf32x3_sums, 1),
      .tf32x3_gradient = guess(h100.tf32x3_gradient, 1),
      .cache = h100.cache,
  };
}

constexpr Rates kH200Rates = predicted("H200", 4.3 / 3.0);
constexpr Rates kOtherRates = predicted("any other GPU", 1.0);

// By the name that CUDA gives a device; empty for a CPU.
constexpr const Rates& rates_of(bool cuda, std::string_view name) {
  if (!cuda) return kCpuRates;
  if (name.find("H100") != std::string_view::npos) return kH100Rates;
  if (name.find("H200") != std::string_view::npos) return kH200Rates;
  return kOtherRates;
}

}  // namespace nf
