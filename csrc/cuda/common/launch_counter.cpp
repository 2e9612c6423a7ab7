// SPDX-License-Identifier: Apache-2.0
#include "cuda/common/launch_counter.h"

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <utility>

namespace dsa::cuda {

namespace {

// Never another stream's, even of one that is gone; not asked of a stream under capture.
cudaError_t stream_id(cudaStream_t stream, unsigned long long& id) {
  auto mode = cudaStreamCaptureModeRelaxed;  // whatever other threads capture
  cudaThreadExchangeStreamCaptureMode(&mode);
  const cudaError_t error = cudaStreamGetId(stream, &id);
  cudaThreadExchangeStreamCaptureMode(&mode);
  return error;
}

}  // namespace

std::uint32_t launch_counter(const Launch& where) {
  static std::mutex mutex;
  static std::map<std::pair<int, unsigned long long>, std::uint32_t> of_streams;
  static std::uint32_t given_out = 0;
  const auto next = [] { return given_out < kLaunchCounters ? given_out++ : kLaunchCounters; };

  const auto stream = static_cast<cudaStream_t>(where.stream);
  if (stream == cudaStreamPerThread) return kLaunchCounters;  // not one stream
  auto capture = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  cudaError_t error = cudaStreamIsCapturing(stream, &capture);
  const bool is_captured = capture != cudaStreamCaptureStatusNone;
  if (error == cudaSuccess && !is_captured) error = stream_id(stream, id);
  if (error != cudaSuccess) {
    cudaGetLastError();  // the launch will say it
    return kLaunchCounters;
  }
  const std::lock_guard lock(mutex);
  if (is_captured) return next();
  const std::pair stream_of_device(where.device.index, id);
  const auto known = of_streams.find(stream_of_device);
  if (known != of_streams.end()) return known->second;
  const std::uint32_t counter = next();
  if (counter < kLaunchCounters) of_streams.emplace(stream_of_device, counter);
  return counter;
}

}  // namespace dsa::cuda
