"""Benchmarks: the scripts behind the numbers in the documents."""
