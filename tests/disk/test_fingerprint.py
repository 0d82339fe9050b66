"""Content tells, and any change of it: not where it lies, not when it was written, not what is hidden."""

import os
import shutil

import pytest

from stream_r1.disk import fingerprint as module
from stream_r1.disk.fingerprint import fingerprint


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "model"
    (place / "part").mkdir(parents=True)
    (place / "config.json").write_text("{}")
    (place / "part" / "weights.bin").write_bytes(bytes(range(256)) * 64)
    return place


def test_a_copy_elsewhere_written_at_another_time_is_the_same(folder, tmp_path):
    before = fingerprint([folder], "bfloat16")
    shutil.copytree(folder, tmp_path / "copy")
    os.utime(tmp_path / "copy" / "config.json", (1, 1))
    (tmp_path / "copy" / ".cache").mkdir()
    (tmp_path / "copy" / ".cache" / "when.json").write_text("now")
    (tmp_path / "copy" / "README.md").write_text("of a model")
    assert fingerprint([tmp_path / "copy"], "bfloat16") == before
    assert fingerprint([tmp_path / "copy"], "float32") != before
    assert fingerprint([tmp_path / "copy", tmp_path / "missing"], "bfloat16") == before


@pytest.mark.parametrize("whole", [1 << 26, 1 << 10], ids=["small files", "a large file"])
def test_a_changed_byte_a_name_and_a_length_tell(folder, monkeypatch, whole):
    monkeypatch.setattr(module, "_WHOLE", whole)
    monkeypatch.setattr(module, "_PIECE", 1 << 10)  # sixteen of them: all of the file
    weights = folder / "part" / "weights.bin"
    content, seen = weights.read_bytes(), [fingerprint([folder])]
    for at in (0, len(content) // 2, len(content) - 1):
        weights.write_bytes(content[:at] + b"?" + content[at + 1 :])
        seen.append(fingerprint([folder]))
    weights.write_bytes(content + b"\0")
    seen.append(fingerprint([folder]))
    weights.write_bytes(content)
    weights.rename(folder / "part" / "other.bin")
    seen.append(fingerprint([folder]))
    assert len(set(seen)) == len(seen)


def test_a_file_is_a_place_too(folder):
    weights = folder / "part" / "weights.bin"
    before = fingerprint([weights])
    weights.write_bytes(b"other")
    assert fingerprint([weights]) != before
