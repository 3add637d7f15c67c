"""Which folder imports under which name, and the build of the C++ operators and of the runtime of
compiled samplers; the rest of what there is to say about the package is in pyproject.toml.

python setup.py build_ext --inplace   the C++ only
GENTRON_SANITIZE=1                    with sanitizers, and gentron-fuzz beside gentron-sample
"""

import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# kernels/ and train/ hold no __init__.py: transformers probes for a PyPI package called "kernels".
FOLDERS = {"gentron_kernels": "kernels", "gentron_train": "train"}
ROOMS = [
    *("gentron_fast.compiled", "gentron_fast.convert", "gentron_fast.evaluation"),
    *("gentron_fast.guidance", "gentron_fast.serving"),
    *("gentron_train.data", "gentron_train.findings", "gentron_train.small_world"),
]
PACKAGES = ["gentron_fast", *FOLDERS, *ROOMS]


def extension(name: str, folder: str, *more: str) -> Extension:
    """A part of the C++: the sources and headers of a folder, and more sources."""
    return Extension(
        name,
        sources=[*sorted(str(path) for path in Path(folder).glob("*.cpp")), *more],
        depends=sorted(str(path) for path in Path(folder).glob("*.h")),
        include_dirs=["csrc"],
        language="c++",
    )


OPERATORS = extension("gentron_kernels.libgentron", "csrc/ops")
RUNTIME = extension("gentron_fast._runtime", "csrc/runtime", "csrc/bindings.cpp")
RUNTIME.sources.remove("csrc/runtime/main.cpp")
PROGRAMS = {"gentron-sample": "csrc/runtime/main.cpp"}
# Sums may be reordered, so that loops over them vectorise; NaN and infinity keep their meaning.
MATH = ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"]
# g++ takes the undefined halves in its own AVX-512 headers for mistakes.
QUIET = ["-Wno-maybe-uninitialized"]
SANITIZED = bool(os.environ.get("GENTRON_SANITIZE"))
if SANITIZED:
    PROGRAMS["gentron-fuzz"] = "csrc/fuzz/main.cpp"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"]


class BuildTorch(build_ext):
    """Builds what links libtorch: the operators and the programs without Python, for
    torch.ops.load_library and programs without an interpreter, and the runtime for Python."""

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extension(self, extension):
        import torch
        from torch.utils.cpp_extension import include_paths

        folder = Path(torch.__file__).parent / "lib"
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        extension.include_dirs = [*extension.include_dirs, *include_paths()]
        extension.extra_compile_args = ["-std=c++20", "-O3", "-fopenmp", abi]
        extension.library_dirs = extension.runtime_library_dirs = [str(folder)]
        extension.libraries = ["c10", "torch", "torch_cpu"]
        # torch's own OpenMP runtime, not a second one with threads of its own.
        extension.extra_objects = sorted(str(path) for path in folder.glob("libgomp*.so*"))
        if extension is OPERATORS:
            extension.extra_compile_args += [*MATH, *QUIET]
        else:
            # libtorch.so brings the CUDA part where there is one, though no symbol asks for it.
            extension.extra_link_args += ["-Wl,--no-as-needed", "-ltorch"]
        if extension is RUNTIME:
            extension.libraries = [*extension.libraries, "torch_python"]
            extension.extra_compile_args += ["-fvisibility=hidden", "-O2"]
        if SANITIZED:
            extension.extra_compile_args += SANITIZE
            extension.extra_link_args += SANITIZE[:1]
        super().build_extension(extension)
        if extension is RUNTIME:
            for program, source in PROGRAMS.items():
                self.build_program(extension, program, source)

    def build_program(self, runtime, program: str, source: str) -> None:
        """A program beside the runtime, of the same objects, without the bindings."""
        built = self.compiler.object_filenames(runtime.sources, output_dir=self.build_temp)
        built = [name for name in built if "bindings" not in name]
        built += self.compiler.compile(
            [source],
            output_dir=self.build_temp,
            include_dirs=runtime.include_dirs,
            extra_postargs=runtime.extra_compile_args,
        )
        self.compiler.link_executable(
            [*built, *runtime.extra_objects],
            program,
            output_dir=str(Path(self.get_ext_fullpath(runtime.name)).parent),
            libraries=[name for name in runtime.libraries if name != "torch_python"],
            library_dirs=runtime.library_dirs,
            runtime_library_dirs=runtime.runtime_library_dirs,
            extra_postargs=["-fopenmp", "-ldl", *runtime.extra_link_args],
            target_lang="c++",
        )

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        program = Path("gentron_fast", "gentron-sample")
        if not SANITIZED:
            self.copy_file(str(self.build_lib / program), str(program))

    def get_libraries(self, extension):
        return extension.libraries

    def get_ext_filename(self, name):
        return str(Path(*name.split(".")).with_suffix(".so"))


setup(
    packages=PACKAGES,
    package_dir=FOLDERS,
    include_package_data=False,  # else each folder of assets is warned of
    package_data={"gentron_fast": ["assets/**/*", "assets/*", "*/page.html"]},
    ext_modules=[OPERATORS, RUNTIME],
    cmdclass={"build_ext": BuildTorch},
)
