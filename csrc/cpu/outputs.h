// Fresh tensors for an op to return.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <span>

#include "../common/layout.h"

namespace mod_kernels {

struct DeleteTensor {
  void operator()(AtenTensorOpaque* tensor) const { aoti_torch_delete_tensor_object(tensor); }
};
// Its only reference until the op gives it away: torch::stable::Tensor would make another to return.
using Output = std::unique_ptr<AtenTensorOpaque, DeleteTensor>;

float* write(const Output& tensor);
int64_t* write_index(const Output& tensor);

// The outputs of one call, uninitialized and dense. All are made before any is written.
//
// The first comes from the dispatcher, where torch.utils.deterministic.fill_uninitialized_memory has its say:
// NaN everywhere. The dispatcher costs 0.4 us, so the others do without, and are filled here (int64 with its
// largest value, as torch does) where the first is full of NaN: the stable ABI has no way to ask for the
// setting. Memory that is full of NaN by chance costs a needless pass over them.
class Outputs {
 public:
  explicit Outputs(const torch::stable::Tensor& like) : like_(like.get()) {}

  Output empty();  // float32, shape (0,); never the first
  Output floats(int64_t rows, int64_t columns);
  Output indices(int64_t rows, int64_t columns);      // int64; never the first
  Output map(const FeatureMap& x, int64_t channels);  // float32 in x's layout

 private:
  Output floats(std::span<const int64_t> size, std::span<const int64_t> stride, bool channels_last);
  bool filled() const;

  AtenTensorHandle like_;
  const float* first_ = nullptr;
  int64_t first_count_ = -1;
};

}  // namespace mod_kernels
