"""The passes as Triton kernels."""
