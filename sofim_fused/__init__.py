"""SOFIM for PyTorch: stochastic optimization with a regularized Fisher information matrix, at SGD-momentum's cost."""

from sofim_fused.optimizer import SOFIM

__all__ = ["SOFIM", "__version__"]
__version__ = "0.1.0"
