"""The extension as a file: what it needs of the torch that loads it."""

import ctypes
import re
import subprocess
from pathlib import Path

import torch

from stream_r1_kernels import backends

(EXTENSION,) = backends._FOLDER.glob("_C*.so")
LIBTORCH = Path(torch.__file__).parent / "lib/libtorch_cpu.so"


def test_it_needs_c_functions_of_torch_alone() -> None:
    """C++ symbols of torch and functions of Python change from version to version."""
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", EXTENSION], capture_output=True, text=True, check=True
    )
    symbols = {line.split()[-1].split("@")[0] for line in listed.stdout.splitlines()}
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    wrong = re.compile(r"_Z\w*(2at|3c10|5torch)\w*|_?Py[A-Z]\w*")
    assert [symbol for symbol in symbols if wrong.fullmatch(symbol)] == []
    needed = subprocess.run(["readelf", "-d", EXTENSION], capture_output=True, text=True, check=True).stdout
    libraries = re.findall(r"NEEDED.*\[(.*?)\]", needed)
    assert [name for name in libraries if "torch" in name or "c10" in name] == ["libtorch_cpu.so"]
    assert not any("gomp" in name or "python" in name for name in libraries)


def test_what_is_looked_up_by_name_is_there() -> None:
    """Products on AMX: with a torch without them the kernels would multiply themselves, slower."""
    names = set(re.findall(rb"_ZN2at[\w]+", EXTENSION.read_bytes()))
    assert len(names) == 3
    library = ctypes.CDLL(str(LIBTORCH))
    assert [name for name in names if not hasattr(library, name.decode())] == []
