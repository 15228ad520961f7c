"""Every `bnfuse` command that README and docs/ show is one that the command line takes: bash reads it, the parser checks it."""

import argparse
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from bnfuse.cli import _parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWING = [page for page in PAGES if re.search("^    (bnfuse|torchrun) ", page.read_text(), re.MULTILINE)]
LEFT_OUT = "…"  # alone: further arguments; after an option: a value of the reader's
PRELUDE = """
bnfuse() { printf '%q ' "$@"; echo; }
torchrun() { while [ $# -gt 0 ] && [ "$1" != bnfuse ]; do shift; done; shift; bnfuse "$@"; }
"""


def commands(page: Path) -> list[list[str]]:
    """The arguments of each command of the page's code blocks, its variables put in."""
    blocks = re.findall(r"(?:^    \S.*\n(?:^    .*\n)*)", page.read_text(), re.MULTILINE)
    shown = [block for block in blocks if re.search(r"^    (bnfuse|torchrun|[A-Z]=)", block, re.MULTILINE)]
    script = PRELUDE + "\n".join(shown)
    environment = {"PATH": "", "LC_ALL": "C.UTF-8"}  # nothing else is to run
    done = subprocess.run([shutil.which("bash"), "-c", script], capture_output=True, text=True, env=environment, check=False)
    return [shlex.split(line) for line in done.stdout.splitlines()]


def parser(complete: bool) -> argparse.ArgumentParser:
    """The command line's; unless the command is complete, nothing is required."""
    whole = _parser()
    if not complete:
        subcommands = next(action for action in whole._actions if isinstance(action, argparse._SubParsersAction))
        for action in [action for sub in subcommands.choices.values() for action in sub._actions]:
            action.required = False
    return whole


def refused(arguments: list[str], capsys) -> str:
    """What the parser has against it; nothing if it takes it."""
    complete = arguments[1:2] != [LEFT_OUT]
    arguments = arguments if complete else [arguments[0], *arguments[2:]]
    try:
        parser(complete and LEFT_OUT not in arguments).parse_args(arguments)
    except SystemExit:
        return capsys.readouterr().err.splitlines()[-1]
    return ""


@pytest.mark.skipif(shutil.which("bash") is None, reason="pages are read with bash, which is not installed")
@pytest.mark.parametrize("page", SHOWING, ids=lambda page: page.stem)
def test_the_commands_that_a_page_shows_are_taken(page, capsys):
    found = commands(page)
    assert found, "no command was read from it"
    assert len(found) == len(re.findall(r"^    (?:bnfuse|torchrun)\b", page.read_text(), re.MULTILINE))
    assert {shlex.join(arguments): why for arguments in found if (why := refused(arguments, capsys))} == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_scripts_that_a_page_names_are_there(page):
    named = set(re.findall(r"python ((?:benchmarks|tests|examples)/\w+\.py)", page.read_text()))
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_a_command_that_is_wrong_is_told(capsys):
    record = ["record", "--data", "d", "--teacher", "t", "--out", "x"]
    assert refused(record, capsys) == "" and "--teacer" in refused([*record, "--teacer", "t"], capsys)
    assert "required" in refused(["synthesize", "--out", "x"], capsys)
    assert refused(["synthesize", LEFT_OUT, "--out", "x"], capsys) == ""
    assert "invalid" in refused(["synthesize", LEFT_OUT, "--images-per-class", "many"], capsys)
