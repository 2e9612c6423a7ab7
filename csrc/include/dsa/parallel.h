// SPDX-License-Identifier: Apache-2.0
// Who runs the CPU backend's loops. By default std::thread; a host framework installs its own pool
// (the torch ops install torch's, so that torch.set_num_threads holds).
#pragma once

#include <cstdint>
#include <type_traits>

namespace dsa {

using RangeBody = void (*)(std::int64_t begin, std::int64_t end, void* context);
// Splits [begin, end) into ranges of at least `grain` and calls body on each, possibly at once.
using ParallelForFn = void (*)(std::int64_t begin, std::int64_t end, std::int64_t grain,
                               RangeBody body, void* context);

// nullptr restores the default. Not to be called while an op runs.
void set_parallel_for(ParallelForFn fn);
void parallel_for(std::int64_t begin, std::int64_t end, std::int64_t grain, RangeBody body,
                  void* context);

template <typename F>
void parallel_for(std::int64_t begin, std::int64_t end, std::int64_t grain, F&& body) {
  parallel_for(
      begin, end, grain,
      [](std::int64_t b, std::int64_t e, void* context) {
        (*static_cast<std::remove_reference_t<F>*>(context))(b, e);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace dsa
