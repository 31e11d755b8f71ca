// The ops on whole maps on a GPU. No torch, no CUDA headers.
#pragma once

#include "../common/dtype.h"
#include "map_parameters.h"

namespace mod_kernels {

// Each puts one kernel on `stream` (a cudaStream_t) of the current device, and waits for nothing. Null, or
// what went wrong, in words that stay. `grid` of the parameters is set on the way. layout: of all maps but a
// NarrowMap; nothing of kDouble. max_cluster: blocks to a cluster, at most; 1: the device has none.
const char* launch_gather_channels(const GatherChannels& parameters, DType dtype, Layout layout,
                                   void* stream);
const char* launch_fuse_channels(const FuseChannels& parameters, DType dtype, Layout layout, void* stream);
const char* launch_add_relu_pool(const AddReluPool& parameters, DType dtype, Layout layout, int max_cluster,
                                 void* stream);
const char* launch_input_gradient(const InputGradient& parameters, DType dtype, Layout layout, void* stream);

}  // namespace mod_kernels
