"""torch's files: plain ones are read, what is more than tensors is refused and neither run nor unpacked."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stream_r1.files import FileError
from stream_r1.models.tensor_files import read_file


def bomb(path: Path) -> None:
    torch.save({"x": torch.zeros(2**16)}, path.with_suffix(".plain"))
    with zipfile.ZipFile(path.with_suffix(".plain")) as plain, zipfile.ZipFile(path, "w") as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED)


class Code:
    def __reduce__(self):
        return exec, ("raise SystemExit('it was run')",)


PICKLES: dict[str, Callable[[Path], object]] = {
    "compressed parts": bomb,
    "code": lambda path: torch.save({"x": Code()}, path),
    "code in an old file": lambda path: torch.save({"x": Code()}, path, _use_new_zipfile_serialization=False),
    "numbers that are not stored": lambda path: torch.save({"x": torch.ones(1).expand(10**12)}, path),
    "one memory many times": lambda path: torch.save(dict.fromkeys("abcdefgh", torch.ones(10**5)), path),
    "no memory": lambda path: torch.save({"x": torch.ones(9, device="meta")}, path),
    "a sparse tensor": lambda path: torch.save({"x": torch.eye(9).to_sparse()}, path),
    "a list": lambda path: torch.save([torch.ones(1)], path),
    "tar": lambda path: path.write_bytes(b"\x00" * 257 + b"ustar" + b"\x00" * 999),
    "a pickle": lambda path: path.write_bytes(b"cos\nsystem\n(S'ls'\ntR."),
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_is_refused_without_being_run_or_unpacked(tmp_path: Path, name: str) -> None:
    PICKLES[name](tmp_path / "it.pt")
    with pytest.raises(FileError, match=r"it\.pt: .*expected") as error:
        read_file(tmp_path / "it.pt")
    assert "weights_only" not in str(error.value)
    assert len(str(error.value)) < 500


def test_plain_files_of_torch_are_read(tmp_path: Path) -> None:
    shared = torch.ones(9)
    for old in (True, False):
        torch.save({"x": shared, "y": shared}, tmp_path / "it.pt", _use_new_zipfile_serialization=not old)
        assert read_file(tmp_path / "it.pt")["y"].tolist() == [1] * 9
