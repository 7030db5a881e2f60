"""Device kernels in Triton, for CUDA and ROCm, and their launchers: the only place that imports triton."""
