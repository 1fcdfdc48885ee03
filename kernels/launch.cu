// launch: the module torch.utils.cpp_extension builds. One C function per need; Python owns shapes, memory and streams.
#include <cuda_runtime.h>
#include <string.h>

#include "awq_gemv.cuh"
#include "gemm_fp8.cuh"
#include "gemm_w4a4.cuh"
#include "quant_down.cuh"
#include "quant_fp8.cuh"

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
    ENTRY(quant_fp8_bf16_token_s_r32) ENTRY(quant_fp8_bf16_token_s_r128)
    ENTRY(quant_fp8_bf16_token_u_r32) ENTRY(quant_fp8_bf16_token_u_r128)
    ENTRY(quant_fp8_bf16_group_s_r32) ENTRY(quant_fp8_bf16_group_s_r128)
    ENTRY(quant_fp8_bf16_group_u_r32) ENTRY(quant_fp8_bf16_group_u_r128)
    ENTRY(quant_fp8_fp16_token_s_r32) ENTRY(quant_fp8_fp16_token_s_r128)
    ENTRY(quant_fp8_fp16_token_u_r32) ENTRY(quant_fp8_fp16_token_u_r128)
    ENTRY(quant_fp8_fp16_group_s_r32) ENTRY(quant_fp8_fp16_group_s_r128)
    ENTRY(quant_fp8_fp16_group_u_r32) ENTRY(quant_fp8_fp16_group_u_r128)
    ENTRY(gemm_fp8_bf16_token_w4_c1) ENTRY(gemm_fp8_bf16_token_w4_c2)
    ENTRY(gemm_fp8_bf16_token_w8_c1) ENTRY(gemm_fp8_bf16_token_w8_c2)
    ENTRY(gemm_fp8_bf16_group_w4_c1) ENTRY(gemm_fp8_bf16_group_w4_c2)
    ENTRY(gemm_fp8_bf16_group_w8_c1) ENTRY(gemm_fp8_bf16_group_w8_c2)
    ENTRY(gemm_fp8_fp16_token_w4_c1) ENTRY(gemm_fp8_fp16_token_w4_c2)
    ENTRY(gemm_fp8_fp16_token_w8_c1) ENTRY(gemm_fp8_fp16_token_w8_c2)
    ENTRY(gemm_fp8_fp16_group_w4_c1) ENTRY(gemm_fp8_fp16_group_w4_c2)
    ENTRY(gemm_fp8_fp16_group_w8_c1) ENTRY(gemm_fp8_fp16_group_w8_c2)
};

// 0, or a CUDA error code; -1 for a name that is not in the table. args: addresses of the kernel's arguments, in order.
// shared: bytes of dynamic shared memory. cluster: CTAs, neighbours in x, that run together.
EXPORT int svdq_launch(const char* name, unsigned grid_x, unsigned grid_y, unsigned block, void** args, void* stream,
                       unsigned shared, unsigned cluster) {
    for (const auto& entry : TABLE)
        if (!strcmp(entry.name, name)) {
            if (shared > 48 << 10)
                if (int code = cudaFuncSetAttribute(entry.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared))
                    return code;
            if (cluster == 1)
                return cudaLaunchKernel(entry.kernel, dim3(grid_x, grid_y), dim3(block), args, shared, (cudaStream_t)stream);
            cudaLaunchAttribute attribute = {};
            attribute.id = cudaLaunchAttributeClusterDimension;
            attribute.val.clusterDim = {cluster, 1, 1};
            cudaLaunchConfig_t config = {};
            config.gridDim = dim3(grid_x, grid_y), config.blockDim = dim3(block);
            config.dynamicSmemBytes = shared, config.stream = (cudaStream_t)stream;
            config.attrs = &attribute, config.numAttrs = 1;
            return cudaLaunchKernelExC(&config, entry.kernel, args);
        }
    return -1;
}

EXPORT const char* svdq_error(int code) { return cudaGetErrorString((cudaError_t)code); }
