// Which channels of a map a block's result is added to.
#pragma once

#include <string_view>

#include "check.h"

namespace mod_kernels {

// The first k, the last k, or those that were gathered.
enum class Position { kFirst, kLast, kOriginal };

inline Position position_of(std::string_view name) {
  if (name == "first") return Position::kFirst;
  if (name == "last") return Position::kLast;
  require(name == "original", "position must be 'first', 'last' or 'original', got '", name, "'");
  return Position::kOriginal;
}

}  // namespace mod_kernels
