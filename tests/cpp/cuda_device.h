// SPDX-License-Identifier: Apache-2.0
// Device memory, streams and whether there is a GPU, for the tests of the CUDA backend.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <list>
#include <vector>

#include "dispatch/registry.h"
#include "dsa/params.h"

namespace dsa::test {

using Bytes = std::vector<std::uint8_t>;

inline constexpr Device kGpu{DeviceType::kCuda, 0};

// Skips its tests where nothing could run them.
class CudaTest : public ::testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
      cudaGetLastError();
      GTEST_SKIP() << "no CUDA device";
    }
    for (const KernelInfo& kernel : list_kernels()) {
      if (kernel.target.type == DeviceType::kCuda) return;
    }
    GTEST_SKIP() << "this build has no CUDA kernels";
  }
};

inline void expect_cuda(cudaError_t error) {
  EXPECT_EQ(error, cudaSuccess) << cudaGetErrorString(error);
}

enum class Guard {
  kExact,     // an allocation as large as the data: a memory checker sees any access beside it
  kCanaries,  // known bytes around the data, looked at by intact()
};

class DeviceBuffer {
 public:
  DeviceBuffer(const void* host, std::size_t bytes, Guard guard)
      : bytes_(bytes), guard_(guard == Guard::kCanaries ? kCanaryBytes : 0) {
    if (bytes_ + guard_ == 0) return;
    expect_cuda(cudaMalloc(&memory_, bytes_ + 2 * guard_));
    expect_cuda(cudaMemset(memory_, kCanary, bytes_ + 2 * guard_));
    if (host != nullptr && bytes_ != 0) {
      expect_cuda(cudaMemcpy(data(), host, bytes_, cudaMemcpyHostToDevice));
    }
    expect_cuda(cudaDeviceSynchronize());  // streams that do not wait for the null stream read it
  }
  ~DeviceBuffer() { cudaFree(memory_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  void* data() const {
    return memory_ == nullptr ? nullptr : static_cast<std::uint8_t*>(memory_) + guard_;
  }
  Bytes download() const { return copy(guard_, bytes_); }
  bool intact() const {
    const Bytes canaries(guard_, kCanary);
    return copy(0, guard_) == canaries && copy(guard_ + bytes_, guard_) == canaries;
  }

 private:
  static constexpr std::size_t kCanaryBytes = 1024;  // keeps the alignment of cudaMalloc
  static constexpr std::uint8_t kCanary = 0xA5;

  Bytes copy(std::size_t at, std::size_t count) const {
    Bytes bytes(count);
    if (count != 0) {
      const auto* from = static_cast<const std::uint8_t*>(memory_) + at;
      expect_cuda(cudaMemcpy(bytes.data(), from, count, cudaMemcpyDeviceToHost));
    }
    return bytes;
  }

  void* memory_ = nullptr;
  std::size_t bytes_;
  std::size_t guard_;
};

// What launch.allocate is given: memory until the end of the test.
class Workspaces {
 public:
  void install(Launch& launch) {
    launch.allocate = [](std::int64_t bytes, void* context) -> void* {
      auto& all = static_cast<Workspaces*>(context)->buffers_;
      all.emplace_back(nullptr, static_cast<std::size_t>(bytes), Guard::kCanaries);
      return all.back().data();
    };
    launch.allocate_context = this;
  }
  std::size_t count() const { return buffers_.size(); }
  bool intact() const {
    for (const DeviceBuffer& buffer : buffers_) {
      if (!buffer.intact()) return false;
    }
    return true;
  }

 private:
  std::list<DeviceBuffer> buffers_;
};

// A stream that does not wait for the null stream.
class Stream {
 public:
  Stream() { expect_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  void* get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

}  // namespace dsa::test
