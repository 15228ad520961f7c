"""Kills a synthesis at random until it is whole, again and again, and compares what comes out with an undisturbed run.

    python tests/chaos.py                # 50 kills; `make chaos`
    python tests/chaos.py --kills 3 --seed 7 --images 12

Runs are `bnfuse synthesize` by itself or under torchrun with 2 or 3 ranks, drawn anew each time the run goes on. Killed is one
process, one rank, torchrun, or all of them at once, by SIGKILL or SIGTERM, while they start or while they work. After each kill
everything that was committed must still be there, once, with its hash; a whole dataset must be the undisturbed one's, byte for
byte. Prints each kill and a summary; the exit status is 1 if anything was lost, doubled or different.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from bnfuse.manifest import inspect, read_store

NETWORK = """
import torch
from bnfuse.networks import CifarResNet


def net():
    torch.manual_seed(0)
    return CifarResNet(8, 10, 1, width=8)
"""
FLAGS = (
    "--image-size 8 --mean 0.3 --std 0.3 --targets running --classes 0 1 2 --batch-size 2 --low-resolution-iterations 20 "
    "--iterations 40 --jitter 1 --flip --soft-labels --device cpu --threads 1"
)
# What a process that was killed may leave; anything else that `verify` says is a failure.
ALLOWED = ("the dataset is not finished", "is malformed: cut short", "is not in manifest.jsonl", " lines, expected ")


class Run:
    """`bnfuse synthesize`, by itself (ranks = 1) or under torchrun."""

    def __init__(self, work: Path, out: Path, images: int, ranks: int, restarts: int, checkpoint_every: int):
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            command += ["--max-restarts", str(restarts)]
        command += ["-m", "bnfuse", "synthesize", "--teacher", f"{work / 'net.py'}:net", *FLAGS.split()]
        command += ["--images-per-class", str(images // 3), "--checkpoint-every", str(checkpoint_every), "--out", str(out)]
        root = Path(__file__).resolve().parents[1]
        path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        self.out, self.ranks, self.restarts = out, ranks, restarts
        self.log = open(work / "log", "w+")
        self.started = time.time()
        self.process = subprocess.Popen(
            command, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}, stdout=self.log, stderr=self.log
        )

    def ended(self) -> bool:
        return self.process.poll() is not None

    def has_opened(self) -> bool:
        """Whether the run has opened the dataset: it truncates the manifest, or replaces it."""
        manifest = self.out / "manifest.jsonl"
        return manifest.exists() and manifest.stat().st_mtime > self.started

    def processes(self) -> list[int]:
        """The ranks, or the one process."""
        if self.ranks == 1:
            return [self.process.pid]
        try:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        except OSError:
            return []
        return [int(child) for child in children]

    def wait_for_end(self, pids: list[int], seconds: float = 90) -> None:
        """Until the run and the processes `pids` are gone, also those that torchrun left behind."""
        end = time.monotonic() + seconds
        while not self.ended() or any(os.path.exists(f"/proc/{pid}") for pid in pids):
            if time.monotonic() > end:
                raise SystemExit(f"chaos: processes {pids} outlive the run\n{self.said()}")
            time.sleep(0.02)

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read()


class Chaos:
    def __init__(self, work: Path, kills: int, seed: int, images: int):
        self.work, self.kills, self.images, self.draw = work, kills, images, random.Random(seed)
        self.out, self.reference = work / "killed", work / "undisturbed"
        self.count: Counter[str] = Counter()
        self.datasets = self.resumed = 0
        self.committed: dict[str, str] = {}  # image → sha256
        (work / "net.py").write_text(NETWORK)

    def main(self) -> None:
        begun = time.monotonic()
        undisturbed = Run(self.work, self.reference, self.images, 1, 0, 0)
        while not undisturbed.has_opened() and not undisturbed.ended():
            time.sleep(0.01)
        self.startup = time.time() - undisturbed.started
        if undisturbed.process.wait():
            raise SystemExit(f"chaos: the undisturbed run failed\n{undisturbed.said()}")
        run = None
        while sum(self.count.values()) < self.kills:
            run = run or self.start()
            self.let_it_work(run)
            if not run.ended():
                run = self.kill(run)
            elif run.process.returncode:
                raise SystemExit(f"chaos: a run failed by itself\n{run.said()}")
            if run is None:
                self.check()
            elif run.ended():
                self.compare()
                run = None
        if run or self.out.exists() or not self.datasets:
            self.finish(run or self.start())
        kinds = ", ".join(f"{n} × {kind}" for kind, n in sorted(self.count.items()))
        print(
            f"{sum(self.count.values())} kills ({kinds}); {self.resumed} units went on from a checkpoint; {self.datasets} "
            f"datasets of {self.images} images, each byte for byte that of an undisturbed run; 0 images lost, 0 doubled; "
            f"{time.monotonic() - begun:.0f} s"
        )

    def start(self) -> Run:
        ranks = self.draw.choice([1, 1, 2, 2, 2, 3])
        return Run(self.work, self.out, self.images, ranks, self.draw.choice([0, 1]), self.draw.choice([0, 7]))

    def let_it_work(self, run: Run) -> None:
        """For a random time: one in four while it starts, the others while it works."""
        if self.draw.random() < 0.25:
            moment = self.draw.uniform(0.5, max(0.6, self.startup))
        else:
            while not run.has_opened() and not run.ended():
                time.sleep(0.01)
            moment = self.draw.uniform(0, 3)
        end = time.monotonic() + moment
        while not run.ended() and time.monotonic() < end:
            time.sleep(0.01)

    def kill(self, run: Run) -> Run | None:
        """Kills something of the run; returns it where torchrun starts its ranks again, None where it has ended."""
        number = self.draw.choice([signal.SIGKILL] * 3 + [signal.SIGTERM])
        pids = run.processes()
        kind = "alone" if run.ranks == 1 else self.draw.choice(["torchrun", "a rank", "all"])
        if kind == "a rank" and not pids:
            kind = "torchrun"
        victims = {"alone": pids, "torchrun": [run.process.pid], "a rank": [self.draw.choice(pids or [0])]}
        for pid in victims.get(kind, [run.process.pid, *pids]):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass  # it has just ended
        self.count[f"{number.name} of {kind if kind != 'alone' else 'a single process'}"] += 1
        goes_on = kind == "a rank" and run.restarts > 0
        if goes_on:
            run.restarts -= 1
        else:
            run.wait_for_end(pids)
        print(
            f"{sum(self.count.values()):3d}: {number.name} for {kind}, ranks: {run.ranks}, {time.time() - run.started:.1f} s "
            f"after the start; {len(self.committed)} of {self.images} images before",
            flush=True,
        )
        return run if goes_on else None

    def check(self) -> None:
        """What was committed before is there, and nothing twice."""
        if not (self.out / "card.json").exists():
            return
        findings = inspect(self.out)
        if bad := [problem for problem in findings.problems if not any(text in problem for text in ALLOWED)]:
            raise SystemExit("chaos: " + "\n".join(bad))
        now = {entry.id: entry.sha256 for entry in read_store(self.out).entries}
        if lost := {image for image, sha256 in self.committed.items() if now.get(image) != sha256}:
            raise SystemExit(f"chaos: lost or changed: {sorted(lost)}")
        self.committed = now
        if read_store(self.out).complete:  # there is no work left to disturb
            self.finish(Run(self.work, self.out, self.images, 1, 0, 0))
        self.resumed += len(list(self.out.glob("checkpoints/*.safetensors")))

    def finish(self, run: Run) -> None:
        """Lets the run come to its end, and looks at the whole dataset."""
        if run.process.wait():
            raise SystemExit(f"chaos: a run failed by itself\n{run.said()}")
        self.compare()

    def compare(self) -> None:
        expected, got = tree(self.reference), tree(self.out)
        if different := sorted(name for name in {*expected, *got} if expected.get(name) != got.get(name)):
            raise SystemExit(f"chaos: different from the undisturbed run: {different}")
        self.datasets += 1
        self.committed = {}
        shutil.rmtree(self.out)


def tree(root: Path) -> dict[str, bytes | None]:
    """Every file and folder below root."""
    return {path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments, the victims and the numbers of ranks (default 0)")
    parser.add_argument("--images", type=int, default=60, help="of each dataset, a multiple of 3 (default 60)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        Chaos(Path(work), args.kills, args.seed, args.images).main()


if __name__ == "__main__":
    main()
