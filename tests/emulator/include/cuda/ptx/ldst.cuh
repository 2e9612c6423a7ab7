// SPDX-License-Identifier: Apache-2.0
// Shared-memory addresses are bytes from the CTA's first.
#pragma once

namespace dsa::cuda::ptx {

inline std::uint32_t shared_address(const void* pointer) {
  const auto offset = static_cast<const std::uint8_t*>(pointer) - emulator::shared_memory();
  if (offset < 0 || offset >= static_cast<std::ptrdiff_t>(emulator::kSharedBytes)) {
    emulator::fail("not an address of shared memory");
  }
  return static_cast<std::uint32_t>(offset);
}
inline std::uint8_t* shared_pointer(std::uint32_t address, std::uint32_t bytes) {
  if (address % bytes != 0) emulator::fail("a misaligned address of shared memory");
  if (address + bytes > emulator::kSharedBytes) emulator::fail("outside of shared memory");
  return emulator::shared_memory() + address;
}
template <typename T>
T& pinned_in_shared(void* pointer) {
  return *static_cast<T*>(pointer);
}

inline constexpr std::uint32_t kMatrixRow = 16;  // bytes

// Words of a lane of kCount 8 x 8 matrices of 16-bit elements, whose rows' addresses lanes bring.
template <int kCount, bool kTransposed>
void load_matrices(std::uint32_t (&r)[kCount], std::uint32_t address) {
  const auto& addresses = emulator::exchange(address);
  const int lane = emulator::thread_index() % 32;
  for (int i = 0; i < kCount; ++i) {
    std::uint16_t halves[2];
    for (int k = 0; k < 2; ++k) {
      const int row = kTransposed ? lane % 4 * 2 + k : lane / 4;
      const int column = kTransposed ? lane / 4 : lane % 4 * 2 + k;
      const auto from =
          static_cast<std::uint32_t>(addresses[static_cast<std::size_t>(8 * i + row)]);
      std::memcpy(&halves[k], shared_pointer(from, kMatrixRow) + 2 * column, 2);
    }
    r[i] = halves[0] | std::uint32_t{halves[1]} << 16;
  }
  emulator::exchange(0);  // what lanes read is not overwritten by those ahead
}
template <int kCount, bool kTransposed>
void store_matrices(std::uint32_t address, const std::uint32_t (&r)[kCount]) {
  const auto addresses = emulator::exchange(address);
  const int lane = emulator::thread_index() % 32;
  for (int i = 0; i < kCount; ++i) {
    for (int k = 0; k < 2; ++k) {
      const int row = kTransposed ? lane % 4 * 2 + k : lane / 4;
      const int column = kTransposed ? lane / 4 : lane % 4 * 2 + k;
      const auto to = static_cast<std::uint32_t>(addresses[static_cast<std::size_t>(8 * i + row)]);
      const auto half = static_cast<std::uint16_t>(r[i] >> 16 * k);
      std::memcpy(shared_pointer(to, kMatrixRow) + 2 * column, &half, 2);
    }
  }
  emulator::exchange(0);
}

inline void ldmatrix_x4(std::uint32_t (&r)[4], std::uint32_t address) {
  load_matrices<4, false>(r, address);
}
inline void ldmatrix_x4_trans(std::uint32_t (&r)[4], std::uint32_t address) {
  load_matrices<4, true>(r, address);
}
inline void stmatrix_x4(std::uint32_t address, const std::uint32_t (&r)[4]) {
  store_matrices<4, false>(address, r);
}
inline void stmatrix_x4_trans(std::uint32_t address, std::uint32_t r0, std::uint32_t r1,
                              std::uint32_t r2, std::uint32_t r3) {
  store_matrices<4, true>(address, {r0, r1, r2, r3});
}
inline void stmatrix_x2_trans(std::uint32_t address, std::uint32_t r0, std::uint32_t r1) {
  store_matrices<2, true>(address, {r0, r1});
}

inline void fence_async_shared() {}
inline void prefetch_l2(const void*) {}

}  // namespace dsa::cuda::ptx
