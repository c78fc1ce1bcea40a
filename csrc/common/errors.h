// What host code throws: one line with op, tensor, what it has and what was expected, as the Python side words it.
//
// Includes nothing of CUDA, so that the host code of an op that only checks also compiles without a toolkit.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace sparsebert {

// "nm24_linear: x has shape (3, 100), expected (3, 768)". std::invalid_argument is Python's ValueError.
[[noreturn]] inline void refuse(const std::string& op, const std::string& tensor, const std::string& has,
                                const std::string& expected) {
    throw std::invalid_argument(op + ": " + tensor + " has " + has + ", expected " + expected);
}

// A shape as Python writes it.
inline std::string to_text(std::initializer_list<int64_t> shape) {
    std::string text = "(";
    for (const int64_t size : shape) {
        text += (text.size() > 1 ? ", " : "") + std::to_string(size);
    }
    return text + (shape.size() == 1 ? ",)" : ")");
}

inline void check_shape(const std::string& op, const std::string& tensor, std::initializer_list<int64_t> has,
                        std::initializer_list<int64_t> expected) {
    const std::string text = to_text(has), other = to_text(expected);
    if (text != other) refuse(op, tensor, "shape " + text, other);
}

// What loads of several bytes at once ask of a pointer.
inline void check_aligned(const std::string& op, const std::string& tensor, const void* pointer, unsigned bytes) {
    const auto past = static_cast<unsigned>(reinterpret_cast<uintptr_t>(pointer) % bytes);
    if (past != 0) {
        refuse(op, tensor, "an address " + std::to_string(past) + " past a multiple of " + std::to_string(bytes),
               "a multiple of " + std::to_string(bytes));
    }
}

// "nm24_linear: launch failed: no CUDA-capable device is detected (cudaErrorNoDevice)", as a RuntimeError. Status is
// cudaError_t; a template leaves looking up what it calls to those who use it, and they include cuda_runtime_api.h.
template <typename Status>
void check_cuda(Status status, const std::string& op, const std::string& what) {
    if (status == Status{}) return;
    throw std::runtime_error(op + ": " + what + " failed: " + cudaGetErrorString(status) + " (" +
                             cudaGetErrorName(status) + ")");
}

}  // namespace sparsebert
