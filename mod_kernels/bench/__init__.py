"""Measuring the block and whole networks, side by side with plain PyTorch (``mod-kernels bench``)."""
