import os
import subprocess

from conftest import refused

PIECES = "results/pieces.py"


def test_a_file_is_split_and_joined_and_a_bad_piece_refused(command, tmp_path):
    whole = tmp_path / "some data.npz"
    whole.write_bytes(os.urandom((2 << 20) + 5))
    done = command(PIECES, "split", whole, "pieces", "--mib", "1", cwd=tmp_path)
    assert done.returncode == 0 and "pieces/some data.npz.sha256" in done.stdout, done.stderr
    pieces = sorted((tmp_path / "pieces").glob("*.0*"))
    assert [piece.stat().st_size for piece in pieces] == [1 << 20, 1 << 20, 5]
    subprocess.run(["sha256sum", "--check", "--quiet", "some data.npz.sha256"], cwd=tmp_path / "pieces", check=True)

    def join():
        return command(PIECES, "join", "pieces/some data.npz.sha256", "joined", cwd=tmp_path)

    assert join().returncode == 0 and (tmp_path / "joined").read_bytes() == whole.read_bytes()
    content = pieces[1].read_bytes()
    pieces[1].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert refused(join(), "some data.npz.001 is damaged")
    pieces[1].unlink()
    assert refused(join(), "cannot read", "some data.npz.001")
    assert (tmp_path / "joined").read_bytes() == whole.read_bytes() and not list(tmp_path.glob(".*"))
    assert refused(command(PIECES, "join", whole, "joined", cwd=tmp_path), "some data.npz is not a list of pieces")
    assert refused(command(PIECES, "split", "none", "pieces", cwd=tmp_path), "cannot split none into pieces")
