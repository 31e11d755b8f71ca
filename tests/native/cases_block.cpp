#include "block_case.h"
#include "cases.h"

namespace mod_kernels {
namespace {

constexpr struct {
  BlockKind kind;
  const char* name;
} kNamedKinds[] = {{BlockKind::kBottleneck, "bottleneck"},
                   {BlockKind::kBasic, "basic"},
                   {BlockKind::kInvertedResidual, "inverted residual"},
                   {BlockKind::kConv, "conv"},
                   {BlockKind::kConvNeXt, "convnext"}};

std::string describe(const char* kind, const BlockForm& f) {
  return spell(
      kind, " N=", f.n, " C=", f.c, " H=", f.h, " W=", f.w, " k=", f.k, " m=", f.m, " R=", f.r, " position ",
      static_cast<int>(f.position), f.layout == Layout::kChannelsLast ? " channels_last" : " NCHW",
      f.final_relu ? " final relu" : "", f.bias ? " bias" : "", f.float_weights ? " float weights" : "");
}

// 70 samples are more than a tile of them.
constexpr BlockForm kForms[] = {
    {1, 1, 1, 1, 1, 1, 1},       {3, 7, 5, 7, 7, 3, 1},     {9, 33, 3, 1, 1, 1, 5},
    {9, 64, 14, 14, 4, 2, 16},   {3, 70, 5, 7, 9, 5, 5},    {1, 160, 1, 49, 10, 6, 16},
    {3, 256, 7, 7, 16, 4, 128},  {3, 300, 1, 3, 70, 7, 16}, {9, 600, 3, 1, 8, 3, 5},
    {1, 2048, 7, 7, 32, 8, 128}, {3, 2048, 1, 1, 8, 2, 16}, {1, 70, 28, 28, 33, 5, 1},
    {1, 600, 8, 7, 66, 1, 16},   {1, 64, 28, 28, 3, 2, 5},  {70, 64, 3, 3, 4, 1, 16}};

}  // namespace

void block_cases(bool few) {
  Random random(5);
  for_each_dtype([&]<class T>() {
    for (const BlockForm& given : kForms) {
      for (Layout layout : {Layout::kNchw, Layout::kChannelsLast}) {
        if (layout == Layout::kChannelsLast && (given.c == 1 || given.hw() == 1)) continue;
        for (const auto& [kind, name] : kNamedKinds) {
          const bool dense = kind == BlockKind::kBasic || kind == BlockKind::kConv;
          // The positions are the same code for every kind: the later three take a third of them, at random.
          const bool third = few || (kind != BlockKind::kBottleneck && kind != BlockKind::kBasic);
          if (dense && given.n * given.k * given.k * given.hw() > 100000) continue;
          for (Position position : {Position::kFirst, Position::kLast, Position::kOriginal}) {
            if (few && given.n * given.c * given.hw() > 41000) continue;
            if (third && random.below(3) != 0) continue;
            BlockForm form = given;
            form.kind = kind;
            // These widen where a bottleneck narrows.
            if (kind == BlockKind::kInvertedResidual || kind == BlockKind::kConvNeXt) form.m *= 3;
            form.position = position;
            form.layout = layout;
            form.final_relu = random.coin();
            form.bias = random.coin();
            form.float_weights = random.coin();
            begin_case(spell("block, ", kName<T>, " ", describe(name, form)));
            BlockCase<T>(form, random.bits()).run();
          }
        }
      }
    }
  });
}

}  // namespace mod_kernels
