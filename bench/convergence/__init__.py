"""Convergence of SOFIM and other first- and second-order optimizers, each tuned with the same number of configurations.

python -m bench.convergence --help
"""
