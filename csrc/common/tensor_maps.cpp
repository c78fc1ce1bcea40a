#include <common/errors.h>
#include <common/tensor_maps.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <array>
#include <map>
#include <mutex>

namespace sparsebert {

namespace {

// Some hundred of each are in use by a model; more than these are those of tensors that are gone.
constexpr size_t MOST_MAPS = 4096;

// By way of the runtime, so that the module is not linked to a driver, and can be imported without one.
PFN_cuTensorMapEncodeTiled_v12000 find_encode(const char* op) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    constexpr int VERSION = 12000;  // of CUDA, that brought it
    const auto status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, VERSION, cudaEnableDefault, &result);
    check_cuda(status, op, "looking for cuTensorMapEncodeTiled");
    if (result != cudaDriverEntryPointSuccess)
        throw std::runtime_error(std::string(op) + ": the driver has no cuTensorMapEncodeTiled, which CUDA 12 brought");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
}

CUtensorMapSwizzle swizzle_of(Swizzle swizzle) {
    switch (swizzle) {
        case Swizzle::bytes32:
            return CU_TENSOR_MAP_SWIZZLE_32B;
        case Swizzle::bytes64:
            return CU_TENSOR_MAP_SWIZZLE_64B;
        case Swizzle::bytes128:
            return CU_TENSOR_MAP_SWIZZLE_128B;
        default:
            return CU_TENSOR_MAP_SWIZZLE_NONE;
    }
}

CUtensorMap encode(const char* op, const Box& box) {
    static const auto encode_tiled = find_encode(op);
    // A copy moves bytes as they are: which type has so many is all one.
    const auto type = box.element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16;
    const cuuint64_t extents[] = {static_cast<cuuint64_t>(box.inner), static_cast<cuuint64_t>(box.outer)};
    const cuuint64_t row_bytes[] = {static_cast<cuuint64_t>(box.row_bytes)};
    const cuuint32_t box_extents[] = {static_cast<cuuint32_t>(box.box_inner), static_cast<cuuint32_t>(box.box_outer)};
    const cuuint32_t steps[] = {1, 1};
    CUtensorMap map{};
    const CUresult result = encode_tiled(
        &map, type, 2, reinterpret_cast<void*>(box.address), extents, row_bytes, box_extents, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(box.swizzle), CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE
    );
    if (result == CUDA_SUCCESS) return map;
    const auto sides = [](int64_t rows, int64_t row) { return std::to_string(rows) + " x " + std::to_string(row); };
    throw std::runtime_error(
        std::string(op) + ": cuTensorMapEncodeTiled failed with " + std::to_string(static_cast<int>(result)) + " for " +
        sides(box.outer, box.inner) + " elements of " + std::to_string(box.element_bytes) + " bytes, rows " +
        std::to_string(box.row_bytes) + " bytes apart, in boxes of " + sides(box.box_outer, box.box_inner)
    );
}

}  // namespace

CUtensorMap tensor_map_of(const char* op, const Box& box) {
    using Key = std::array<int64_t, 8>;
    static std::mutex mutex;
    static std::map<Key, CUtensorMap> maps;
    const auto address = static_cast<int64_t>(box.address), swizzle = static_cast<int64_t>(box.swizzle);
    const Key key{
        address, box.inner, box.outer, box.row_bytes, box.box_inner, box.box_outer, box.element_bytes, swizzle
    };
    const std::lock_guard<std::mutex> lock(mutex);
    const auto held = maps.find(key);
    if (held != maps.end()) return held->second;
    const CUtensorMap made = encode(op, box);
    if (maps.size() == MOST_MAPS) maps.clear();
    return maps.emplace(key, made).first->second;
}

}  // namespace sparsebert
