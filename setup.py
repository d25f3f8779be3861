"""Set-up of the package; what does not depend on the machine stands in pyproject.toml."""

from setuptools import setup

setup()
