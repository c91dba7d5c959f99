"""Bounds of settings, beside their types: `Annotated[int, Range(1)]`; and the one check for them."""

import math
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints


class Range(NamedTuple):
    """Where a number, or every number of a tuple or list, must lie; both ends belong to it."""

    low: float
    high: float = math.inf


def check(owner: Any, values: Mapping[str, Any], prefix: str = "") -> None:
    """Raise ValueError for the first value whose numbers leave the bounds of its annotation.

    owner: a class or function with annotations, or a mapping of names to annotations.
    values: by name; names without an annotation, strings and None are passed over where a type allows them.
    prefix: stands before the name in the message: "NAME=VALUE: must lie between LOW and HIGH".
    """
    fields = owner if isinstance(owner, Mapping) else get_type_hints(owner, include_extras=True)
    for name, value in values.items():
        if name in fields and (rule := _broken(value, fields[name], None)):
            raise ValueError(f"{prefix}{name}={value}: must {rule}")


def _broken(value: Any, annotation: Any, bounds: Range | None) -> str | None:
    """The rule that a value breaks, or None; bounds: of an annotation around this one."""
    if get_origin(annotation) is Annotated:
        annotation, *notes = get_args(annotation)
        return _broken(value, annotation, next((n for n in notes if isinstance(n, Range)), bounds))
    if annotation in (int, float):
        return _broken_number(value, annotation, bounds)
    kind, parts = get_origin(annotation), get_args(annotation)
    if kind in (list, tuple):
        if not isinstance(value, Sequence) or isinstance(value, str):
            return "be a list"
        part = float if not parts else parts[0]  # all our tuples are of one kind
        return next((rule for item in value if (rule := _broken(item, part, bounds))), None)
    if kind is Literal:
        return None if value in parts else f"be one of {list(parts)}"
    if parts:  # a union: the first of its rules that is of the value's own kind, if all are broken
        rules = [_broken(value, part, bounds) for part in parts]
        told = sorted((r for r in rules if r), key=lambda r: (not r.startswith("lie"), "whole" not in r))
        return None if None in rules else told[0]
    if annotation in (None, NoneType):
        return None if value is None else "be null"
    return None  # strings, booleans: their parser's and user's affair


def _broken_number(value: Any, kind: type, bounds: Range | None) -> str | None:
    if kind is int and (isinstance(value, bool) or not isinstance(value, int)):
        return "be whole numbers"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "be numbers"
    if bounds and not bounds.low <= value <= bounds.high:
        return f"lie between {bounds.low:g} and {bounds.high:g}"
    return None
