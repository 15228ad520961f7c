"""card.json of a synthetic dataset: what it was made from, which is its identity, and whether it is complete."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import torch

from .errors import InputError
from .plans import SynthesisConfig

CARD = "card.json"
FORMAT, FORMAT_VERSION = "bnfuse-store", 1


def identity(card: dict, class_names: Sequence[str], counts: Sequence[int] | None) -> dict:
    """The card of a new store, less `complete`, in the types that come back from JSON."""
    class_names = list(class_names)
    if not class_names or not all(isinstance(name, str) for name in class_names):
        raise InputError(f"class_names must be one name a class, at least one, got {class_names!r}")
    if counts is not None and (len(counts) != len(class_names) or min(counts) < 0):
        raise InputError(f"counts must be one number a class ({len(class_names)}), none negative, got {list(counts)}")
    own = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": versions(),
        "class_names": class_names,
        "counts": None if counts is None else [int(n) for n in counts],
    }
    reserved = sorted({*own, "complete"} & set(card))
    if reserved:
        raise InputError(f"the store writes {', '.join(reserved)} into the card itself: choose other names")
    try:
        return json.loads(json.dumps({**own, **card}, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"the card must consist of JSON's types, without nan and inf: {error}") from error


def versions() -> dict[str, str]:
    """Of bnfuse and torch: another one may give other numbers."""
    try:
        bnfuse = metadata.version("bnfuse")
    except metadata.PackageNotFoundError:
        bnfuse = "not installed"
    return {"bnfuse": bnfuse, "torch": str(torch.__version__)}


def read_card(root: Path) -> dict:
    """What card.json holds. InputError where `root` is no store, or its card is damaged or of another version."""
    path = root / CARD
    if not root.is_dir():
        raise InputError(f"{root} is not a folder; expected a dataset written by bnfuse")
    if not path.exists():
        raise InputError(f"{root} holds no {CARD}; expected a dataset written by bnfuse")
    content = read_bytes(path)
    try:
        card = json.loads(content)
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}). Restore it from a copy, or make the dataset again") from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise InputError(f"{path} is not the card of a bnfuse dataset (its format is not {FORMAT!r})")
    if card.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {card.get('format_version')!r}, this bnfuse reads {FORMAT_VERSION}: "
            f"use the bnfuse version that wrote it, {card.get('versions')}"
        )
    names, counts = card.get("class_names"), card.get("counts")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path} must have class_names, a list of names, got {names!r}")
    if type(card.get("complete")) is not bool or not (counts is None or isinstance(counts, list)):
        raise InputError(f"{path} must have `complete`, true or false, and `counts`, a list or null")
    return card


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; {path.parent} is no whole bnfuse dataset") from error


def card_bytes(card: dict) -> bytes:
    return (json.dumps(card, indent=2) + "\n").encode()


_OTHER_SETTINGS = "Choose another --out, or delete {root} to begin again; the settings it was begun with continue it."


def refuse_other_identity(root: Path, given: dict, card: dict, remedy: str = _OTHER_SETTINGS) -> None:
    """InputError, naming each difference, unless the store with this card was begun with the identity `given`."""
    existing = {name: value for name, value in card.items() if name != "complete"}
    if given["counts"] is None:  # then `finish` filled them in
        existing["counts"] = None
    if isinstance(given.get("config"), dict) and isinstance(existing.get("config"), dict):
        # Fields that have come since are what they were by default.
        defaults = SynthesisConfig().to_card()
        existing["config"] = {k: defaults[k] for k in given["config"] if k in defaults} | existing["config"]
    refuse_differences(root, given, existing, "a dataset", remedy)


def refuse_differences(root: Path, given: dict, existing: dict, what: str, remedy: str = _OTHER_SETTINGS) -> None:
    """InputError, naming each difference, where `root` holds `what` and it was begun with other settings than `given`."""
    differences = list(_differences(given, existing))
    if differences:
        shown = "\n".join(f"  {line}" for line in differences[:10])
        more = f"\n  and {len(differences) - 10} more" if len(differences) > 10 else ""
        raise InputError(f"{root} holds {what} that was begun with other settings:\n{shown}{more}\n" + remedy.format(root=root))


def _differences(given: object, existing: object, path: str = "") -> Iterator[str]:
    """One line for each leaf in which two JSON values differ: its path, and both values."""
    if isinstance(given, dict) and isinstance(existing, dict):
        for key in [*given, *(key for key in existing if key not in given)]:
            where = f"{path}.{key}" if path else key
            if key not in existing:
                yield f"{where}: given {_short(given[key])}, the dataset has none"
            elif key not in given:
                yield f"{where}: not given, the dataset has {_short(existing[key])}"
            else:
                yield from _differences(given[key], existing[key], where)
    elif isinstance(given, list) and isinstance(existing, list) and len(given) == len(existing):
        for i, (a, b) in enumerate(zip(given, existing)):
            yield from _differences(a, b, f"{path}[{i}]")
    elif given != existing or isinstance(given, bool) != isinstance(existing, bool):
        yield f"{path}: given {_short(given)}, the dataset has {_short(existing)}"


def _short(value: object, length: int = 80) -> str:
    text = json.dumps(value)
    return text if len(text) <= length else text[: length - 1] + "…"
