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

void* write(const Output& tensor);

// The outputs of one call, uninitialized and dense. All are made before any is written.
//
// The first comes from the dispatcher, where torch.utils.deterministic.fill_uninitialized_memory has its say:
// NaN everywhere. The dispatcher costs 0.4 us, so the others do without, and are filled here (int64 with its
// largest value, as torch does) where the first is full of NaN: the stable ABI has no way to ask for the
// setting. Memory that is full of NaN by chance costs a needless pass over them.
template <class T>
class Outputs {
 public:
  explicit Outputs(const torch::stable::Tensor& like) : like_(like.get()) {}

  // Of the accumulation dtype.
  Output empty();  // shape (0,); does not count as the first
  Output vector(int64_t count);
  Output matrix(int64_t rows, int64_t columns);
  Output indices(int64_t rows, int64_t columns);         // int64; never the first
  Output map(const FeatureMap<T>& x, int64_t channels);  // of T, in x's layout
  Output no_map();                                       // of T, shape (0,); does not count as the first

 private:
  template <class E>
  Output make(std::span<const int64_t> size, std::span<const int64_t> stride, bool channels_last);
  bool filled() const { return filled_(first_, first_count_); }

  AtenTensorHandle like_;
  const void* first_ = nullptr;
  int64_t first_count_ = -1;
  bool (*filled_)(const void* data, int64_t count) = nullptr;
};

}  // namespace mod_kernels
