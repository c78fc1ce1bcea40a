// The launch of a kernel in clusters: how many blocks of it run at once, and with which grid and attributes it goes.
#pragma once

#include <common/errors.h>
#include <common/tensor_maps.h>
#include <cuda_runtime.h>
#include <wgmma/boxes.h>
#include <wgmma/main_loop.cuh>

#include <atomic>
#include <string>

namespace sparsebert::wgmma {

inline int attribute_of(const char* op, int device, cudaDeviceAttr attribute) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, attribute, device), op, "asking the device");
    return value;
}

// Makes a kernel ready on a device, and says how many of its blocks run there at once, in the clusters of `launch`.
template <typename Kernel>
int prepare(const char* op, Kernel kernel, const cudaLaunchConfig_t& launch, int cluster, int device) {
    const int major = attribute_of(op, device, cudaDevAttrComputeCapabilityMajor);
    const int minor = attribute_of(op, device, cudaDevAttrComputeCapabilityMinor);
    // On any other the kernel only stops.
    if (major != 9 || minor != 0) {
        throw std::runtime_error(std::string(op) + ": the device has compute capability " + std::to_string(major) + "." +
                                 std::to_string(minor) + ", expected 9.0");
    }
    const int shared_bytes = static_cast<int>(launch.dynamicSmemBytes);
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    check_cuda(cudaFuncSetAttribute(kernel, attribute, shared_bytes), op, "shared memory");
    if (cluster == 1) return attribute_of(op, device, cudaDevAttrMultiProcessorCount);
    // Fewer than there are multiprocessors: those of a cluster are neighbours, and some are left over.
    int clusters = 0;
    check_cuda(cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch), op, "asking for clusters");
    return clusters * cluster;
}

// What is known of one kernel, by device and cluster; 0 before it is known.
class AtOnce {
  public:
    template <typename Kernel>
    int of(const char* op, Kernel kernel, const cudaLaunchConfig_t& launch, int cluster, int device) {
        if (device >= DEVICES) return prepare(op, kernel, launch, cluster, device);
        std::atomic<int>& known = known_[device][cluster];
        if (!known.load()) known.store(prepare(op, kernel, launch, cluster, device));
        return known.load();
    }

  private:
    static constexpr int DEVICES = 64;
    std::atomic<int> known_[DEVICES][MOST_BLOCKS + 1] = {};
};

// `arguments(blocks)` is handed a function that launches the kernel with what it is given, for a grid of so many blocks.
template <typename Kernel, typename Arguments>
void launch_in_clusters(const char* op, Kernel kernel, AtOnce& at_once, int shared_bytes, const Call& call,
                        const Arguments& arguments) {
    const int cluster = call.solution.cluster();
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t launch{};
    launch.gridDim = dim3(cluster);
    launch.blockDim = dim3(THREADS);
    launch.dynamicSmemBytes = shared_bytes;
    launch.stream = reinterpret_cast<cudaStream_t>(call.stream);
    launch.attrs = &attribute;
    launch.numAttrs = cluster > 1 ? 1 : 0;
    Problem problem = call.problem;
    problem.sms = at_once.of(op, kernel, launch, cluster, call.device);
    const int blocks = blocks_of(problem, call.solution);
    launch.gridDim = dim3(blocks);
    arguments(blocks, [&](const auto&... given) {
        // Its own status: the last error may be that of an earlier call, which nobody asked for since.
        check_cuda(cudaLaunchKernelEx(&launch, kernel, given...), op, "launch");
    });
}

inline TensorMap map_of(const char* op, const Box& box) {
    return box.address ? tensor_map_of(op, box) : TensorMap{};
}
inline Maps maps_of(const char* op, const Boxes& boxes) {
    return {map_of(op, boxes.x), map_of(op, boxes.weight), map_of(op, boxes.y), map_of(op, boxes.t), map_of(op, boxes.u)};
}

}  // namespace sparsebert::wgmma
