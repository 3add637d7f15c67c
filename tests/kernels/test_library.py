"""The C++ operators stand without Python: a program that has none can load them."""

import re
import subprocess
from pathlib import Path

from gentron_kernels import launch

LIBRARY = Path(launch.__file__).with_name("libgentron.so")


def test_the_library_links_no_python():
    dynamic = subprocess.run(["readelf", "-d", LIBRARY], capture_output=True, text=True, check=True)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic.stdout)
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if "python" in name]


def test_the_library_asks_for_no_symbol_of_python():
    command = ["nm", "--dynamic", "--undefined-only", LIBRARY]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert len(symbols) > 20
    assert not [symbol for symbol in symbols if re.match(r"_?Py[A-Z_]|.*pybind11", symbol)]
