#include <cuda_runtime.h>

#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "block.h"

namespace {

std::mutex guard;
std::string asked;  // what the runtime was asked since somebody looked, a line each
std::map<const void*, std::size_t> granted;

void note(const char* name) {
  const std::lock_guard<std::mutex> lock(guard);
  asked += std::string(name) + "\n";
}

}  // namespace

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* card, int) {
  note("cudaGetDeviceProperties");
  *card = {"emulated", 3, nf::emulation::kSharedLimit, 9, 0};
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  note("cudaFuncSetAttribute");
  const std::lock_guard<std::mutex> lock(guard);
  granted[kernel] = static_cast<std::size_t>(value);
  return cudaSuccess;
}

const char* cudaGetErrorName(cudaError_t) { return "cudaErrorUnknown"; }
const char* cudaGetErrorString(cudaError_t) { return "no error of the emulation"; }

namespace nf::emulation {

void check_granted(const char* name, const void* kernel, std::size_t bytes) {
  constexpr std::size_t kWithoutAsking = 48 * 1024;
  const std::lock_guard<std::mutex> lock(guard);
  const auto found = granted.find(kernel);
  const std::size_t most = found != granted.end() ? found->second : kWithoutAsking;
  if (bytes > most && bytes <= kSharedLimit)
    throw std::runtime_error(std::string(name) + ": " + std::to_string(bytes) +
                             " bytes of shared memory, of which " + std::to_string(most) + " were asked for");
}

}  // namespace nf::emulation

// For tests, through ctypes, as nf_emulation_launched.
extern "C" [[gnu::visibility("default")]] const char* nf_emulation_asked() {
  static std::string answer;
  const std::lock_guard<std::mutex> lock(guard);
  answer = std::exchange(asked, {});
  return answer.c_str();
}
