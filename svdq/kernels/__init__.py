"""The numbers: packed layouts, reference operators, CUDA kernels. torch only; importing this compiles and loads nothing."""
