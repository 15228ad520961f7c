"""Keeps an audit of a public dataset: its figures in benchmarks/results, table and pictures in docs/audit.md.

    bnfuse audit … --budget standard --out runs/cifar10_audit
    python benchmarks/audit_page.py runs/cifar10_audit     # into benchmarks/results, docs/audit.md and docs/images/audit
    python benchmarks/audit_page.py --report               # the page once more, from the results

Pictures that show private images are to be left out (--without 'gan-*' 'quality-pairs' …) unless everybody may see these.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from report import ROOT, markdown, write_block
from results_file import RESULTS

from bnfuse.audit import ARMS
from bnfuse.audit.findings import VOID, Finding
from bnfuse.audit.report import ARM_NAMES, figure_text, interval_text
from bnfuse.audit.running import RECORD
from bnfuse.files import write_atomically

PAGE, PICTURES = ROOT / "docs/audit.md", ROOT / "docs/images/audit"
NAME, COMMAND = "audit", "python benchmarks/audit_page.py"


def write_report(record: dict) -> None:
    """The page's table and pictures, from the content of an audit.json whose pictures are in `PICTURES`."""
    findings = [Finding.from_dict(finding) for finding in record["findings"]]
    rows = [["measure", "figure", *(ARM_NAMES[arm] for arm in ARMS), "verdict", "what it means"]]
    for finding in findings:
        names = [row.figures[0].name for row in finding.rows if row.figures and row.arm in ARMS]
        meaning = _void(finding) if finding.verdict == VOID else finding.sentence
        cells = [_cell(finding, arm) for arm in ARMS]
        rows.append([finding.title, names[0] if names else "", *cells, f"**{finding.verdict}**", meaning])
    datasets = record["datasets"]
    made_of = ", ".join(f"{data['images']:,} {role} images ({data['name']})" for role, data in datasets.items())
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    parts = [
        f"{made_of}; {record['budget']} budget, seed {record['seed']}, on {record['device']}, {versions}, {record['date']} "
        f"([result](../benchmarks/results/{NAME}.json)). In brackets are 95 % intervals.",
        f"    {record['command']}",
        markdown([[_plain(cell) for cell in row] for row in rows]),
        *(f"**What was {part.replace('_', ' ')}.** {record['summary'][part]}" for part in ("asked", "found", "not_asked")),
    ]
    for finding in findings:
        for picture in finding.pictures:
            caption = _plain(picture.caption)
            parts.append(f"![{caption}](images/audit/{Path(picture.path).name})\n\n*{finding.title}: {caption}*")
    write_block(PAGE, "figures", "\n\n".join(parts))
    print(f"wrote {PAGE}")


def _cell(finding: Finding, arm: str) -> str:
    row = finding.row(arm)
    if row is None or not row.figures:
        return ""
    text, interval = figure_text(row.figures[0]), interval_text(row.figures[0])
    text = f"{text} ({interval})" if interval else text
    return f"~~{text}~~" if finding.verdict == VOID else text


def _void(finding: Finding) -> str:
    failed = "; ".join(f"{control.name}, needed {control.needed}" for control in finding.failed_controls)
    return f"Nothing either way: the attack failed where it had to succeed ({failed or 'no positive control'})."


def _plain(text: str) -> str:
    """On one line, and without what a table of Markdown is made of."""
    return " ".join(text.replace("|", "/").split())


def keep(out: Path, without: Sequence[str] = ()) -> dict:
    """Copies an audit's figures and pictures, but for those whose names fit a pattern of `without`, to where the page has them
    from; returns the figures."""
    record = json.loads((out / RECORD).read_text())
    for finding in record["findings"]:
        left = lambda picture: any(fnmatch(Path(picture["path"]).stem, pattern) for pattern in without)
        finding["pictures"] = [picture for picture in finding["pictures"] if not left(picture)]
    shutil.rmtree(PICTURES, ignore_errors=True)
    PICTURES.mkdir(parents=True)
    for finding in record["findings"]:
        for picture in finding["pictures"]:
            shutil.copy(out / picture["path"], PICTURES)
    write_atomically(RESULTS / f"{NAME}.json", (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audit", nargs="?", type=Path, metavar="DIR", help="the folder that `bnfuse audit --out` named")
    parser.add_argument("--report", action="store_true", help="write the page from the results that are kept")
    parser.add_argument("--without", nargs="+", default=[], metavar="PATTERN", help="names of pictures that are left out")
    args = parser.parse_args()
    if args.report == (args.audit is not None):
        parser.error("give the folder of an audit, or --report")
    write_report(json.loads((RESULTS / f"{NAME}.json").read_text()) if args.report else keep(args.audit, args.without))


if __name__ == "__main__":
    main()
