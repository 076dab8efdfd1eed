"""CUDA: driver, kernels, streams, memory and transforms, behind names of our own."""
