// A position by the name that an op gets.
#pragma once

#include <string_view>

#include "block_form.h"
#include "check.h"

namespace mod_kernels {

inline Position position_of(std::string_view name) {
  if (name == "first") return Position::kFirst;
  if (name == "last") return Position::kLast;
  require(name == "original", "position must be 'first', 'last' or 'original', got '", name, "'");
  return Position::kOriginal;
}

}  // namespace mod_kernels
