"""Everything static is in pyproject.toml; here the extension of csrc/ is declared, where nvcc is found."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).resolve().parent))
from csrc import nvcc


class BuildByNvcc(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            nvcc.install(nvcc.build(toolchain), Path(self.get_ext_fullpath(ext.name)))
        except nvcc.BuildError as error:
            raise CompileError(str(error)) from None


try:
    toolchain = nvcc.find_toolchain()
    extensions = [Extension("geo_r1._C", sources=[])]
except nvcc.BuildError as error:
    sys.exit(str(error))
except nvcc.UnavailableError as reason:
    extensions = []
    if {"bdist_wheel", "editable_wheel"} & set(sys.argv):  # pip runs this file several times for one wheel
        print(f"geo_r1 installs without CUDA kernels: {reason}", file=sys.stderr)

setup(ext_modules=extensions, cmdclass={"build_ext": BuildByNvcc})
