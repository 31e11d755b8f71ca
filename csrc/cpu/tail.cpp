#include "tail.h"

#include "tail_dense.h"
#include "tail_depthwise.h"

namespace mod_kernels {

template <class T>
int64_t tail_scratch(const FeatureMap<T>& x, const ConvBlock<Accumulate<T>>& block) {
  const Tail<T> tail{x, block};
  switch (block.kind) {
    case BlockKind::kBottleneck:
      return bottleneck_scratch(tail);
    case BlockKind::kBasic:
      return basic_scratch(tail);
    case BlockKind::kInvertedResidual:
      return inverted_residual_scratch(tail);
    case BlockKind::kConv:
      return single_conv_scratch(tail);
    case BlockKind::kConvNeXt:
      return convnext_scratch(tail);
  }
  return 0;
}

template <class T>
void tail_sample(const FeatureMap<T>& x, int64_t sample, const ConvBlock<Accumulate<T>>& block,
                 const Accumulate<T>* scores, const int64_t* index, Accumulate<T>* scratch) {
  const Tail<T> tail{x, block, x.sample(sample), scores, index};
  switch (block.kind) {
    case BlockKind::kBottleneck:
      return bottleneck(tail, scratch);
    case BlockKind::kBasic:
      return basic(tail, scratch);
    case BlockKind::kInvertedResidual:
      return inverted_residual(tail, scratch);
    case BlockKind::kConv:
      return single_conv(tail, scratch);
    case BlockKind::kConvNeXt:
      return convnext(tail, scratch);
  }
}

#define MOD_KERNELS_TAIL(T)                                                                    \
  template int64_t tail_scratch<T>(const FeatureMap<T>&, const ConvBlock<Accumulate<T>>&);     \
  template void tail_sample<T>(const FeatureMap<T>&, int64_t, const ConvBlock<Accumulate<T>>&, \
                               const Accumulate<T>*, const int64_t*, Accumulate<T>*);
MOD_KERNELS_FOR_EACH_DTYPE(MOD_KERNELS_TAIL)

}  // namespace mod_kernels
