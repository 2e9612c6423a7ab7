// SPDX-License-Identifier: Apache-2.0
// The result of a call through api.h. A failure is one line of text; nothing is printed, nothing
// exits.
#pragma once

#include <string>
#include <utility>

namespace dsa {

enum class StatusCode {
  kOk,
  kInvalidArgument,  // the caller's argument is wrong: Python raises ValueError
  kUnsupported,      // valid, but no kernel of this build takes it here: RuntimeError
  kInternal,         // a backend failed (CUDA error): RuntimeError
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  static Status invalid_argument(std::string message) {
    return {StatusCode::kInvalidArgument, std::move(message)};
  }
  static Status unsupported(std::string message) {
    return {StatusCode::kUnsupported, std::move(message)};
  }
  static Status internal(std::string message) {
    return {StatusCode::kInternal, std::move(message)};
  }

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

}  // namespace dsa
