"""What a round costs over the simulation's, with Flower between three clients on this machine: seconds, and bytes on the wire.

    python results/flower/overhead.py tiny resnet18 > results/flower/overhead.log

Each client has one batch of eight images, so that next to nothing of a round is training. The bytes are counted by a proxy between the
SuperNodes and the SuperLink; the connection is not encrypted.
"""

import asyncio
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SERVER, PROXY, NODE = 18000, 18001, 18100  # ports
counted = {"up": 0, "down": 0}


async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
    while data := await reader.read(1 << 16):
        counted[way] += len(data)
        writer.write(data)
        await writer.drain()
    writer.close()


async def proxy() -> None:
    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await asyncio.open_connection("127.0.0.1", SERVER)
        except OSError:  # the SuperLink is not there yet
            return writer.close()
        await asyncio.gather(forward(reader, there[1], "up"), forward(there[0], writer, "down"), return_exceptions=True)

    await (await asyncio.start_server(connect, "127.0.0.1", PROXY)).serve_forever()


def measure(encoder: str, folder: Path, environment: dict) -> None:
    options = f"--dataset all.npz --encoder {encoder} --clients 3 --rounds 4 --local-epochs 1 --batch-size 8 --knn-every 0 --device cpu"
    before = dict(counted)
    line = ["flwr", "run", str(ROOT / "flower"), "local", "--stream", "--run-config", f'options="{options} --out {encoder}"']
    subprocess.run(line, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    simulated = shlex.split(f"{sys.executable} {ROOT}/fedu.py {options} --partition iid --out {encoder}-simulated")
    subprocess.run(simulated, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    runs = {name: [json.loads(row) for row in (folder / name / "metrics.jsonl").open()] for name in (encoder, f"{encoder}-simulated")}
    seconds = {name: statistics.median(row["seconds"] for row in rows) for name, rows in runs.items()}
    print(f"{encoder}: seconds a round, median of 4: {seconds[encoder]:.1f} by Flower, {seconds[f'{encoder}-simulated']:.1f} simulated")
    for way, name in (("up", "upload_bytes"), ("down", "download_bytes")):
        sent, wire = sum(row[name] for row in runs[encoder]), counted[way] - before[way]
        print(f"{encoder}: {way}, of 4 rounds: {sent} bytes of networks, {wire} on the wire, {100 * (wire - sent) / sent:.2f}% more")


def main() -> None:
    threading.Thread(target=asyncio.run, args=(proxy(),), daemon=True).start()
    with tempfile.TemporaryDirectory() as name:
        folder, processes = Path(name), []
        images = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), np.uint8)
        np.savez(folder / "all.npz", x_train=images, y_train=np.arange(24) % 2, x_test=images[:8], y_test=np.arange(8) % 2)
        (folder / "config.toml").write_text(f'[superlink.local]\naddress = "127.0.0.1:{SERVER}"\ninsecure = true\n')
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "FLWR_HOME": name, "FLWR_TELEMETRY_ENABLED": "0"}
        environment["OMP_NUM_THREADS"] = "1"

        def start(line: str) -> None:
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
            processes.append(subprocess.Popen(shlex.split(line), cwd=folder, env=environment, **quiet))

        try:
            start(f"flower-superlink --insecure --port {SERVER} --disable-runtime-dependency-installation")
            for k in range(3):
                np.savez(folder / f"{k}.npz", x_train=images[8 * k : 8 * k + 8])
                node = f"""--node-config 'client={k} data="{k}.npz" device="cpu"'"""
                start(f"flower-supernode --insecure --superlink 127.0.0.1:{PROXY} --port {NODE + k} {node}")
            time.sleep(15)
            print(f"load of this machine before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
            for encoder in sys.argv[1:]:
                measure(encoder, folder, environment)
        finally:
            for process in processes:
                os.killpg(process.pid, signal.SIGTERM)
            for process in processes:
                process.wait(timeout=30)


if __name__ == "__main__":
    main()
