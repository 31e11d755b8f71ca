// Refusals: a RuntimeError in Python whose words are ours alone.
#pragma once

#include <sstream>
#include <stdexcept>

namespace mod_kernels {

// Throws what `words` spell, one after the other, unless `holds`. STD_TORCH_CHECK would put the function and
// the path of the source on the machine that built the library before them.
template <class... Words>
inline void require(bool holds, const Words&... words) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << words);
  throw std::runtime_error(message.str());
}

}  // namespace mod_kernels
