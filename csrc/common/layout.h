// How a feature map lies in memory. The rules are those of mod_kernels/_layout.py, kept free of torch.
#pragma once

#include <cstdint>

namespace mod_kernels {

enum class Layout { kNchw, kChannelsLast, kOther };

// A tensor that fits both (C = 1 or H*W = 1) counts as NCHW. Samples may be any distance apart that does not
// overlap; strides of dimensions of size 1 do not matter.
inline Layout layout_of(const int64_t* size, const int64_t* stride) {
  const int64_t n = size[0], c = size[1], h = size[2], w = size[3];
  if (n == 0 || c * h * w == 0) return Layout::kNchw;
  if (n > 1 && stride[0] < c * h * w) return Layout::kOther;
  const auto fits = [](int64_t extent, int64_t got, int64_t expected) {
    return extent == 1 || got == expected;
  };
  if (fits(c, stride[1], h * w) && fits(h, stride[2], w) && fits(w, stride[3], 1)) return Layout::kNchw;
  if (fits(c, stride[1], 1) && fits(h, stride[2], w * c) && fits(w, stride[3], c)) {
    return Layout::kChannelsLast;
  }
  return Layout::kOther;
}

// A feature map (N, C, H, W) of T, every sample dense in NCHW or channels_last order.
template <class T>
struct FeatureMap {
  T* data = nullptr;
  int64_t n = 0, c = 0, h = 0, w = 0;
  int64_t stride_n = 0;
  Layout layout = Layout::kNchw;

  int64_t hw() const { return h * w; }
  int64_t sample_size() const { return c * h * w; }
  T* sample(int64_t i) const { return data + i * stride_n; }
  bool channels_last() const { return layout == Layout::kChannelsLast; }
  // Distance between neighbouring channels, and between neighbouring pixels.
  int64_t stride_c() const { return channels_last() ? 1 : hw(); }
  int64_t stride_p() const { return channels_last() ? c : 1; }
};

}  // namespace mod_kernels
