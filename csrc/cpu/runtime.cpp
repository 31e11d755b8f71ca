#include "runtime.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace mod_kernels {

int64_t thread_count() { return torch::stable::get_num_threads(); }

int64_t thread_index() {
  uint32_t index = 0;
  TORCH_ERROR_CODE_CHECK(torch_get_thread_idx(&index));
  return index;
}

void run_parallel(int64_t count, void (*work)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { work(context, begin, end); });
}

// A tensor of bytes, which never passes through the dispatcher: a third of the cost.
Scratch::Scratch(int64_t bytes) {
  const int64_t stride = 1;
  AtenTensorHandle tensor = nullptr;
  void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &bytes, &stride, aoti_torch_dtype_uint8(),
                                                  aoti_torch_device_type_cpu(), 0, &tensor));
  TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(tensor, &data));
  owner_ = tensor;
  data_ = static_cast<char*>(data);
}

Scratch::~Scratch() { aoti_torch_delete_tensor_object(static_cast<AtenTensorHandle>(owner_)); }

}  // namespace mod_kernels
