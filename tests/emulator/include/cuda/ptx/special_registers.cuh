// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace dsa::cuda::ptx {

inline int thread_index() { return emulator::thread_index(); }
inline std::uint32_t cta_x() { return emulator::cta_index().x; }
inline std::uint32_t cta_y() { return emulator::cta_index().y; }

}  // namespace dsa::cuda::ptx
