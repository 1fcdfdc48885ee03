// launch: the module torch.utils.cpp_extension builds. One C function per need; Python owns shapes, memory and streams.
#include <cuda_runtime.h>
#include <string.h>

#include "awq_gemv.cuh"
#include "gemm_w4a4.cuh"
#include "quant_down.cuh"

#ifdef _WIN32
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C"
#endif
#define ENTRY(NAME) {#NAME, (const void*)NAME},

static const struct { const char* name; const void* kernel; } TABLE[] = {
    ENTRY(quant_down_bf16_s4_r32) ENTRY(quant_down_bf16_s4_r128)
    ENTRY(quant_down_bf16_u4_r32) ENTRY(quant_down_bf16_u4_r128)
    ENTRY(quant_down_fp16_s4_r32) ENTRY(quant_down_fp16_s4_r128)
    ENTRY(quant_down_fp16_u4_r32) ENTRY(quant_down_fp16_u4_r128)
    ENTRY(gemm_w4a4_bf16_s4) ENTRY(gemm_w4a4_bf16_u4)
    ENTRY(gemm_w4a4_fp16_s4) ENTRY(gemm_w4a4_fp16_u4)
    ENTRY(awq_gemv_bf16_b1) ENTRY(awq_gemv_bf16_b8)
    ENTRY(awq_gemv_fp16_b1) ENTRY(awq_gemv_fp16_b8)
};

// 0, or a CUDA error code; -1 for a name that is not in the table. args: addresses of the kernel's arguments, in order.
EXPORT int svdq_launch(const char* name, unsigned grid_x, unsigned grid_y, unsigned block, void** args, void* stream) {
    for (const auto& entry : TABLE)
        if (!strcmp(entry.name, name))
            return cudaLaunchKernel(entry.kernel, dim3(grid_x, grid_y), dim3(block), args, 0, (cudaStream_t)stream);
    return -1;
}

EXPORT const char* svdq_error(int code) { return cudaGetErrorString((cudaError_t)code); }
