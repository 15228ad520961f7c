"""docs/recipes.md: each recipe's settings, and beside them what has been measured with it; README's table. Measures nothing.

    python benchmarks/recipes_page.py

writes them once more, from `bnfuse/recipes.py` and benchmarks/results.
"""

from __future__ import annotations

import json
import textwrap

import fidelity_cases
import fidelity_page
from fidelity_page import gathered, ladder
from report import ROOT, markdown, write_block
from results_file import RESULTS

from bnfuse.configs import flags
from bnfuse.recipes import RECIPES, settings

PAGE, README = ROOT / "docs/recipes.md", ROOT / "README.md"

# What recipes.py measures, in the words of the page.
STUDENTS = {
    "real_hard": "as many real images, hard labels",
    "synthetic_views": "synthetic images, soft labels of each view",
    "synthetic_soft": "synthetic images, soft labels",
    "synthetic_hard": "synthetic images, hard labels",
    "noise_hard": "noise, hard labels",
}
DEMO = {
    "real_student_accuracy": "the private digits",
    "synthetic_student_accuracy": "synthetic digits, soft labels of each view",
    "synthetic_hard_student_accuracy": "synthetic digits, hard labels",
    "noise_student_accuracy": "noise, soft labels of each view",
    "noise_hard_student_accuracy": "noise, hard labels",
}


def write_page() -> None:
    """Every recipe's block of the page, from the table and the results that are there."""
    for name in RECIPES:
        write_block(PAGE, name, "\n\n".join([*described(name), *measured(name)]))
    if (result := _result("recipe_imagenet")) is not None:
        write_block(README, "imagenet", "\n\n".join(_of_recipe("imagenet", result, "")))


def described(name: str) -> list[str]:
    """What a recipe is for and its settings, in paragraphs."""
    chosen = RECIPES[name]
    parts = [f"For {chosen.purpose}.", "\n".join(_command(command, given) for command, given in settings(name).items())]
    if chosen.more_teachers:
        parts += _further_teachers(name)
    return parts


def _further_teachers(name: str) -> list[str]:
    """How those that the recipe has are made."""
    models, training = RECIPES[name].more_teachers, flags(RECIPES[name].teacher_training)
    weights, statistics = (" ".join(f"runs/{model}{end}" for model in models) for end in ("/model.safetensors", ".safetensors"))
    commands = [
        command
        for model in models
        for command in (
            ("train", f"--model {model} {training} --data … --out runs/{model}"),
            ("record", f"--teacher runs/{model}/model.safetensors --data … --out runs/{model}.safetensors"),
        )
    ] + [("synthesize", f"--recipe {name} --more-teachers {weights} --more-statistics {statistics}")]
    return [
        "Further teachers are asked for what the first does not look at. They learn the same private images, with the first's "
        "image flags, and the synthesis is given them with their own statistics:",
        "\n".join(_command(*command) for command in commands),
    ]


def _command(name: str, given: str) -> str:
    lines = textwrap.wrap(f"bnfuse {name} … {given}", 112, break_on_hyphens=False)
    return textwrap.indent(" \\\n    ".join(lines), " " * 4)


def measured(name: str) -> list[str]:
    """Tables of the figures that have been kept, each with where they are from."""
    result = _result(f"recipe_{name}")
    parts = [] if result is None else _of_recipe(name, result)
    if name == "digits" and (demo := _result("demo")) is not None:
        parts += _of_demo(demo)
    for problem in fidelity_cases.PROBLEMS.values():
        cases = fidelity_cases.curves(problem)
        if problem.recipe == name and (split := fidelity_page.split_shown(cases)):
            parts += [f"**{problem.title}** ([more](fidelity.md)).", *ladder(problem, gathered(cases, split), split)]
    return parts


def _of_recipe(name: str, result: dict, to_root: str = "../") -> list[str]:
    percent = result["percent"]
    rows = [[text, f"{percent[key]:.1f} %"] for key, text in STUDENTS.items() if key in percent]
    tables = [markdown([["a student trained on", "accuracy on real images"], *rows])] if rows else []
    teacher, judge, of_real = (percent[key] for key in ("recognised_by_teacher", "recognised_by_judge", "judge"))
    recognised = (
        f"The teacher takes {teacher:.0f} % of the images for what was asked of them; a ResNet-20 that learnt the private "
        f"images at 64×64, and had no part in making these, {judge:.1f} %. Of real images that it has not seen it knows "
        f"{of_real:.1f} %. "
        f"torch {result['torch']}, {result['date']}; `{result['command']}` "
        f"([result]({to_root}benchmarks/results/recipe_{name}.json))."
    )
    return [*tables, recognised]


def _of_demo(demo: dict) -> list[str]:
    rows = [[text, f"{demo[key]:.1%}".replace("%", " %")] for key, text in DEMO.items()]
    return [
        markdown([["a student trained on", "accuracy on real digits"], *rows]),
        f"{demo['images']:,} synthetic images, made in {demo['synthesis_seconds']:.0f} s. torch {demo['torch']}, "
        f"{demo['date']}; `bnfuse demo` ([result](../benchmarks/results/demo.json)).",
    ]


def _result(name: str) -> dict | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


if __name__ == "__main__":
    write_page()
    print(f"wrote {PAGE}")
