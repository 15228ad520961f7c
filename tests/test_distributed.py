"""One run on many ranks: the same bytes for any number of them, whenever which of them is stopped or killed.

Run as a script, this file is the process that forks the ranks: see `nursery`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bnfuse import InputError, SynthesisConfig, synthesize
from bnfuse.cli import main
from bnfuse.distributed import Ranks, choose_device
from bnfuse.manifest import read_store, verify
from bnfuse.models import Teacher, freeze
from bnfuse.networks import CifarResNet
from bnfuse.preprocessing import Preprocessing

CONFIG = SynthesisConfig(
    images_per_class=6, classes=(0, 1, 2), batch_size=2, iterations=12, targets="running", jitter=1, flip=True, soft_labels=True
)


def teacher() -> Teacher:
    torch.manual_seed(0)
    return Teacher(freeze(CifarResNet(8, 10, 1, width=4)), "custom", 10, Preprocessing((8, 8), (0.3,), (0.3,)))


def tree(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What a process of its own found, which forked the ranks: see `nursery`."""
    here = Path(__file__).resolve()
    paths = [str(here.parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, here, tmp_path_factory.mktemp("nursery")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_any_number_of_ranks_gives_the_same_bytes(found):
    assert found["same"] == {"2": True, "3": True, "4": True}


def test_the_first_rank_of_a_team_commits(found):
    assert found["team"] == {"codes": [0] * 4, "problems": [], "ids": True}


def test_a_team_stops_together(found):
    """One rank of a team is told to stop: all of them do after the same step, and the first keeps the unit."""
    assert found["one_of_a_team"]["codes"] == [143, 143] and found["one_of_a_team"]["checkpoints"] == 1
    assert found["one_of_a_team"]["went_on"] and found["one_of_a_team"]["problems"] == []


def test_a_team_that_loses_a_rank_ends(found):
    assert (
        found["lost"]["codes"] == [2, -signal.SIGKILL] and "another rank has ended before the run did" in found["lost"]["said"]
    )


def test_terminated_ranks_keep_their_units(found):
    """SIGTERM and SIGINT in the middle of long units: exit status, checkpoints, the same bytes on another number of ranks."""
    for name, code in (("SIGTERM", 143), ("SIGINT", 130)):
        assert found[name]["codes"] == [code] * 2 and found[name]["checkpoints"] == 2
        assert "unit 0 goes on after step" in found[name]["said"] and "0 of 4 images are safe" in found[name]["said"]
        assert found[name]["went_on"] and found[name]["same"]


def test_killed_ranks_lose_nothing(found):
    assert found["killed"] == 5 and found["lost_images"] == 0 and found["killed_same"]


def test_a_second_run_is_refused_on_every_rank(found):
    assert found["second"]["codes"] == [2, 2] and "another process is writing to" in found["second"]["said"]
    assert found["second"]["first"] == [0, 0] and found["second"]["same"]


def test_an_error_of_the_first_rank_ends_them_all(found):
    assert found["error"]["codes"] == [2, 2] and found["error"]["said"].count("begun with other settings") == 1


def test_under_torchrun_a_rank_that_dies_starts_again(tmp_path):
    """SIGKILL for one rank; torchrun ends the other with SIGTERM, starts both again, and they go on."""
    (tmp_path / "net.py").write_text(
        "import torch\nfrom bnfuse.networks import CifarResNet\n\n\ndef net():\n    torch.manual_seed(0)\n"
        "    return CifarResNet(8, 10, 1, width=4)\n"
    )
    flags = ["--teacher", tmp_path / "net.py:net", *"--image-size 8 --mean 0.3 --std 0.3 --targets running".split()]
    flags += "--images-per-class 10 --classes 0 1 2 --batch-size 2 --iterations 20 --device cpu --threads 1".split()
    launcher = [sys.executable, "-m", "torch.distributed.run", *"--nproc-per-node 2 --max-restarts 1".split()]
    launcher += ["--master-port", free_port(), "-m", "bnfuse", "synthesize"]
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    log = open(tmp_path / "log", "w")
    run = subprocess.Popen(
        [*map(str, [*launcher, *flags, "--out", tmp_path / "ranks"])], env=environment, stderr=log, stdout=log
    )
    shard = tmp_path / "ranks" / "manifest.0001.jsonl"
    wait_until(lambda: shard.exists() and shard.stat().st_size, run, 120)
    (victim,) = [pid for pid in children(run.pid) if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(victim, signal.SIGKILL)
    before = len(read_store(tmp_path / "ranks").entries)
    assert run.wait(timeout=200) == 0, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    assert "stopped by SIGTERM" in said and "30 images, " in said and "30 made now" not in said and before >= 2
    assert main([*map(str, ["synthesize", *flags, "--out", tmp_path / "one"])]) == 0
    assert tree(tmp_path / "ranks") == tree(tmp_path / "one")


class TestEnvironment:
    """What torchrun's variables lead to, without other ranks."""

    def test_without_torchrun(self):
        ranks = Ranks.start()
        assert (ranks.rank, ranks.world, ranks.teams, ranks.team.size, ranks.first, ranks.writes) == (0, 1, 1, 1, True, True)
        assert ranks.from_first(lambda: [1]) == [1]
        assert choose_device("cpu").type == "cpu"

    @pytest.mark.parametrize("world, team", [("1", 2), ("3", 2), ("4", 3), ("4", 0)])
    def test_teams_that_do_not_divide_the_ranks(self, monkeypatch, world, team):
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(
            InputError, match=f"{world} ranks cannot be divided into teams of {team}: choose .*--nproc-per-node"
        ):
            Ranks.start(team)

    def test_half_an_environment(self, monkeypatch):
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(InputError, match="RANK, MASTER_ADDR, MASTER_PORT is not set: start the ranks with torchrun"):
            Ranks.start()
        monkeypatch.setenv("WORLD_SIZE", "two")
        with pytest.raises(InputError, match="WORLD_SIZE is 'two'"):
            Ranks.start()

    def test_each_rank_its_own_gpu(self, monkeypatch):
        for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        chosen = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        assert choose_device() == choose_device("cuda") == torch.device("cuda", 1) == chosen[-1]
        assert choose_device("cpu") == torch.device("cpu")
        assert choose_device("cuda:0") == torch.device("cuda", 0) == chosen[-1]
        monkeypatch.setenv("LOCAL_RANK", "2")
        with pytest.raises(InputError, match="rank 3 is number 2 on its host, which has 2 GPUs: .*--nproc-per-node 2"):
            choose_device()


# ---- the nursery ----


def nursery(root: Path) -> dict:
    """Fork worlds of ranks, and end some of them early. A fresh process does this, since one in which torch has computed
    gradients should not fork, and since importing torch anew for each rank would take longer than all else."""
    fsync, os.fsync = os.fsync, lambda descriptor: None
    reference, long = root / "one", dict(images_per_class=2, classes=(0, 1), iterations=150, jitter=1)
    assert world(1, reference).codes() == [0]
    expected = tree(reference)
    found = {"same": {}}
    for size in (2, 3, 4):
        run = world(size, root / str(size))
        found["same"][size] = run.codes() == [0] * size and tree(run.out) == expected

    run = world(4, root / "team", ranks_per_batch=2)
    codes = run.codes()
    ids = [[(e.id, e.seed, e.unit) for e in read_store(path).entries] for path in (reference, run.out)]
    found["team"] = {"codes": codes, "problems": verify(run.out), "ids": ids[0] == ids[1]}

    config = SynthesisConfig(batch_size=2, targets="running", **long)
    assert world(1, root / "long", config=config).codes() == [0]
    for number in (signal.SIGTERM, signal.SIGINT):
        run = world(2, root / number.name, config=config)
        wait_until(lambda run=run: (run.out / "card.json").exists())
        time.sleep(0.15)
        run.signal(number)
        result = {"codes": run.codes(), "said": run.said()}
        result["checkpoints"] = len(list((run.out / "checkpoints").iterdir()))
        again = world(3, run.out, config=config)
        found[number.name] = result | {"went_on": again.codes() == [0] * 3, "same": tree(run.out) == tree(root / "long")}

    def two_of_a_team(name: str) -> world:
        run = world(2, root / name, config=config, ranks_per_batch=2)
        wait_until(lambda: (run.out / "card.json").exists())
        time.sleep(0.15)
        return run

    run = two_of_a_team("one_of_a_team")
    os.kill(run.pids[1], signal.SIGTERM)
    result = {"codes": run.codes(), "checkpoints": len(list((run.out / "checkpoints").iterdir()))}
    result["went_on"] = world(2, run.out, config=config, ranks_per_batch=2).codes() == [0, 0]
    found["one_of_a_team"] = result | {"problems": verify(run.out)}
    run = two_of_a_team("lost")
    os.kill(run.pids[1], signal.SIGKILL)
    found["lost"] = {"codes": run.codes(), "said": run.said()}

    moments, target = random.Random(0), root / "killed"
    found |= {"killed": 0, "lost_images": 0, "killed_same": True}
    committed = 0
    while found["killed"] < 5:
        run = world(moments.randint(1, 4), target)
        time.sleep(moments.uniform(0.1, 0.6))
        os.kill(moments.choice(run.pids), signal.SIGKILL)
        time.sleep(0.05)
        run.signal(signal.SIGTERM)  # as torchrun does with the others
        found["killed"] += -signal.SIGKILL in run.codes()
        contents = read_store(target) if (target / "card.json").exists() else None
        now = len(contents.entries) if contents else 0
        found["lost_images"] += max(0, committed - now)
        committed = now
        if contents and contents.complete:  # begin once more
            found["killed_same"] &= world(1, target).codes() == [0] and tree(target) == expected
            shutil.rmtree(target)
            committed = 0
    found["killed_same"] &= world(2, target).codes() == [0, 0] and tree(target) == expected

    run = world(2, root / "first", config=config)
    wait_until(lambda: (run.out / "card.json").exists())
    second = world(2, run.out, config=config)
    codes, said = second.codes(), second.said()
    found["second"] = {"codes": codes, "said": said, "first": run.codes(), "same": tree(run.out) == tree(root / "long")}

    run = world(2, reference, config=config)
    found["error"] = {"codes": run.codes(), "said": run.said()}
    os.fsync = fsync
    return found


class world:
    """Forked ranks that make the dataset `out`, as `bnfuse synthesize` does under torchrun."""

    def __init__(self, size: int, out: Path, **options):
        self.out, self.log = out, out.with_name(out.name + ".log")
        environment = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        self.pids = []
        for rank in range(size):
            child = os.fork()
            if not child:
                self._work(environment | {"RANK": rank, "LOCAL_RANK": rank}, options)
            self.pids.append(child)

    def _work(self, environment: dict, options: dict) -> None:
        from bnfuse import cli

        os.environ.update({name: str(value) for name, value in environment.items()})
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        config = options.pop("config", CONFIG)

        class Parser:
            """In the place of the command line's own: all else of `main` runs as it is."""

            def parse_args(self, argv):
                return self

            def run(self, args):
                synthesize(teacher(), None, out, config, device="cpu", progress=False, threads=1, **options)

        out, cli._parser = self.out, Parser
        code = 1
        try:
            code = cli.main([])
        finally:
            sys.stderr.flush()
            os._exit(code)

    def signal(self, number: int) -> None:
        for pid in self.pids:
            os.kill(pid, number)

    def codes(self) -> list[int]:
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]

    def said(self) -> str:
        return self.log.read_text()


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def wait_until(true, process: subprocess.Popen | None = None, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end or (process is not None and process.poll() is not None):
            raise TimeoutError("what was waited for did not come")
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(nursery(Path(sys.argv[1]))))
