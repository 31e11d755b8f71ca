// The narrowed conv blocks: their kinds, the form an op names one by, and where each weight lies.
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string_view>
#include <system_error>

#include "block_form.h"
#include "check.h"
#include "position.h"

namespace mod_kernels {

// Weights are dense OIHW, in order of use:
//   kBottleneck        1x1 (m, k), 3x3 (m, m), 1x1 (k, m); ReLU after the first two
//   kBasic             3x3 (k, k), 3x3 (k, k); ReLU after the first
//   kInvertedResidual  1x1 (m, k), depthwise 3x3 (m), 1x1 (k, m); ReLU6 after the first two
//   kConv              3x3 (k, k)
//   kConvNeXt          depthwise 7x7 (k), layer norm over the channels of a pixel, 1x1 (m, k), exact GELU,
//                      1x1 (k, m)
// m is read where it stands above. final_relu adds a ReLU after the last.
template <class A>
struct ConvBlock {
  BlockKind kind = BlockKind::kBottleneck;
  bool final_relu = false;
  Position position = Position::kFirst;
  int64_t k = 0, m = 0;
  const A* weight[3] = {};
  const A* bias[3] = {};
};

// What a form says: "bottleneck:8:relu:first" (mod_kernels/spec.py).
struct Form {
  std::string_view kind;
  int64_t mid_channels = 0;
  bool final_relu = false;
  Position position = Position::kFirst;
};

inline Form read_form(std::string_view form) {
  std::array<std::string_view, 4> parts;
  std::string_view rest = form;
  require(std::count(form.begin(), form.end(), ':') == std::ssize(parts) - 1,
          "form must be kind:mid_channels:relu or linear:position, got '", form, "'");
  for (std::string_view& part : parts) {
    part = rest.substr(0, rest.find(':'));
    rest.remove_prefix(std::min(part.size() + 1, rest.size()));
  }
  const auto [kind, mid_channels, ending, position] = parts;
  Form read{kind};
  const char* end = mid_channels.data() + mid_channels.size();
  const auto [stopped, error] = std::from_chars(mid_channels.data(), end, read.mid_channels);
  require(error == std::errc() && stopped == end && read.mid_channels >= 0,
          "mid_channels must be a whole number, got '", mid_channels, "' in form '", form, "'");
  read.final_relu = ending == "relu";
  require(read.final_relu || ending == "linear",
          "the last convolution must be followed by 'relu' or 'linear', got '", ending, "' in form '", form,
          "'");
  read.position = position_of(position);
  return read;
}

struct ConvSize {
  int64_t outputs = 0, weights = 0;  // weights of each output
};

using Sizes = std::array<ConvSize, 3>;

// A kind of conv block, and the sizes of its convolutions given k and m (CONV_KINDS of mod_kernels/spec.py).
struct Kind {
  std::string_view name;
  BlockKind kind;
  bool has_mid;  // m comes with the form; else it is k
  Sizes (*sizes)(int64_t k, int64_t m);
};
inline constexpr Kind kKinds[] = {
    {"bottleneck", BlockKind::kBottleneck, true,
     [](int64_t k, int64_t m) -> Sizes { return {{{m, k}, {m, 9 * m}, {k, m}}}; }},
    {"basic", BlockKind::kBasic, false,
     [](int64_t k, int64_t) -> Sizes { return {{{k, 9 * k}, {k, 9 * k}}}; }},
    {"inverted_residual", BlockKind::kInvertedResidual, true,
     [](int64_t k, int64_t m) -> Sizes { return {{{m, k}, {m, 9}, {k, m}}}; }},
    {"conv", BlockKind::kConv, false, [](int64_t k, int64_t) -> Sizes { return {{{k, 9 * k}}}; }},
    {"convnext", BlockKind::kConvNeXt, true,
     [](int64_t k, int64_t m) -> Sizes { return {{{k, 49}, {m, k}, {k, m}}}; }},
};

inline const Kind& kind_of(std::string_view name) {
  const Kind* found =
      std::find_if(std::begin(kKinds), std::end(kKinds), [&](const Kind& kind) { return kind.name == name; });
  require(found != std::end(kKinds),
          "kind must be 'bottleneck', 'basic', 'inverted_residual', 'conv' or 'convnext', got '", name, "'");
  return *found;
}

// The block of a form, with its packed parameters: of each convolution in turn weight and bias. Their number
// keeps the kernels inside.
template <class A>
ConvBlock<A> conv_block(const A* parameters, int64_t size, std::string_view form, int64_t k) {
  const auto [name, mid_channels, final_relu, position] = read_form(form);
  const Kind& kind = kind_of(name);
  if (kind.has_mid) {
    require(mid_channels >= 1 && mid_channels <= size,
            "mid_channels must be between 1 and the size of conv_parameters, got ", mid_channels);
  }
  ConvBlock<A> block{kind.kind, final_relu, position, k, kind.has_mid ? mid_channels : k};
  const Sizes sizes = kind.sizes(k, block.m);
  int64_t needed = 0;
  for (const auto [outputs, weights] : sizes) needed += outputs * (weights + 1);
  require(size == needed, "conv_parameters of a ", name, " with k=", k, " and mid_channels=", mid_channels,
          " must be ", needed, " values, got ", size);
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    const auto [outputs, weights] = sizes[i];
    block.weight[i] = parameters;
    block.bias[i] = parameters + outputs * weights;
    parameters += outputs * (weights + 1);
  }
  return block;
}

}  // namespace mod_kernels
