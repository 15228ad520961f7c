"""docs/fidelity.md's tables and picture, and README's table, from the results that `fidelity.py` keeps. Measures nothing."""

from __future__ import annotations

import statistics as stats
from dataclasses import dataclass
from pathlib import Path

import fidelity_cases
from fidelity_ablations import ABLATIONS, Variant
from fidelity_cases import PROBLEMS, Case, Problem
from report import ROOT, markdown, write_block

from bnfuse.audit.intervals import clopper_pearson
from bnfuse.configs import flags
from bnfuse.recipes import RECIPES

PAGE, PICTURE, README = ROOT / "docs/fidelity.md", ROOT / "docs/images/fidelity.png", ROOT / "README.md"
COMMAND = "python benchmarks/fidelity.py report"
NOTHING = "Nothing is kept yet."
ARMS = {
    "all_real": "all real images",
    "real": "as many real images",
    "recipe": "synthetic",
    "global": "synthetic, targets of all classes pooled",
    "noise": "noise",
}
LABELS = {"hard": "hard", "soft": "soft", "views": "soft, of each view"}
SPLITS = {"test": "test images", "heldout": "held-out training images"}


@dataclass(frozen=True)
class Seeds:
    """The results of cases that differ by their seed alone; one at least."""

    cases: list[Case]
    results: list[dict]

    def mean(self, name: str) -> float:
        return stats.fmean(result[name] for result in self.results)

    @property
    def spread(self) -> float | None:
        """The standard deviation of the accuracy over seeds; None of one."""
        accuracies = [result["accuracy"] for result in self.results]
        return stats.stdev(accuracies) if len(accuracies) > 1 else None

    @property
    def interval(self) -> tuple[float, float]:
        """Clopper and Pearson's, of the mean accuracy: other images like those that were tested on, the same students."""
        tested = self.results[0]["tested"]
        return clopper_pearson(round(self.mean("accuracy") * tested), tested)

    @property
    def mean_text(self) -> str:
        spread = "" if self.spread is None else f" ± {100 * self.spread:.1f}"
        return f"{100 * self.mean('accuracy'):.1f}{spread}"

    @property
    def accuracy_text(self) -> str:
        low, high = self.interval
        return f"{self.mean_text} ({100 * low:.0f}–{100 * high:.0f})"


Rung = tuple[str, str, "int | None", str]  # arm, labels, images of each class, student


def gathered(cases: list[Case], split: str) -> dict[Rung, Seeds]:
    """What is kept of the cases, in their order."""
    found: dict[Rung, list[tuple[Case, dict]]] = {}
    for case in cases:
        if (result := case.kept(split)) is not None:
            found.setdefault((case.arm, case.labels, case.ipc, case.student), []).append((case, result))
    return {rung: Seeds(*map(list, zip(*pairs))) for rung, pairs in found.items()}


def split_shown(cases: list[Case]) -> str | None:
    """The test images where any case has been tested on them, else the held-out ones; None where nothing is kept."""
    return next((split for split in SPLITS if any(case.kept_at(split).is_file() for case in cases)), None)


# ---- blocks ----


def curves_block(problem: Problem) -> str:
    cases = fidelity_cases.curves(problem)
    if (split := split_shown(cases)) is None:
        return ""
    rungs = gathered(cases, split)
    return "\n\n".join((f"## {problem.title}", *ladder(problem, rungs, split), details(rungs)))


def ladder(problem: Problem, rungs: dict[Rung, Seeds], split: str) -> list[str]:
    """On what the curves were measured, and the accuracies."""
    ipcs = sorted({ipc for _, _, ipc, _ in rungs if ipc is not None})
    rows = [["the student learns from", "labels", *(f"{ipc} a class" for ipc in ipcs), "all"]]
    arms = [(name or source, labels) for source, name, labels in fidelity_cases.LADDER]
    for arm, labels in sorted(arms, key=lambda each: list(ARMS).index(each[0])):
        cells = [rungs.get((arm, labels, ipc, problem.student)) for ipc in (*ipcs, None)]
        if any(cells):
            rows.append([ARMS[arm], LABELS[labels], *(cell.accuracy_text if cell else "" for cell in cells)])
    return [_about(problem, rungs, split), markdown(rows)]


def details(rungs: dict[Rung, Seeds]) -> str:
    """Everything but the accuracy."""
    rows = [["beside the accuracy", "labels", "images", "agreement", "calibration", "diversity", "synthesis, s", "training, s"]]
    for (arm, labels, ipc, _), seeds in rungs.items():
        rows.append(
            [
                ARMS[arm],
                LABELS[labels],
                "all" if ipc is None else f"{ipc} a class",
                f"{seeds.mean('agreement'):.1%}",
                f"{seeds.mean('calibration_error'):.3f}",
                f"{seeds.mean('diversity'):.2f}",
                f"{seeds.mean('synthesis_seconds'):.0f}" if seeds.cases[0].made else "",
                f"{seeds.mean('train_seconds'):.0f}",
            ]
        )
    return markdown(rows)


def students_block(problem: Problem) -> str:
    """Rungs by students, that of the curves first."""
    others = fidelity_cases.students(problem)
    if (split := split_shown(others)) is None:
        return ""
    ipc = others[0].ipc
    rungs = gathered([case for case in fidelity_cases.curves(problem) if case.ipc == ipc], split) | gathered(others, split)
    names = [problem.student, *fidelity_cases.CROSS_STUDENTS]
    rows = [[f"{problem.title}, {ipc} images a class", "labels", *names]]
    for arm, labels in dict.fromkeys((case.arm, case.labels) for case in others):
        cells = [rungs.get((arm, labels, ipc, name)) for name in names]
        rows.append([ARMS[arm], LABELS[labels], *(cell.accuracy_text if cell else "" for cell in cells)])
    return markdown(rows)


def ablations_block(problem: Problem) -> str:
    """A row a variant of which something is kept, against the first."""
    cases = fidelity_cases.ablations(problem)
    rungs = gathered(cases, "heldout")
    if not rungs:
        return ""
    ipc, kinds = cases[0].ipc, [kind for kind in LABELS if any(labels == kind for _, labels, _, _ in rungs)]
    base = {kind: rungs.get((ABLATIONS[0].name, kind, ipc, problem.student)) for kind in kinds}
    head = [f"{problem.title}, {ipc} images a class", "of", "what is otherwise"]
    rows = [[*head, *(f"labels: {LABELS[kind]}" for kind in kinds), "diversity", "synthesis, s"]]
    for variant in ABLATIONS:
        found = {kind: rungs.get((variant.name, kind, ipc, problem.student)) for kind in kinds}
        if first := next(filter(None, found.values()), None):
            accuracies = [_against(found[kind], base[kind] if variant is not ABLATIONS[0] else None) for kind in kinds]
            costs = [f"{first.mean('diversity'):.2f}", f"{first.mean('synthesis_seconds'):.0f}"]
            rows.append([variant.name, variant.part, _changes(variant, problem), *accuracies, *costs])
    tested, seeds = first_result(rungs)["tested"], max(len(found.results) for found in rungs.values())
    drawn = "one seed of images and student"
    if seeds > 1:
        drawn = f"mean over as many as {seeds} seeds of images and student, ± their standard deviation where there are several"
    about = f"On {tested:,} {SPLITS['heldout']}, {drawn}. {_where(rungs)}"
    return f"{about}\n\n{markdown(rows)}"


def _against(found: Seeds | None, base: Seeds | None) -> str:
    if found is None:
        return ""
    difference = "" if base is None else f" ({100 * (found.mean('accuracy') - base.mean('accuracy')):+.1f})"
    return f"{found.mean_text}{difference}"


def _changes(variant: Variant, problem: Problem) -> str:
    """As flags, as far as they are some of `bnfuse synthesize`."""
    cut = {"micro_batch": variant.micro_batch} if variant.micro_batch else {}
    parts = [flags(fidelity_cases.changed(variant, problem) | cut)]
    if variant.teachers:
        parts.append(f"--more-teachers {' '.join(variant.teachers)}")
    if variant.record:
        parts.append(f"recorded with {flags(variant.record)}")
    if variant.training:
        parts.append(f"trained with {flags(variant.training)}")
    text = " ".join(filter(None, parts))
    return f"`{text}`" if text else ""


def _about(problem: Problem, rungs: dict[Rung, Seeds], split: str) -> str:
    first, seeds = first_result(rungs), max(len(found.results) for found in rungs.values())
    averaged = "One seed of the student"
    if seeds > 1:
        averaged = (
            f"Mean over as many as {_count(seeds, 'seed')} of the student, ± their standard deviation where there are several"
        )
    steps = ", ".join(f"{'all' if ipc is None else ipc}: {steps:,}" for ipc, steps in problem.steps.items())
    more = RECIPES[problem.recipe].more_teachers
    further = f", of the synthesis {' and '.join(more)} too" if more else ""
    teacher = f"teacher {problem.teacher} ({first['teacher_accuracy']:.1%}){further}"
    batches = f" with `{flags(problem.batches)}`" if problem.batches else ""
    return (
        f"Per cent of {first['tested']:,} {SPLITS[split]}; {teacher}, "
        f"student {problem.student} from scratch, recipe `{problem.recipe}`{batches}. "
        f"{averaged}, and in brackets the 95 % interval. "
        f"Steps of a student at images of each class: {steps}. {_where(rungs)}"
    )


def _where(rungs: dict[Rung, Seeds]) -> str:
    """Machine, versions and command of the first result."""
    first = first_result(rungs)
    threads = _count(first["threads"], "thread")
    return f"{first.get('gpu', first['processor'])}, {threads}, torch {first['torch']}, {first['date']}; `{first['command']}`."


def first_result(rungs: dict[Rung, Seeds]) -> dict:
    return next(iter(rungs.values())).results[0]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number > 1)}"


# ---- the picture ----

STYLES = {  # arm, labels → colour and line
    ("real", "hard"): ("black", "-"),
    ("real", "views"): ("grey", "-"),
    ("recipe", "views"): ("#0b6e4f", "-"),
    ("recipe", "soft"): ("#0b6e4f", "--"),
    ("recipe", "hard"): ("#0b6e4f", ":"),
    ("global", "views"): ("#f4a259", "-"),
    ("global", "soft"): ("#f4a259", "--"),
    ("noise", "views"): ("#bc4b51", "-"),
    ("noise", "soft"): ("#bc4b51", "--"),
    ("noise", "hard"): ("#bc4b51", ":"),
}


def draw(curves: dict[str, dict[Rung, Seeds]], path: Path) -> None:
    """Accuracy against images of each class, a panel for each problem, with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(curves), figsize=(5.5 * len(curves), 5.2), squeeze=False, layout="constrained")
    for panel, (name, rungs) in zip(panels[0], curves.items()):
        for (arm, labels), (colour, line) in STYLES.items():
            points = [(rung[2], seeds) for rung, seeds in rungs.items() if rung[:2] == (arm, labels)]
            points.sort(key=lambda point: point[0])
            if points:
                ipcs, means = zip(*((ipc, 100 * seeds.mean("accuracy")) for ipc, seeds in points))
                low, high = zip(*((100 * end for end in seeds.interval) for _, seeds in points))
                below, above = [m - end for m, end in zip(means, low)], [end - m for m, end in zip(means, high)]
                style = dict(color=colour, linestyle=line, marker="o", markersize=4, capsize=2, linewidth=1.4)
                panel.errorbar(ipcs, means, yerr=[below, above], label=f"{ARMS[arm]}, {LABELS[labels]}", **style)
        ceiling = next((seeds.mean("accuracy") for (arm, *_), seeds in rungs.items() if arm == "all_real"), None)
        if ceiling is not None:
            panel.axhline(100 * ceiling, color="black", linewidth=0.8, linestyle="-.", label=ARMS["all_real"])
        ticks = sorted({ipc for _, _, ipc, _ in rungs if ipc is not None})
        panel.set(title=PROBLEMS[name].title, xlabel="images of each class", ylabel="accuracy, %", xscale="log", ylim=(0, 100))
        panel.set_xticks(ticks, map(str, ticks))
        panel.minorticks_off()
        panel.grid(True, color="#e5e5e5")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_report() -> None:
    cases = {name: fidelity_cases.curves(problem) for name, problem in PROBLEMS.items()}
    drawn = {name: gathered(of, split) for name, of in cases.items() if (split := split_shown(of))}
    curves = [curves_block(problem) for problem in PROBLEMS.values()]
    if drawn:
        draw(drawn, PICTURE)
        curves.insert(0, f"![Accuracy against images of each class](images/{PICTURE.name})")
    for name, blocks in {
        "curves": curves,
        "students": [students_block(problem) for problem in PROBLEMS.values()],
        "ablations": [ablations_block(problem) for problem in PROBLEMS.values()],
    }.items():
        write_block(PAGE, name, "\n\n".join(filter(None, blocks)) or NOTHING)
    name = "cifar10"
    shown = ladder(PROBLEMS[name], drawn[name], split_shown(cases[name])) if name in drawn else [NOTHING]
    write_block(README, name, "\n\n".join(shown))
    print(f"wrote {PAGE} and {README}")
