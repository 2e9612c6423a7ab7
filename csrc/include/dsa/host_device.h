// SPDX-License-Identifier: Apache-2.0
// DSA_HOST_DEVICE marks the pure functions that host and device code share.
#pragma once

#if defined(__CUDACC__)
#define DSA_HOST_DEVICE __host__ __device__
#else
#define DSA_HOST_DEVICE
#endif
