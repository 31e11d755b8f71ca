// The block's kernels for each dtype, and their launches.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <mutex>

#include "launch_block.h"
#include "mod_block.cuh"

namespace mod_kernels {
namespace {

constexpr int kMostDevices = 64, kOrdinarySharedBytes = 48 * 1024, kPortableCluster = 8;

// Asks once a device for what a kernel needs beyond what every launch has.
template <bool kClusters>
cudaError_t allow(const void* kernel, std::atomic<uint64_t>& allowed, const Architecture& device) {
  int ordinal = 0;
  if (const cudaError_t error = cudaGetDevice(&ordinal); error != cudaSuccess) return error;
  const uint64_t bit = uint64_t{1} << ordinal % kMostDevices;
  if (ordinal < kMostDevices && (allowed.load(std::memory_order_relaxed) & bit) != 0) return cudaSuccess;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes);
  if (error == cudaSuccess && kClusters && device.max_cluster > kPortableCluster) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (error == cudaSuccess) allowed.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

template <class T, bool kClusters>
cudaError_t launch_kernel(const BlockLaunch& launch, const cudaLaunchConfig_t& config,
                          const BlockParameters& p) {
  static std::atomic<uint64_t> allowed{0};
  const auto kernel = mod_block_kernel<T, kClusters>;
  if (launch.shared_bytes > kOrdinarySharedBytes || launch.cluster > kPortableCluster) {
    const cudaError_t error =
        allow<kClusters>(reinterpret_cast<const void*>(kernel), allowed, current_architecture());
    if (error != cudaSuccess) return error;
  }
  return cudaLaunchKernelEx(&config, kernel, p);
}

template <class T>
cudaError_t launch_all(const BlockPlan& plan, void* workspace, cudaStream_t stream) {
  for (int i = 0; i < plan.count; ++i) {
    const BlockLaunch& launch = plan.launches[i];
    const BlockParameters p = launch_parameters(plan, i, workspace);
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(launch.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(p.n) * static_cast<unsigned>(launch.blocks_a_sample));
    config.blockDim = dim3(kBlockThreads);
    config.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = launch.cluster > 0 ? 1 : 0;
    const cudaError_t error = launch.is_step
                                  ? cudaLaunchKernelEx(&config, tail_step_kernel<T>, p, launch.step)
                              : launch.cluster > 0 ? launch_kernel<T, true>(launch, config, p)
                                                   : launch_kernel<T, false>(launch, config, p);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// How many blocks of this kernel find room beside each other, to 16; 8 where that can't be asked. A device,
// or a part of one, of few multiprocessors has fewer than the 8 that a program may count on elsewhere.
int largest_cluster(int shared_bytes) {
  const auto kernel = mod_block_kernel<float, true>;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(2 * kPortableCluster);
  config.blockDim = dim3(kBlockThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  int most = 0;
  const bool known =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes) ==
          cudaSuccess &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess &&
      cudaOccupancyMaxPotentialClusterSize(&most, kernel, &config) == cudaSuccess;
  if (!known) cudaGetLastError();  // it must not be found by whoever looks next
  return known ? planning::power_of_two(most, 1, 2 * kPortableCluster) : kPortableCluster;
}

Architecture ask(int ordinal) {
  const auto number = [&](cudaDeviceAttr attribute) {
    int value = 0;
    if (cudaDeviceGetAttribute(&value, attribute, ordinal) == cudaSuccess) return value;
    cudaGetLastError();
    return 0;
  };
  Architecture device;
  device.capability =
      10 * number(cudaDevAttrComputeCapabilityMajor) + number(cudaDevAttrComputeCapabilityMinor);
  device.multiprocessors = std::max(1, number(cudaDevAttrMultiProcessorCount));
  device.shared_bytes = number(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.max_cluster = number(cudaDevAttrClusterLaunch) != 0 ? largest_cluster(device.shared_bytes) : 1;
  return device;
}

}  // namespace

const Architecture& current_architecture() {
  struct Known {
    std::atomic<bool> asked{false};
    std::once_flag once;
    Architecture device;
  };
  static Known known[kMostDevices];
  int ordinal = 0;
  cudaGetDevice(&ordinal);
  Known& one = known[ordinal % kMostDevices];
  std::call_once(one.once, [&] { one.device = ask(ordinal); });
  return one.device;
}

const char* launch_block(const BlockPlan& plan, void* workspace, void* stream) {
  if (plan.refused != nullptr) return plan.refused;
  const auto on = static_cast<cudaStream_t>(stream);
  const cudaError_t error = plan.dtype == DType::kHalf       ? launch_all<Half>(plan, workspace, on)
                            : plan.dtype == DType::kBFloat16 ? launch_all<BFloat16>(plan, workspace, on)
                                                             : launch_all<float>(plan, workspace, on);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // it is said here, and must not be found by whoever looks next
  return cudaGetErrorString(error);
}

}  // namespace mod_kernels
