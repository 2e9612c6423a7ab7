// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <array>
#include <numeric>
#include <vector>

#include "core/fp8.h"
#include "cuda/ptx/ldst.cuh"

namespace dsa::cuda::ptx {

template <int kRegisters>
void set_max_registers_up() {}
template <int kRegisters>
void set_max_registers_down() {}

inline void wgmma_fence() {}
inline void wgmma_commit() { emulator::wgmma_commit(); }
template <int kPending>
void wgmma_wait() {
  emulator::wgmma_wait(kPending);
}
template <int kRegisters>
void wgmma_result(float (&)[kRegisters]) {}

// In shared memory: rows of the operand, or, with block_bytes, rows of k, of 64 elements, and as
// far from 64 rows of the operand to the next.
struct SharedOperand {
  std::uint32_t address;
  std::uint32_t row_bytes;  // and the swizzle as wide
  std::uint32_t block_bytes = 0;

  const std::uint8_t* at(int row, int k, std::uint32_t element_bytes) const {
    const auto r = static_cast<std::uint32_t>(row), c = static_cast<std::uint32_t>(k);
    std::uint32_t byte =
        block_bytes == 0 ? address + r * row_bytes + c * element_bytes
                         : address + r / 64 * block_bytes + c * row_bytes + r % 64 * element_bytes;
    byte ^= byte / 128 % (row_bytes / 16) * 16;
    return shared_pointer(byte, element_bytes);
  }
};

template <int kRowBytes>
class WgmmaDescriptor {
 public:
  explicit WgmmaDescriptor(const void* shared) : address_(shared_address(shared)) {
    if (address_ % (8 * kRowBytes) != 0) emulator::fail("a misaligned operand of wgmma");
  }
  WgmmaDescriptor operator+(std::uint32_t bytes) const {
    WgmmaDescriptor moved = *this;
    moved.address_ += bytes;
    return moved;
  }
  SharedOperand operand() const { return {address_, kRowBytes}; }

 private:
  std::uint32_t address_;
};

class WgmmaRowsDescriptor {
 public:
  WgmmaRowsDescriptor(const void* shared, std::uint32_t block_bytes)
      : address_(shared_address(shared)), block_bytes_(block_bytes) {
    if (address_ % 1024 != 0) emulator::fail("a misaligned operand of wgmma");
  }
  WgmmaRowsDescriptor operator+(std::uint32_t bytes) const {
    WgmmaRowsDescriptor moved = *this;
    moved.address_ += bytes;
    return moved;
  }
  SharedOperand operand() const { return {address_, 128, block_bytes_}; }

 private:
  std::uint32_t address_, block_bytes_;
};

struct E4m3 {
  std::uint8_t code;
  explicit operator float() const { return e4m3_decode(code); }
};

template <typename Element>
float to_float(const void* from) {
  Element x;
  std::memcpy(&x, from, sizeof(x));
  return static_cast<float>(x);
}

// D [64, columns] (+)= A [64, k] B [k, columns], k of 32 bytes; A from shared memory, or 16-bit
// from registers.
template <typename Element>
void multiply(const emulator::Product& product, const SharedOperand* shared_a,
              const SharedOperand& shared_b, int columns, bool accumulate) {
  constexpr int kRows = 64, kDepth = 32 / sizeof(Element);
  const auto registers_a = [&](int row, int k) {
    const auto thread = static_cast<std::size_t>(row / 16 * 32 + row % 8 * 4 + k % 8 / 2);
    const auto word = static_cast<std::size_t>(row / 8 % 2 + k / 8 * 2);
    return reinterpret_cast<const std::uint16_t*>(&product.threads[thread].a[word]) + k % 2;
  };
  std::vector<std::array<float, kDepth>> a(kRows), b(static_cast<std::size_t>(columns));
  for (int k = 0; k < kDepth; ++k) {
    for (int row = 0; row < kRows; ++row) {
      const void* from = registers_a(row, k);
      if (shared_a != nullptr) from = shared_a->at(row, k, sizeof(Element));
      a[static_cast<std::size_t>(row)][static_cast<std::size_t>(k)] = to_float<Element>(from);
    }
    for (int column = 0; column < columns; ++column) {
      b[static_cast<std::size_t>(column)][static_cast<std::size_t>(k)] =
          to_float<Element>(shared_b.at(column, k, sizeof(Element)));
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < columns; ++column) {
      const auto thread = static_cast<std::size_t>(row / 16 * 32 + row % 8 * 4 + column % 8 / 2);
      float& d = product.threads[thread].d[column / 8 * 4 + row / 8 % 2 * 2 + column % 2];
      d = std::inner_product(a[static_cast<std::size_t>(row)].begin(),
                             a[static_cast<std::size_t>(row)].end(),
                             b[static_cast<std::size_t>(column)].begin(), accumulate ? d : 0.0f);
    }
  }
}

template <typename Element, int kRegisters>
void issue(float (&d)[kRegisters], const std::uint32_t (&a)[4], SharedOperand b, bool accumulate) {
  emulator::wgmma_issue({d, {a[0], a[1], a[2], a[3]}}, [=](const emulator::Product& product) {
    multiply<Element>(product, nullptr, b, 2 * kRegisters, accumulate);
  });
}
template <typename Element, int kRegisters>
void issue(float (&d)[kRegisters], SharedOperand a, SharedOperand b, bool accumulate) {
  emulator::wgmma_issue({d, {}}, [=](const emulator::Product& product) {
    multiply<Element>(product, &a, b, 2 * kRegisters, accumulate);
  });
}

template <int kRowBytes, int kRegisters>
void wgmma_e4m3(float (&d)[kRegisters], WgmmaDescriptor<kRowBytes> a, WgmmaDescriptor<kRowBytes> b,
                bool accumulate) {
  issue<E4m3>(d, a.operand(), b.operand(), accumulate);
}
template <typename Element, int kRowBytes, int kRegisters>
void wgmma_16_bit(float (&d)[kRegisters], const std::uint32_t (&a)[4], WgmmaDescriptor<kRowBytes> b,
                  bool accumulate) {
  issue<Element>(d, a, b.operand(), accumulate);
}
template <typename Element>
void wgmma_16_bit(float (&d)[32], WgmmaDescriptor<128> a, WgmmaDescriptor<128> b, bool accumulate) {
  issue<Element>(d, a.operand(), b.operand(), accumulate);
}
template <typename Element, int kRegisters>
void wgmma_few(float (&d)[kRegisters], WgmmaDescriptor<128> a, WgmmaDescriptor<128> b,
               bool accumulate) {
  issue<Element>(d, a.operand(), b.operand(), accumulate);
}
template <typename Element, int kRegisters>
void wgmma_few(float (&d)[kRegisters], WgmmaRowsDescriptor a, WgmmaDescriptor<128> b,
               bool accumulate) {
  issue<Element>(d, a.operand(), b.operand(), accumulate);
}
template <typename Element>
void wgmma_rows(float (&d)[64], WgmmaDescriptor<128> a, WgmmaRowsDescriptor b) {
  issue<Element>(d, a.operand(), b.operand(), true);
}
template <typename Element>
void wgmma_rows(float (&d)[64], const std::uint32_t (&a)[4], WgmmaRowsDescriptor b) {
  issue<Element>(d, a, b.operand(), true);
}

}  // namespace dsa::cuda::ptx
