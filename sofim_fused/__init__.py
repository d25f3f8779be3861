"""SOFIM for PyTorch: stochastic optimization using a regularized Fisher information matrix (arXiv 2403.02833)."""

from sofim_fused.adasofim import AdaSOFIM
from sofim_fused.optimizer import SOFIM

__all__ = ["SOFIM", "AdaSOFIM", "__version__"]
__version__ = "0.1.0"
