"""Processes that belong together: started at once, ended together, and what each of them left."""

import os
import socket
import subprocess
import sys

import torch


def run_ranks(script, world, folder, *arguments, timeout=60, strict=("-W", "error")):
    """``script *arguments RANK WORLD INIT_FILE OUT`` for every rank; what each has saved in OUT."""
    outs = [folder / f"{rank}.pt" for rank in range(world)]
    command = [sys.executable, *strict, str(script), *arguments]
    finish([[*command, str(rank), str(world), folder / "init", out] for rank, out in enumerate(outs)], folder, timeout)
    return [torch.load(out, weights_only=True) for out in outs]


def run_lightning(script, folder, *arguments, timeout=150):
    """``script *arguments FOLDER`` twice, as Lightning's launcher would; what each has saved in rank0.pt, rank1.pt."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "WORLD_SIZE": "2"}
    environments = [{**common, "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"} for rank in range(2)]
    finish([[sys.executable, str(script), *arguments, str(folder)]] * 2, folder, timeout, environments)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def finish(commands, folder, timeout, environments=None):
    """Run processes to their end, which must be a good one in time; otherwise say what each of them wrote."""
    paths = [folder / f"{number}.log" for number in range(len(commands))]
    files = [path.open("w+") for path in paths]
    processes = [
        subprocess.Popen(command, stdout=file, stderr=file, env=env)
        for command, file, env in zip(commands, files, environments or [None] * len(commands), strict=True)
    ]
    try:
        codes = [process.wait(timeout=timeout) for process in processes]
        assert not any(codes), "\n".join(path.read_text() for path in paths)
    finally:
        for process, file in zip(processes, files, strict=True):
            process.kill()
            process.wait()
            file.close()
