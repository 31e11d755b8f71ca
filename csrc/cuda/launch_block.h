// mod_block(_) and select_channels(_saving) on a GPU. No torch, no CUDA headers.
#pragma once

#include "block_call.h"
#include "plan.h"

namespace mod_kernels {

// Of the current device, asked for once.
const Architecture& current_architecture();

// Puts a plan's launches on `stream` (a cudaStream_t) of the current device, and waits for nothing.
// workspace: plan.workspace_bytes of the device's memory, beginning at a multiple of 256. Null, or what went
// wrong, in words that stay.
const char* launch_block(const BlockPlan& plan, void* workspace, void* stream);

}  // namespace mod_kernels
