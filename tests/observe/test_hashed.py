"""Files are hashed as they are written, and what the disk gives back is compared."""

from pathlib import Path

import pytest

from slime.observe.hashed import File, HashedFile, read_hashed, write_hashed

OF_ABC = "06b05ab6733a618578af5f94892f3950"  # XXH3-128 of "abc"


def test_a_file_is_hashed_in_pieces(tmp_path: Path) -> None:
    with HashedFile(tmp_path / "file") as file:
        file.write(b"a")
        file.write(memoryview(b"bc"))
    assert file.result == read_hashed(tmp_path / "file") == File(3, OF_ABC)
    assert (tmp_path / "file").read_bytes() == b"abc"


@pytest.mark.parametrize("content", [b"", b"abc"])
def test_a_whole_file(tmp_path: Path, content: bytes) -> None:
    assert write_hashed(tmp_path / "file", content) == read_hashed(tmp_path / "file")


def test_other_bytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slime.observe.hashed.read_hashed", lambda path: File(3, "0" * 32))
    with pytest.raises(OSError, match="is not what was written to it"):
        write_hashed(tmp_path / "file", b"abc")
