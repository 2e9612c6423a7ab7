// SPDX-License-Identifier: Apache-2.0
// dsa_ext._C: what this build is and has. No tensors pass through here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "cpu/simd/microkernels.h"
#include "dispatch/registry.h"
#include "dsa/kv_layout.h"
#if DSA_WITH_CUDA
#include "cuda/common/device_info.h"
#endif

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = DSA_VERSION;
  info["compiler"] = DSA_COMPILER;
  info["torch"] = DSA_BUILD_TORCH;
  info["cpu_isa"] = dsa::cpu::microkernels().isa;
#if DSA_WITH_CUDA
  info["cuda"] = dsa::cuda::toolkit_version();
  info["cuda_archs"] = DSA_CUDA_ARCHS;
#else
  info["cuda"] = py::none();
  info["cuda_archs"] = py::none();
#endif
  return info;
}

py::list cuda_devices() {
  py::list devices;
#if DSA_WITH_CUDA
  for (const auto& device : dsa::cuda::device_infos()) {
    py::dict entry;
    entry["name"] = device.name;
    entry["arch"] = device.arch;
    entry["num_sms"] = device.num_sms;
    devices.append(entry);
  }
#endif
  return devices;
}

py::list kernels() {
  py::list all;
  for (const dsa::KernelInfo& kernel : dsa::list_kernels()) {
    py::dict entry;
    entry["op"] = kernel.op;
    entry["id"] = kernel.id;
    entry["device"] = kernel.target.type == dsa::DeviceType::kCpu ? "cpu" : "cuda";
    entry["takes"] = kernel.takes;
    all.append(entry);
  }
  return all;
}

std::string kernel_refusal(const std::string& id, int device) {
  for (const dsa::KernelInfo& kernel : dsa::list_kernels()) {
    if (kernel.id == id) {
      return dsa::runs_on(kernel.target, {dsa::DeviceType::kCuda, device}).reason;
    }
  }
  throw py::value_error("kernel_refusal: id: expected one of kernels(), got " + id);
}

template <typename Layout>
py::dict mla_layout() {
  py::dict layout;
  layout["d_nope"] = Layout::kDimNope;
  layout["d_rope"] = Layout::kDimRope;
  layout["d_v"] = Layout::kDimV;
  layout["group"] = Layout::kGroup;
  layout["token_bytes"] = Layout::kTokenBytes;
  return layout;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What this build of dsa_ext is and has; see dsa_ext for the ops.";
  m.def("build_info", &build_info, "Version, compiler, torch, CPU instruction set, CUDA toolkit.");
  m.def("cuda_devices", &cuda_devices, "CUDA devices this process sees: name, arch, num_sms.");
  m.def("kernels", &kernels, "Every kernel of this build: op, id, device, takes.");
  m.def("kernel_refusal", &kernel_refusal, py::arg("id"), py::arg("device"),
        "Why a CUDA device cannot run a kernel, whatever the arguments; empty if it can.");

  m.attr("MAX_WORKSPACE_BYTES") = dsa::kMaxWorkspaceBytes;
  m.attr("INDEXER_SCALE_BYTES") = dsa::IndexerLayout::kScaleBytes;
  m.attr("MLA_V32") = mla_layout<dsa::MlaV32Layout>();
  m.attr("MLA_V4") = mla_layout<dsa::MlaV4Layout>();
  m.attr("MLA_V4_PAGE_STRIDE_ALIGN") = dsa::MlaV4Layout::kPageStrideAlign;
}
