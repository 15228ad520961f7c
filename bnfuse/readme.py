"""The dataset card of an export: README.md as Hugging Face's Hub has it, with what people and `load_dataset` read."""

from __future__ import annotations

import json

from .labels import Labels
from .manifest import StoreContents

_DATA_FILES = {"webdataset": "train-*.tar", "parquet": "data/train-*.parquet", "imagefolder": "train/**"}

_LOADING = {
    "webdataset": """\
    import webdataset

    shards = [...]  # the tar files
    samples = webdataset.WebDataset(shards, shardshuffle=100).shuffle(5000).decode("pil").to_tuple("png", "cls")""",
    "parquet": """\
    from datasets import load_dataset

    images = load_dataset("PATH", split="train")  # columns image, label""",
    "imagefolder": """\
    from torchvision.datasets import ImageFolder

    images = ImageFolder("PATH/train")""",
}

_SOFT_LABELS = {
    "webdataset": "each sample's `logits.npy`",
    "parquet": "the column `logits`",
    "imagefolder": "`soft_labels`, a file a class folder, rows in the order of the images' names",
}

_VIEWS = """\
`relabel` has {count:,} augmented views of each image with the logits of {teacher}, float16. `bnfuse.Labels("PATH/relabel")`
reads them; each view's `index` is a place in `relabel/ids.json`, which lists the images by their files' names."""


def readme(contents: StoreContents, format: str, labels: Labels | None = None) -> str:
    """Markdown, with the Hub's front matter; nothing in it depends on the time or the machine. `labels` are what went along."""
    card, names = contents.card, contents.class_names
    count = len(contents.entries)
    front = {
        "pretty_name": contents.root.resolve().name,
        "task_categories": ["image-classification"],
        "tags": ["synthetic", "bnfuse"],
        "size_categories": [_size_category(count)],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": _DATA_FILES[format]}]}],
    }
    facts = {
        "images": f"{count:,}, {card['counts'][0]:,} a class" if len(set(card["counts"])) == 1 else f"{count:,}",
        "classes": f"{len(names):,}",
        "teacher": _field(card, "teacher", "architecture"),
        "teacher's fingerprint": _field(card, "teacher", "fingerprint"),
        "statistics of": _field(card, "statistics", "dataset"),
        "made with": ", ".join(f"{name} {version}" for name, version in card["versions"].items()),
    }
    lines = [
        "---",
        *(f"{name}: {_yaml(value)}" for name, value in front.items()),
        "---",
        "",
        f"# {_plain(front['pretty_name'])}",
        "",
        "Synthetic images: noise, optimised until its BatchNorm statistics inside a frozen network match those of real images",
        "(arXiv 2210.03205). `card.json` has all that it takes to make them again.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {_plain(value)} |" for name, value in facts.items() if value),
        "",
        _LOADING[format],
        "",
        f"Class numbers are positions in `class_names` of `card.json`: {_first_names(names)}.",
    ]
    relabelled = labels is not None and labels.plain
    if relabelled or contents.has_soft_labels:
        whose = f"The logits of {_plain(labels.card['teacher']['architecture'])}" if relabelled else "The teacher's logits"
        lines += ["", f"{whose} of each image, float16, are in {_SOFT_LABELS[format]}."]
    if labels is not None and not labels.plain:
        lines += ["", *_VIEWS.format(count=labels.passes, teacher=_plain(labels.card["teacher"]["architecture"])).splitlines()]
    return "\n".join(lines) + "\n"


def _size_category(count: int) -> str:
    """The Hub's names for sizes."""
    limits = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M"}
    return next((name for limit, name in limits.items() if count < limit), "10M<n<100M")


def _field(card: dict, *path: str) -> str:
    for name in path:
        card = (card or {}).get(name)
    return card or ""


def _first_names(names: list[str], limit: int = 10) -> str:
    return ", ".join(_plain(name) for name in names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _yaml(value) -> str:
    """JSON is YAML, but for characters that JSON writes as a pair of surrogates and YAML as one escape."""
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in json.dumps(value, ensure_ascii=False))


def _plain(text: str) -> str:
    """A name in a line of Markdown: printable, and without what would end a table's cell."""
    return "".join(c if c.isprintable() else "�" for c in text).replace("|", "\\|")
