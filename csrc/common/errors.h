// What host code throws: one line with op, tensor, what it has and what was expected, as the Python side words it.
//
// Includes nothing of CUDA, so that the host code of an op that only checks also compiles without a toolkit.
#pragma once

#include <stdexcept>
#include <string>

namespace sparsebert {

// refuse("nm24_linear", "x has shape (3, 100)", "(3, 768)"). std::invalid_argument is Python's ValueError.
[[noreturn]] inline void refuse(const std::string& op, const std::string& found, const std::string& expected) {
    throw std::invalid_argument(op + ": " + found + ", expected " + expected);
}

// "nm24_linear: launch failed: no CUDA-capable device is detected (cudaErrorNoDevice)", as a RuntimeError. Status is
// cudaError_t; a template leaves looking up what it calls to those who use it, and they include cuda_runtime_api.h.
template <typename Status>
void check_cuda(Status status, const char* op, const char* what) {
    if (status == Status{}) return;
    throw std::runtime_error(std::string(op) + ": " + what + " failed: " + cudaGetErrorString(status) + " (" +
                             cudaGetErrorName(status) + ")");
}

}  // namespace sparsebert
