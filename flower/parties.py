"""Register a party's key: the SuperLink then lets its node in, and `parties.json` says which client it is.

    python flower/parties.py keys/client-0.pub 0 --name "St. Mary's" --images 5000

Run it where the SuperLink was started, whose runs read `parties.json` there at the beginning of each round. A node whose key is not in the
file, or is another client's, is refused. Without the file any registered node may say that it is any client.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key, load_ssh_public_key

from runtime.cli import InputError, Parser, first_line, number, os_errors, user_errors, user_path, write_atomic

FILE = Path("parties.json")


class Party(NamedTuple):
    """A row of parties.json. key: in OpenSSH's form, without a comment. images: the most that count, None for any number."""

    client: int
    name: str
    key: str
    images: int | None = None


def read_parties(path: Path = FILE) -> list[Party] | None:
    """The parties in the file, None if there is no file. Raises InputError if it is of another form, or names a client or key twice."""
    try:
        rows = json.loads(path.read_text())
        parties = [Party(**row) for row in rows]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}); it needs a list of {', '.join(Party._fields)}") from None
    for party in parties:
        counts = (party.client, 0 if party.images is None else party.images)
        if any(type(value) is not int or value < 0 for value in counts) or type(party.name) is not str:
            raise InputError(f"{path}: client {party.client!r} needs a number from 0, a name, and a number of images or null")
        if normal_key(str(party.key)) != party.key:
            raise InputError(f"{path}: client {party.client} has no public key in OpenSSH's form")
    for what in ("client", "key"):
        values = [getattr(party, what) for party in parties]
        if twice := [value for value in values if values.count(value) > 1]:
            raise InputError(f"{path} has the {what} {twice[0]} twice")
    return parties


def normal_key(text: str | bytes) -> str | None:
    """A public key in OpenSSH's form, from that form or from Flower's, PEM; None if it is neither."""
    data = text.encode() if isinstance(text, str) else text
    try:
        key = load_pem_public_key(data) if data.startswith(b"-----") else load_ssh_public_key(data)
        return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    except Exception:  # whatever bytes that are no key's make the library raise
        return None


def party_of(parties: list[Party], key: bytes) -> Party | None:
    """The party of a node's public key, as Flower gives it."""
    text = normal_key(key)
    return next((party for party in parties if party.key == text), None)


def bound(parties: list[Party], new: Party, replace: bool) -> list[Party]:
    """The parties with a new one, in the order of their numbers. replace: whether it may take the place of one with this number."""
    others = [party for party in parties if party.client != new.client]
    if len(others) < len(parties) and not replace and new not in parties:
        raise InputError(f"{FILE} has client {new.client} already: --replace changes its key, name or images")
    if same := [party for party in others if party.key == new.key]:
        raise InputError(f"the key of client {new.client} is that of client {same[0].client} ({same[0].name}) in {FILE}")
    return sorted([*others, new])


def main(argv: list[str] | None = None) -> None:
    """Register the key at the SuperLink, unless it is there, and write the file."""
    parser = Parser(__doc__.split("\n\n")[0])
    parser.add_argument("key", type=user_path, metavar="KEY.pub", help="the party's public key")
    parser.add_argument("client", type=number(int, 0), help="its number, from 0")
    parser.add_argument("--name", default="", help="what the log calls it")
    parser.add_argument("--images", type=number(int, 1), default=None, help="the most images that count for its weight  [what it says]")
    parser.add_argument("--replace", action="store_true", default=False, help="change a party that is in the file")
    parser.add_argument("--superlink", default="local", help="the connection in Flower's config.toml  [local]")
    given = parser.parse_args(argv)
    with os_errors(f"{given.key} cannot be read"):
        key = normal_key(given.key.read_bytes())
    if key is None:
        raise InputError(f"{given.key} is not a public key in OpenSSH's form, such as keys/client-0.pub")
    parties = bound(read_parties() or [], Party(given.client, given.name, key, given.images), given.replace)
    beside = Path(sys.executable).parent  # flwr is installed beside the Python that runs this
    done = subprocess.run(
        ["flwr", "supernode", "register", str(given.key), given.superlink], capture_output=True, text=True,
        env=os.environ | {"PATH": f"{beside}:{os.environ.get('PATH', '')}"},
    )  # fmt: skip
    said = " ".join((done.stdout + done.stderr).split())
    if done.returncode and "already in use" not in said:
        raise InputError(f"the SuperLink did not take the key: {said[-300:]}")
    content = json.dumps([party._asdict() for party in parties], indent=1).encode() + b"\n"
    write_atomic(FILE, lambda file: file.write(content), mode=0o600)
    print(f"{'The SuperLink has this key already.' if done.returncode else said}\n{FILE} binds it to client {given.client}.")


if __name__ == "__main__":
    with user_errors("parties.py"):
        main()
