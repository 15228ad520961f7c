"""Configs: a check of their fields, and each field as a command-line flag under its own name, helped by its docstring."""

from __future__ import annotations

import argparse
import dataclasses
import numbers
import re
import types
import typing
from typing import TypeVar

from .errors import InputError

Config = TypeVar("Config")


def check_whole(config, least: dict[str, int]) -> None:
    """InputError unless each of the named fields is an integer of at least so much."""
    for name, lowest in least.items():
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
            raise InputError(f"{name} must be an integer of at least {lowest}, got {value!r}")


def check_kinds(config) -> None:
    """InputError unless every field that is a bool, a float or a tuple of floats is one; whole numbers are floats too."""
    for name, kind in typing.get_type_hints(type(config)).items():
        value = getattr(config, name, None)
        if kind is bool and not isinstance(value, bool):
            raise InputError(f"{name} must be True or False, got {value!r}")
        if kind is float and not _is_number(value):
            raise InputError(f"{name} must be a number, got {value!r}")
        if float in typing.get_args(kind) and typing.get_origin(kind) is tuple:
            if not isinstance(value, (tuple, list)) or not all(map(_is_number, value)):
                raise InputError(f"{name} must be a tuple of numbers, got {value!r}")


def _is_number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def add_flags(parser: argparse.ArgumentParser, config: type[Config]) -> None:
    """Adds a flag for every field: ``images_per_class`` becomes ``--images-per-class``, with its default and its doc line."""
    kinds, texts = typing.get_type_hints(config), _attribute_texts(config)
    for field in dataclasses.fields(config):
        kind = kinds[field.name]
        options = {"help": (texts[field.name] + _default_text(field.default)).replace("%", "%%")}
        if isinstance(kind, types.UnionType):
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is tuple:
            element, *rest = typing.get_args(kind)
            options |= {
                "type": element,
                "nargs": "+" if rest == [...] else 1 + len(rest),
                "metavar": field.name[0].upper(),
            }
        else:
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, **options)


def from_flags(config: type[Config], args: argparse.Namespace, **more) -> Config:
    """The config that the parsed flags say; `more` for the fields without a flag."""
    return config(**given_flags(config, args) | more)


def given_flags(config: type, args: argparse.Namespace) -> dict[str, object]:
    """The fields whose flags stand on the command line, by name."""
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(config) if hasattr(args, field.name)}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}


def flags(fields: dict[str, object]) -> str:
    """The same fields in the words of the command line: ``--targets running --batch-size 100 --no-clip``."""
    return " ".join(_flag(name, value) for name, value in fields.items())


def _flag(name: str, value: object) -> str:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return flag if value else "--no-" + flag[2:]
    return f"{flag} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"


def _attribute_texts(config: type) -> dict[str, str]:
    """The lines ``name, name : text`` under "Attributes" in a NumPy-style docstring and those of the classes derived from, by
    name."""
    texts: dict[str, str] = {}
    for part in config.__mro__:
        section = re.search(r"Attributes\n\s*-+\n(.*?)(?:\n\s*\n|\Z)", part.__doc__ or "", re.DOTALL)
        for names, text in re.findall(
            r"^    (\w[\w, ]*?) : (.*(?:\n        .*)*)", section[1] if section else "", re.MULTILINE
        ):
            texts = {name: re.sub(r"\s+", " ", text) for name in names.split(", ")} | texts
    return texts


def _default_text(default) -> str:
    """Nothing for None, whose meaning the field's own text says."""
    if default is None:
        return ""
    return f" (default {' '.join(map(str, default)) if isinstance(default, tuple) else default})"
