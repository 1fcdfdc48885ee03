// launch: the host half of the module torch.utils.cpp_extension builds. build.py writes the text before this: the kernels' own
// files, and TABLE, which names the kernels. One C function per need; Python owns shapes, memory and streams.
#include <cuda_runtime.h>
#include <string.h>

#ifdef _WIN32
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C"
#endif

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

// The words of a code that svdq_launch returned.
EXPORT const char* svdq_error(int code) {
    return code == -1 ? "no kernel of this name is in the library" : cudaGetErrorString((cudaError_t)code);
}
