// SPDX-License-Identifier: Apache-2.0
// Indexer logits with e4m3 products as the tensor cores of SM89 and SM12x have them.
#include <atomic>
#include <string>

#include "cuda/portable/mqa_logits_launch.cuh"

namespace dsa::cuda {

namespace {

__global__ void portable_mqa_e4m3_probe_kernel() {}

// What the code that this device runs of this build was compiled for, as 10 * major + minor; 0: it
// loads none. Asked until it is known; the runtime answers for the current device alone.
int code_arch(Device device) {
  static std::atomic<int> known[kMaxDevices] = {};
  std::atomic<int>& arch = known[device.index % kMaxDevices];
  if (const int answer = arch.load(std::memory_order_relaxed); answer != 0) return answer;
  int current = 0;
  cudaFuncAttributes attributes{};
  const bool loads =
      cudaGetDevice(&current) == cudaSuccess && cudaSetDevice(device.index) == cudaSuccess &&
      cudaFuncGetAttributes(&attributes, portable_mqa_e4m3_probe_kernel) == cudaSuccess;
  if (cudaSetDevice(current) != cudaSuccess || !loads) {
    cudaGetLastError();
    return 0;
  }
  arch.store(attributes.ptxVersion, std::memory_order_relaxed);
  return attributes.ptxVersion;
}

}  // namespace

// SM89 also runs the SASS of SM80, which has no e4m3 products: what counts beside the device is
// what this build was compiled for.
Support e4m3_products_run_on(const Device& device) {
  const int arch = device_limits(device).arch;
  if (arch < 89) return {"SM89 or newer, not SM" + std::to_string(arch)};
  const int code = code_arch(device);
  if (code >= 89) return {};
  if (code == 0) return {"a device whose kernels can be loaded"};
  return {"a build for SM89 or newer (DSA_CUDA_ARCHS), not for SM" + std::to_string(code)};
}

Status mqa_logits_e4m3(const MqaLogitsParams& p) {
  return run_mqa_logits<E4m3Products>(p, "portable_mqa_logits_e4m3");
}

Status paged_mqa_logits_e4m3(const PagedMqaLogitsParams& p) {
  return run_mqa_logits<E4m3Products>(p, "portable_paged_mqa_logits_e4m3");
}

}  // namespace dsa::cuda
