// The cases, by what they call. `few` is for an emulator: a part of them, and none that is large.
#pragma once

namespace mod_kernels {

void conversion_cases(bool few);  // common/dtype.h, cpu/storage.h
void pool_cases(bool few);        // pool.h
void linear_cases(bool few);      // linear.h
void top_k_cases(bool few);       // top_k.h
void fuse_cases(bool few);        // fuse.h
void gelu_cases(bool few);        // gelu.h
void block_cases(bool few);       // block.h, and tail.h with it
void backward_cases(bool few);    // fuse_backward.h, select_backward.h, input_gradient.h
void training_cases(bool few);    // conv_training.h

}  // namespace mod_kernels
