// mlp_low_sm75: mlp_shares.cuh for sm_75, in fp16
//
// Test tests/kernels/families/test_mlp.py
#include "mlp_shares.cuh"

#define MLP_LOW_SM75(NAME, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(128)                                                                     \
    NAME(const words4* shares, words4* low, int count, int tiles, words2* ascales, int groups) {                          \
        mlp_shares::run<T>(shares, low, count, tiles, ascales, groups);                                                   \
    }

// Grid: tiles / 4 rounded up, tiles being those of 16 rows x 16 ranks, and for peaks the tiles of 16 rows more. Block: 128.
MLP_LOW_SM75(mlp_low_sm75_fp16, FP16)
