"""The package map; everything else is in pyproject.toml.

``kernels/`` stands at the top of the repository but is installed as ``sparsebert.kernels``; a checkout sees it
there through the link ``sparsebert/kernels``. It has no ``__init__.py``: a top-level package of that name would
shadow Hugging Face's. So no search for packages finds it.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["sparsebert", "sparsebert.*"]), "sparsebert.kernels"],
    package_dir={"sparsebert.kernels": "kernels"},
    package_data={
        "sparsebert": ["py.typed", "recipes/*.toml"],
        "sparsebert.kernels": ["*.md"],
        "sparsebert.ops": ["*.json"],
    },
)
