"""Which folder imports under which name, and the build of the C++ operators; the rest of what
there is to say about the package is in pyproject.toml.

python setup.py build_ext --inplace   the library alone; GENTRON_SANITIZE=1: with sanitizers
"""

import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# kernels/ and train/ hold no __init__.py: transformers probes for a PyPI package called "kernels".
FOLDERS = {"gentron_kernels": "kernels", "gentron_train": "train"}

OPERATORS = Extension(
    "gentron_kernels.libgentron",
    sources=sorted(str(path) for path in Path("csrc/ops").glob("*.cpp")),
    depends=sorted(str(path) for path in Path("csrc/ops").glob("*.h")),
    language="c++",
)
# Sums may be reordered, so that loops over them vectorise; NaN and infinity keep their meaning.
MATH = ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"]
# g++ takes the undefined halves in its own AVX-512 headers for mistakes.
QUIET = ["-Wno-maybe-uninitialized"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"]


class BuildOperators(build_ext):
    """Builds one shared library that links libtorch and no Python: torch.ops.load_library opens it,
    and so does a program without an interpreter."""

    def build_extension(self, extension):
        import torch
        from torch.utils.cpp_extension import include_paths

        folder = Path(torch.__file__).parent / "lib"
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        extension.include_dirs = include_paths()
        extension.extra_compile_args = ["-std=c++20", "-O3", "-fopenmp", abi, *MATH, *QUIET]
        extension.library_dirs = extension.runtime_library_dirs = [str(folder)]
        extension.libraries = ["c10", "torch", "torch_cpu"]
        # torch's own OpenMP runtime, not a second one with threads of its own.
        extension.extra_objects = sorted(str(path) for path in folder.glob("libgomp*.so*"))
        if os.environ.get("GENTRON_SANITIZE"):
            extension.extra_compile_args += SANITIZE
            extension.extra_link_args = SANITIZE[:1]
        super().build_extension(extension)

    def get_libraries(self, extension):
        return extension.libraries

    def get_ext_filename(self, name):
        return str(Path(*name.split(".")).with_suffix(".so"))


setup(
    packages=["gentron_fast", *FOLDERS],
    package_dir=FOLDERS,
    package_data={"gentron_fast": ["assets/**/*", "assets/*"]},
    ext_modules=[OPERATORS],
    cmdclass={"build_ext": BuildOperators},
)
