"""Keeps an audit of a public dataset: its figures in benchmarks/results, table and pictures in docs/audit.md.

    bnfuse audit … --budget standard --out runs/cifar10_audit
    python benchmarks/audit_page.py runs/cifar10_audit     # into benchmarks/results, docs/audit.md and docs/images/audit
    python benchmarks/audit_page.py --report               # the page once more, from the results

Pictures are kept as anybody may see them, without private images.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path

from report import ROOT, markdown, write_block
from results_file import RESULTS

from bnfuse.audit import ARMS
from bnfuse.audit.findings import VOID, Finding, Picture
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


def keep(out: Path) -> dict:
    """Copies an audit's figures, and its pictures without private images, to where the page has them from; returns the
    figures."""
    record = json.loads((out / RECORD).read_text())
    shutil.rmtree(PICTURES, ignore_errors=True)
    PICTURES.mkdir(parents=True)
    for finding in record["findings"]:
        pictures = [*filter(None, (Picture(**picture).published() for picture in finding["pictures"]))]
        for picture in pictures:
            shutil.copy(out / picture.path, PICTURES)
        finding["pictures"] = [asdict(picture) for picture in pictures]
    write_atomically(RESULTS / f"{NAME}.json", (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audit", nargs="?", type=Path, metavar="DIR", help="the folder that `bnfuse audit --out` named")
    parser.add_argument("--report", action="store_true", help="write the page from the results that are kept")
    args = parser.parse_args()
    if args.report == (args.audit is not None):
        parser.error("give the folder of an audit, or --report")
    write_report(json.loads((RESULTS / f"{NAME}.json").read_text()) if args.report else keep(args.audit))


if __name__ == "__main__":
    main()
