// SPDX-License-Identifier: Apache-2.0
// Random operands and ways to run parallel_for, for the tests of the CPU backend.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "core/fp8.h"
#include "core/half.h"
#include "dsa/parallel.h"
#include "dsa/params.h"

namespace dsa::test {

inline constexpr float kInf = std::numeric_limits<float>::infinity();
inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
inline constexpr std::int32_t kIntMin = std::numeric_limits<std::int32_t>::min();
inline constexpr std::int32_t kIntMax = std::numeric_limits<std::int32_t>::max();

class Random {
 public:
  explicit Random(std::uint32_t seed) : engine_(seed) {}

  float uniform(float low, float high) {
    return std::uniform_real_distribution<float>(low, high)(engine_);
  }
  std::int32_t integer(std::int32_t low, std::int32_t high) {  // both ends included
    return std::uniform_int_distribution<std::int32_t>(low, high)(engine_);
  }
  std::vector<float> floats(std::int64_t n, float low = -1.0f, float high = 1.0f) {
    std::vector<float> v(static_cast<std::size_t>(n));
    for (float& x : v) x = uniform(low, high);
    return v;
  }
  std::vector<std::uint8_t> e4m3(std::int64_t n) {
    std::vector<std::uint8_t> v(static_cast<std::size_t>(n));
    for (std::uint8_t& x : v) x = e4m3_encode(uniform(-4.0f, 4.0f));
    return v;
  }
  std::vector<std::uint16_t> half(std::int64_t n, DType dtype) {
    std::vector<std::uint16_t> v(static_cast<std::size_t>(n));
    for (std::uint16_t& x : v) {
      const float value = uniform(-1.0f, 1.0f);
      x = dtype == DType::kFloat16 ? f16_from_float(value) : bf16_from_float(value);
    }
    return v;
  }

 private:
  std::mt19937 engine_;
};

inline float half_to_float(std::uint16_t code, DType dtype) {
  return dtype == DType::kFloat16 ? f16_to_float(code) : bf16_to_float(code);
}

template <typename T>
void write_bytes(std::vector<std::uint8_t>& bytes, std::int64_t at, T value) {
  std::memcpy(bytes.data() + at, &value, sizeof(value));
}

// Runs everything on the calling thread while it lives.
class Serially {
 public:
  Serially() {
    set_parallel_for([](std::int64_t begin, std::int64_t end, std::int64_t, RangeBody body,
                        void* context) { body(begin, end, context); });
  }
  ~Serially() { set_parallel_for(nullptr); }
};

// Runs every index in a thread of its own while it lives.
class AllAtOnce {
 public:
  AllAtOnce() {
    set_parallel_for(
        [](std::int64_t begin, std::int64_t end, std::int64_t, RangeBody body, void* context) {
          std::vector<std::thread> threads;
          for (std::int64_t i = begin; i < end; ++i) threads.emplace_back(body, i, i + 1, context);
          for (std::thread& thread : threads) thread.join();
        });
  }
  ~AllAtOnce() { set_parallel_for(nullptr); }
};

// d = 1 - 2<x,y> / (<x,x> + <y,y>) over the finite values; other values must be alike (false if
// not).
class Difference {
 public:
  bool add(float got, double expected) {
    if (std::isnan(expected) || std::isnan(got)) return std::isnan(expected) && std::isnan(got);
    if (std::isinf(expected) || std::isinf(got)) return static_cast<double>(got) == expected;
    xy_ += got * expected;
    norms_ += static_cast<double>(got) * got + expected * expected;
    return true;
  }
  double value() const { return norms_ == 0.0 ? 0.0 : 1.0 - 2.0 * xy_ / norms_; }

 private:
  double xy_ = 0.0;
  double norms_ = 0.0;
};

}  // namespace dsa::test
