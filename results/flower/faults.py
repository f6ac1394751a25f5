"""What happens to a run between parties when something fails: each fault with real processes, TLS and keys, on this machine.

    OMP_NUM_THREADS=1 python results/flower/faults.py > results/flower/faults.log

Names of faults as arguments choose some of them. It needs flwr, root (to mount small disks), and half an hour. Each section of the log says
what is done, what the server's and the parties' logs say about it, which clients each round has, and how the run ends.
"""

import inspect
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = 3
# a training of several seconds, so that a fault can hit it
RECIPE = "--dataset server.npz --encoder tiny --clients 3 --batch-size 8 --local-epochs 2 --knn-every 0 --mu 0.45 --device cpu"
OURS = re.compile(r"^(client \d|node ID|round \d|parties\.json|.*(error: |cannot |Cannot |No space|disk is full))")
NOISE = re.compile(r"fraction_evaluate|mu = |Traceback|^\s|deprecated")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Site:
    """The server's folder, and one for each party: their processes, and the logs of these."""

    def __init__(self, folder: Path):
        self.folder, self.port, self.processes, self.read = folder, free_port(), {}, {}
        self.environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        images = np.random.default_rng(0).integers(0, 256, (96, 16, 16, 3), np.uint8)
        (folder / "server/.flwr").mkdir(parents=True)
        np.savez(folder / "server/server.npz", x_train=images[:16], y_train=np.arange(16) % 2, x_test=images[:8], y_test=np.arange(8) % 2)
        for k in range(CLIENTS):
            (folder / f"party{k}").mkdir()
            np.savez(folder / f"party{k}/images.npz", x_train=images[32 * k : 32 * k + 32])
        self.call(str(ROOT / "flower/certificates.sh"), "keys", "localhost", "6")
        config = f'[superlink.local]\naddress = "127.0.0.1:{self.port}"\nroot-certificates = "{folder}/server/keys/ca.crt"\n'
        (folder / "server/.flwr/config.toml").write_text(config)

    def call(self, *line: str, check: bool = True) -> str:
        """The output of a command in the server's folder."""
        environment = self.environment | {"FLWR_HOME": str(self.folder / "server/.flwr")}
        done = subprocess.run(line, cwd=self.folder / "server", env=environment, capture_output=True, text=True, timeout=300)
        assert not check or done.returncode == 0, (line, done.stdout, done.stderr)
        return done.stdout + done.stderr

    def start(self, name: str, line: str, place: str) -> None:
        environment = self.environment | {"FLWR_HOME": str(self.folder / place / ".flwr")}
        with open(self.folder / f"{name}.log", "a") as log:
            self.processes[name] = subprocess.Popen(
                shlex.split(line), cwd=self.folder / place, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self, name: str, how: int = signal.SIGKILL) -> None:
        """Send a signal to a process and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.processes[name].pid, how)
        if how in (signal.SIGKILL, signal.SIGTERM):
            with suppress(subprocess.TimeoutExpired):
                self.processes.pop(name).wait(timeout=20)

    def start_link(self, database: str = "link.db") -> None:
        tls = "--ssl-ca-certfile keys/ca.crt --ssl-certfile keys/server.crt --ssl-keyfile keys/server.key --enable-supernode-auth"
        line = f"flower-superlink --port {self.port} --database {database} {tls} --disable-runtime-dependency-installation"
        before = self.log("link").count("Uvicorn running")
        self.start("link", line, "server")
        self.wait(lambda: self.log("link").count("Uvicorn running") > before)

    def start_node(
        self, k: int, name: str = "", key: int | None = None, client: int | None = None, more: str = "", pinned: bool = False
    ) -> None:
        """Party k's SuperNode, in a loop as docs/flower.md has it. key, client: others than its own."""
        config = f'client={k if client is None else client} data="images.npz" device="cpu" {more}'
        shutil.copy(self.folder / f"server/keys/client-{k if key is None else key}", self.folder / f"party{k}")
        line = f"flower-supernode --superlink 127.0.0.1:{self.port} --root-certificates ../server/keys/ca.crt --port {free_port()}"
        line += f" --auth-supernode-private-key client-{k if key is None else key} --node-config {shlex.quote(config)}"
        line = f"env PATH={ROOT}/flower/pinned:$PATH {line}" if pinned else line
        self.start(name or f"node{k}", f"sh -c {shlex.quote(f'until {line}; do sleep 5; done')}", f"party{k}")

    def register(self, key: int, client: int, *more: str) -> None:
        line = [sys.executable, str(ROOT / "flower/parties.py"), f"keys/client-{key}.pub", str(client), "--name", f"Hospital {client}"]
        for _ in range(5):
            said = self.call(*line, *more, check=False)
            if "binds it to client" in said:
                return
            time.sleep(2)
        raise AssertionError(said)

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, condition: Callable[[], bool], seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "\n".join(path.read_text(errors="replace")[-3000:] for path in self.folder.glob("*.log"))
            time.sleep(0.2)

    def run(self, name: str, options: str = "", rounds: int = 3, log: str = "", more: str = "", app: Path = ROOT / "flower") -> None:
        """Start a run. options: instead of a new run of `rounds` rounds in the folder `name`."""
        options = options or f"{RECIPE} --rounds {rounds} --out {name}"
        config = f'options="{options}" {more}'
        self.start(log or name, shlex.join(["flwr", "run", str(app), "local", "--stream", "--run-config", config]), "server")

    def trains(self, name: str, round_: int, k: int = 1) -> None:
        """Wait until client k trains in a round of the run."""
        self.wait(lambda: len(self.rounds(name)) >= round_)
        self.wait(lambda: f"ROUND {round_ + 1}]" in self.log(f"node{k}")[self.read[f"node{k}"] :])
        time.sleep(6)  # Python starts, and reads its images

    def pids(self, command: str) -> list[int]:
        """The processes of a command that descend from the SuperLink."""
        table = subprocess.run(["ps", "-e", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
        rows = [(int(pid), int(parent), args) for pid, parent, args in (line.split(None, 2) for line in table.splitlines())]
        family = {self.processes["link"].pid}
        while further := {pid for pid, parent, _ in rows if parent in family} - family:
            family |= further
        return [pid for pid, _, args in rows if pid in family and command in args]

    def rounds(self, name: str) -> list:
        path = self.folder / "server" / name / "metrics.jsonl"
        return [json.loads(row)["clients"] for row in path.read_text().splitlines()] if path.exists() else []

    def end(self, name: str, log: str = "") -> None:
        """Wait for the stream of a run, and print which clients each round has."""
        log = log or name
        with suppress(subprocess.TimeoutExpired):
            self.processes[log].wait(timeout=600)
        self.kill(log)
        runs = json.loads(self.call("flwr", "list", "local", "--format", "json"))["runs"]
        ids = re.findall(r"run (\d+)", self.log(log))
        status = next((f"{run['status']} {run['status-details']}" for run in runs if run["run-id"] in ids), "unknown")
        print(f"  rounds: {json.dumps(self.rounds(name))}; flwr list: {self.clean(status.strip())}", flush=True)

    def clean(self, text: str) -> str:
        text = re.sub(r"\x1b\[[0-9;]*m|\(pid=\d+\) ?", "", text).replace(str(self.folder), "...").replace(str(ROOT), "FEDU")
        return re.sub(r"\b\d{15,}\b", "ID", text).strip()

    def say(self, *names: str) -> None:
        """Print what these logs say about the fault, since they were last read: each sentence once."""
        for name in names:
            log = self.log(name)
            lines = [self.clean(line) for line in log[self.read.get(name, 0) :].splitlines()]
            self.read[name] = len(log)
            for line in dict.fromkeys(line for line in lines if OURS.search(line) and not NOISE.search(line)):
                if not re.match(r"client \d.* (is node ID and has|sends .* MB)", line):
                    print(f"  {name}: {line[:300]}", flush=True)

    def skip(self) -> None:
        """Leave out what the logs have until now."""
        self.read |= {path.stem: len(self.log(path.stem)) for path in self.folder.glob("*.log")}

    def state(self, k: int) -> Path:
        """The state folder of client k's last run."""
        return max((self.folder / f"party{k}").glob("fedu-state/*/client-*"), key=lambda path: path.stat().st_mtime)


# ------------------------------------------------------------------------------------------------------- the faults


def superlink_killed(site: Site, name: str) -> None:
    """The SuperLink is killed (-9) in round 1, and started again after five seconds. Then the run is resumed."""
    site.run(name)
    site.trains(name, 1)
    site.kill("link")
    time.sleep(5)
    site.start_link()
    site.end(name)
    site.run(name, f"--resume {name}", log=f"{name}-resumed")
    site.end(name, f"{name}-resumed")


def app_killed(site: Site, name: str) -> None:
    """The server's app is killed (-9) in round 1. Then the run is resumed."""
    site.run(name)
    site.trains(name, 1)
    (app,) = site.pids("flwr-serverapp")
    os.kill(app, signal.SIGKILL)
    site.run(name, f"--resume {name}", log=f"{name}-resumed")
    site.end(name, f"{name}-resumed")


def node_killed(site: Site, name: str) -> None:
    """Client 1's node is killed (-9) in round 1, and started again at once."""
    site.run(name)
    site.trains(name, 1)
    site.kill("node1")
    site.start_node(1)
    site.end(name)


def node_stopped(site: Site, name: str) -> None:
    """Client 1's node is stopped (SIGSTOP) in round 1, and continued two minutes later."""
    site.run(name)
    site.trains(name, 1)
    site.kill("node1", signal.SIGSTOP)
    time.sleep(120)
    site.kill("node1", signal.SIGCONT)
    site.end(name)


def state_damaged(site: Site, name: str) -> None:
    """After round 0 client 0's state folder is deleted, client 1's files are cut to half, and client 2's become random bytes."""
    site.run(name)
    site.wait(lambda: len(site.rounds(name)) >= 1)
    shutil.rmtree(site.folder / "party0/fedu-state")
    for k in (1, 2):
        for path in site.state(k).iterdir():
            data = path.read_bytes()
            path.write_bytes(data[: len(data) // 2] if k == 1 else os.urandom(len(data)))
    site.end(name)


def small_disk(folder: Path, megabytes: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(1024 * megabytes)}k", "tmpfs", str(folder)], check=True)


def fill(folder: Path, leave: int = 100_000) -> None:
    """Fill a disk except for some bytes; somebody else may fill it meanwhile."""
    with open(folder / "filler", "wb", buffering=0) as file, suppress(OSError):
        while (free := shutil.disk_usage(folder).free - leave) > 0:
            file.write(b"x" * min(free, 1 << 16))


def party_disk_full(site: Site, name: str) -> None:
    """Client 1's disk has 100 kB left after round 0, so that its checkpoint does not fit, and has room again after round 1."""
    disk = site.folder / "party1/disk"
    small_disk(disk, 40)
    site.kill("node1")
    site.start_node(1, more='state="disk/state"')
    try:
        site.run(name)
        site.wait(lambda: len(site.rounds(name)) >= 1)
        fill(disk)
        site.wait(lambda: len(site.rounds(name)) >= 2)
        (disk / "filler").unlink()
        site.end(name)
        print(f"  its folder: {sorted(path.name for path in next(disk.glob('state/*/client-1')).iterdir())}")
    finally:
        site.kill("node1")
        subprocess.run(["umount", "-l", str(disk)], check=True)
        site.start_node(1)


def same_number(site: Site, name: str) -> None:
    """Two more nodes say that they are client 1: one has a registered key of its own (client 3's), the other client 1's own key."""
    site.start_node(1, name="other-key", key=3, client=1)
    site.start_node(1, name="same-key")
    site.wait(lambda: "SuperNode ID" in site.log("other-key"))
    site.run(name, rounds=2)
    site.end(name)
    for node in ("other-key", "same-key"):
        site.kill(node)
        lines = [site.clean(line) for line in site.log(node).splitlines() if re.search("activate|in use|Exit Code|error: ", line)]
        print(f"  {node}: {'; '.join(dict.fromkeys(lines))[:300] or 'no error'}")


def joins_in_round_5(site: Site, name: str) -> None:
    """Client 2's node is started when five of seven rounds are done. The run needs two clients (min-clients=2)."""
    site.kill("node2")
    time.sleep(60)  # until the SuperLink has found it missing
    site.run(name, rounds=7, more="min-clients=2")
    site.wait(lambda: len(site.rounds(name)) >= 4)
    site.start_node(2)
    site.end(name)


def key_rotated_and_revoked(site: Site, name: str) -> None:
    """In round 1 client 1 gets a new key (parties.py --replace), with which its node starts again. In round 3 client 2's key is revoked
    (flwr supernode unregister, and its entry of parties.json is deleted). The run needs two clients (min-clients=2)."""
    site.run(name, rounds=6, more="min-clients=2")
    site.trains(name, 1)
    site.register(4, 1, "--replace")
    site.kill("node1")
    site.start_node(1, key=4)
    site.trains(name, 3, k=0)
    node = re.findall(r"SuperNode ID: (\d+)", site.log("node2"))[-1]
    site.call("flwr", "supernode", "unregister", node, "local")
    path = site.folder / "server/parties.json"
    path.write_text(json.dumps([row for row in json.loads(path.read_text()) if row["client"] != 2]))
    site.end(name)
    lines = [site.clean(line) for line in site.log("node2").splitlines()]
    print(f"  node2's last lines: {' | '.join([line for line in lines if line][-4:])}")


def parties_damaged(site: Site, name: str) -> None:
    """parties.json is cut to half in round 1, and deleted after it."""
    path = site.folder / "server/parties.json"
    before = path.read_text()
    site.run(name, rounds=4)
    site.trains(name, 1)
    path.write_text(before[: len(before) // 2])
    site.wait(lambda: len(site.rounds(name)) >= 3)
    path.unlink()
    site.end(name)
    path.write_text(before)


def run_disk_full(site: Site, name: str) -> None:
    """The disk of the server's run folder has 100 kB left after round 0; then room is made, and the run is resumed."""
    disk = site.folder / "server" / name
    small_disk(disk, 40)
    try:
        site.run(name)
        site.wait(lambda: len(site.rounds(name)) >= 1)
        fill(disk)
        site.end(name)
        print(f"  its folder: {sorted(path.name for path in disk.iterdir())}")
        (disk / "filler").unlink()
        site.run(name, f"--resume {name}", log=f"{name}-resumed")
        site.end(name, f"{name}-resumed")
        print(f"  its folder: {sorted(path.name for path in disk.iterdir())}")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def database_disk_full(site: Site, name: str) -> None:
    """The disk of the SuperLink's database is full after round 0, and has room again half a minute later."""
    disk = site.folder / "server/database"
    small_disk(disk, 60)
    for process in ("link", *(f"node{k}" for k in range(CLIENTS))):
        site.kill(process)
    site.start_link("database/link.db")
    try:
        for k in range(CLIENTS):
            site.register(k, k)
            site.start_node(k)
        site.run(name)
        site.wait(lambda: len(site.rounds(name)) >= 1)
        fill(disk, 0)
        time.sleep(30)
        site.say("link")
        (disk / "filler").unlink()
        site.end(name)
        if len(site.rounds(name)) < 3:
            site.run(name, f"--resume {name}", log=f"{name}-resumed")
            site.end(name, f"{name}-resumed")
    finally:
        for process in ("link", *(f"node{k}" for k in range(CLIENTS))):
            site.kill(process)
        subprocess.run(["umount", "-l", str(disk)], check=True)
        site.start_link()
        for k in range(CLIENTS):
            site.start_node(k)


def other_app(site: Site, name: str) -> None:
    """Somebody who reaches the server starts an app that writes a file at each party. Party 1 has flower/pinned first in its PATH."""
    site.kill("node1")
    site.start_node(1, pinned=True)
    app = shutil.copytree(ROOT / "flower", site.folder / "other")
    with open(app / "client_app.py", "a") as file:
        file.write('open("executed", "w").close()\n')
    site.run(name, rounds=2, app=app)
    site.end(name)
    print(f"  the file is at: {sorted(path.parent.name for path in site.folder.glob('party*/executed'))}")
    site.kill("node1")
    site.start_node(1)


FAULTS = [
    superlink_killed, app_killed, node_killed, node_stopped, state_damaged, party_disk_full, same_number, joins_in_round_5, parties_damaged,
    run_disk_full, database_disk_full, key_rotated_and_revoked, other_app,
]  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        site = Site(Path(name))
        try:
            site.start_link()
            for k in range(CLIENTS):
                site.register(k, k)
                site.start_node(k)
            site.register(3, 3)
            site.wait(lambda: all("SuperNode ID" in site.log(f"node{k}") for k in range(CLIENTS)))
            for fault in FAULTS:
                if sys.argv[1:] and fault.__name__ not in sys.argv[1:]:
                    continue
                print(f"{fault.__name__}: {inspect.getdoc(fault)}", flush=True)
                site.skip()
                begun, out = time.monotonic(), fault.__name__.replace("_", "-")
                try:
                    fault(site, out)
                except (AssertionError, OSError, ValueError, subprocess.SubprocessError) as error:
                    print(f"  NOT DONE: {site.clean(repr(error)[-3000:])}", flush=True)
                site.say(out, f"{out}-resumed", *(f"node{k}" for k in range(CLIENTS)))
                print(f"  {time.monotonic() - begun:.0f} s", flush=True)
        finally:
            for process in list(site.processes):
                site.kill(process)


if __name__ == "__main__":
    main()
