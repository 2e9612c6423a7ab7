// SPDX-License-Identifier: Apache-2.0
// Counters in device memory that launches share out among their CTAs.
#pragma once

#include <cstdint>

#include "dsa/params.h"

namespace dsa::cuda {

// Of each: an array of so many stands beside a kernel, zero at first, and a launch leaves its own
// at zero.
inline constexpr std::uint32_t kLaunchCounters = 1u << 16;

// The index of a counter that no other launch has at the same time, kLaunchCounters when there is
// none for this one: all are given out, or its stream is not known. Launches on a stream come one
// after another and have the same; a captured launch has one for itself, since its graph runs on
// any stream: of several instances of one captured graph, only one may run at a time.
std::uint32_t launch_counter(const Launch& where);

}  // namespace dsa::cuda
