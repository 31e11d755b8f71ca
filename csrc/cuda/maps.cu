// Launches of launch_maps.h.
#include <cuda_runtime.h>

#include <cstdint>

#include "launch_maps.h"
#include "map_ops.h"

namespace mod_kernels {
namespace {

struct OnStream {
  void* stream;

  template <class P>
  const char* operator()(const MapLaunch& launch, void (*kernel)(P), const P& parameters) const {
    if (launch.blocks > INT32_MAX) return "a map must be taken by fewer than 2^31 blocks";
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = launch.cluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(launch.blocks));
    config.blockDim = dim3(launch.threads);
    config.dynamicSmemBytes = launch.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &cluster;
    config.numAttrs = launch.cluster > 1 ? 1 : 0;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, parameters);
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();  // it is said here, and must not be found by whoever looks next
    return cudaGetErrorName(error);
  }
};

template <class F>
const char* for_dtype(DType dtype, const F& call) {
  switch (dtype) {
    case DType::kHalf:
      return call.template operator()<Half>();
    case DType::kBFloat16:
      return call.template operator()<BFloat16>();
    case DType::kFloat:
      return call.template operator()<float>();
    case DType::kDouble:
      break;
  }
  return "the CUDA kernels take float16, bfloat16 and float32";
}

}  // namespace

const char* launch_gather_channels(const GatherChannels& parameters, DType dtype, Layout layout,
                                   void* stream) {
  return for_dtype(dtype,
                   [&]<class T>() { return gather_channels<T>(parameters, layout, OnStream{stream}); });
}

const char* launch_fuse_channels(const FuseChannels& parameters, DType dtype, Layout layout, void* stream) {
  return for_dtype(dtype, [&]<class T>() { return fuse_channels<T>(parameters, layout, OnStream{stream}); });
}

const char* launch_add_relu_pool(const AddReluPool& parameters, DType dtype, Layout layout, int max_cluster,
                                 void* stream) {
  return for_dtype(
      dtype, [&]<class T>() { return add_relu_pool<T>(parameters, layout, max_cluster, OnStream{stream}); });
}

const char* launch_input_gradient(const InputGradient& parameters, DType dtype, Layout layout, void* stream) {
  return for_dtype(dtype, [&]<class T>() { return input_gradient<T>(parameters, layout, OnStream{stream}); });
}

}  // namespace mod_kernels
