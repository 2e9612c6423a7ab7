// SPDX-License-Identifier: Apache-2.0
// A CUtensorMap holds a ByteTensor (tensor_map.cpp here).
#pragma once

#include <cuda.h>

#include "cuda/common/tensor_map.h"
#include "cuda/ptx/mbarrier.cuh"

namespace dsa::cuda::ptx {

inline bool elect_one() {
  emulator::exchange(0);  // all lanes are there
  return emulator::thread_index() % 32 == 0;
}
inline void prefetch_tensor_map(const CUtensorMap&) {}

inline void check_inside(const void* shared, std::uint32_t bytes) {
  if (shared_address(shared) + bytes > emulator::kSharedBytes) {
    emulator::fail("a copy past shared memory");
  }
}

// A box, swizzled as wide as its rows: what is outside the tensor is zeros.
inline void load_box(std::uint8_t* shared, const ByteTensor& tensor, const std::int32_t (&at)[4]) {
  const std::uint32_t width = static_cast<std::uint32_t>(tensor.box[0]);
  const auto inside = [&](int dim, std::int64_t index) {
    return index >= 0 && index < tensor.size[dim];
  };
  std::int32_t box[4] = {1, 1, 1, 1};
  std::copy_n(tensor.box, tensor.rank, box);
  std::uint32_t to = shared_address(shared);
  for (int z = 0; z < box[3]; ++z) {
    for (int y = 0; y < box[2]; ++y) {
      for (int x = 0; x < box[1]; ++x, to += width) {
        const std::int64_t row[4] = {0, at[1] + x, at[2] + y, at[3] + z};
        std::int64_t offset = 0;
        bool is_inside = true;
        for (int dim = 1; dim < tensor.rank; ++dim) {
          is_inside &= inside(dim, row[dim]);
          offset += row[dim] * tensor.stride[dim - 1];
        }
        for (std::uint32_t chunk = 0; chunk < width / 16; ++chunk) {
          const std::uint32_t address = to + 16 * chunk;
          auto* chunk_to =
              emulator::shared_memory() + (address ^ (address / 128 % (width / 16)) * 16);
          for (std::uint32_t i = 0; i < 16; ++i) {
            const std::int64_t byte = at[0] + static_cast<std::int64_t>(16 * chunk + i);
            const auto* data = static_cast<const std::uint8_t*>(tensor.data);
            chunk_to[i] = is_inside && inside(0, byte) ? data[offset + byte] : 0;
          }
        }
      }
    }
  }
}

inline void tma_load(void* shared, const CUtensorMap& map, Mbarrier& barrier, std::int32_t c0,
                     std::int32_t c1, std::int32_t c2 = 0, std::int32_t c3 = 0) {
  ByteTensor tensor;
  std::memcpy(&tensor, &map, sizeof(tensor));
  std::uint32_t bytes = 1;
  for (int dim = 0; dim < tensor.rank; ++dim) bytes *= static_cast<std::uint32_t>(tensor.box[dim]);
  auto* to = static_cast<std::uint8_t*>(shared);
  const auto eight_rows = static_cast<std::uint32_t>(tensor.box[0]) * 8;
  if (shared_address(to) % eight_rows != 0) emulator::fail("a misaligned tensor copy");
  check_inside(to, bytes);
  emulator::poison(to, bytes);
  emulator::bulk_copy(barrier, bytes, [=] { load_box(to, tensor, {c0, c1, c2, c3}); });
}
inline void tma_load_once(void* shared, const CUtensorMap& map, Mbarrier& barrier, std::int32_t c0,
                          std::int32_t c1, std::int32_t c2) {
  tma_load(shared, map, barrier, c0, c1, c2);
}

inline void bulk_load(void* shared, const void* global, std::uint32_t bytes, Mbarrier& barrier) {
  if ((shared_address(shared) | reinterpret_cast<std::uintptr_t>(global) | bytes) % 16 != 0) {
    emulator::fail("a misaligned bulk copy");
  }
  check_inside(shared, bytes);
  emulator::poison(shared, bytes);
  emulator::bulk_copy(barrier, bytes, [=] { std::memcpy(shared, global, bytes); });
}
inline void bulk_load_once(void* shared, const void* global, std::uint32_t bytes,
                           Mbarrier& barrier) {
  bulk_load(shared, global, bytes, barrier);
}

}  // namespace dsa::cuda::ptx
