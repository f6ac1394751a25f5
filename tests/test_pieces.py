import os
import subprocess
import sys
from pathlib import Path

from results import pieces as module


def test_a_file_is_split_and_joined_and_a_bad_piece_refused(refuses, tmp_path, monkeypatch, capsys):
    def command(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["pieces.py", *map(str, arguments)])
        module.main()

    monkeypatch.chdir(tmp_path)
    whole, joined = tmp_path / "some data.npz", Path("joined")
    whole.write_bytes(os.urandom((2 << 20) + 5))
    command("split", whole, "pieces", "--mib", "1")
    assert "pieces/some data.npz.sha256" in capsys.readouterr().out
    pieces = sorted((tmp_path / "pieces").glob("*.0*"))
    assert [piece.stat().st_size for piece in pieces] == [1 << 20, 1 << 20, 5]
    subprocess.run(["sha256sum", "--check", "--quiet", "some data.npz.sha256"], cwd=tmp_path / "pieces", check=True)

    def join() -> None:
        command("join", "pieces/some data.npz.sha256", joined)

    join()
    assert joined.read_bytes() == whole.read_bytes()
    content = pieces[1].read_bytes()
    pieces[1].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert refuses(join, "some data.npz.001 is damaged")
    pieces[1].unlink()
    assert refuses(join, "cannot read", "some data.npz.001")
    assert joined.read_bytes() == whole.read_bytes() and not list(tmp_path.glob(".*"))
    assert refuses(lambda: command("join", whole, joined), "some data.npz is not a list of pieces")
    assert refuses(lambda: command("split", "none", "pieces"), "cannot split none into pieces")
