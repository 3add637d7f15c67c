"""Which folder imports under which name; everything else about the package is in pyproject.toml."""

from setuptools import setup

# kernels/ and train/ hold no __init__.py: transformers probes for a PyPI package called "kernels".
FOLDERS = {"gentron_kernels": "kernels", "gentron_train": "train"}

setup(
    packages=["gentron_fast", *FOLDERS],
    package_dir=FOLDERS,
    package_data={"gentron_fast": ["assets/**/*", "assets/*"]},
)
