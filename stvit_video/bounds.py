"""Bounds of settings, beside their types: `Annotated[int, Range(1)]`; and the one check for them."""

import math
from collections.abc import Mapping
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints


class Range(NamedTuple):
    """Where a number, or every number of a tuple or list, must lie; both ends belong to it."""

    low: float
    high: float = math.inf


Count = Annotated[int, Range(1)]


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


def _broken(value: Any, annotation: Any, bounds: Range | None = None) -> str | None:
    """The rule that a value breaks, or None; bounds: of an annotation around this one."""
    kind, parts = get_origin(annotation), get_args(annotation)
    if kind is Annotated:
        return _broken(value, parts[0], next((n for n in parts[1:] if isinstance(n, Range)), bounds))
    if annotation in (int, float):
        if isinstance(value, bool) or not isinstance(value, int | annotation):
            return "be whole numbers" if annotation is int else "be numbers"
        if bounds is None:
            return None if math.isfinite(value) else "be finite"
        inside = math.isfinite(value) and bounds.low <= value <= bounds.high
        return None if inside else f"lie between {bounds.low:g} and {bounds.high:g}"
    if kind in (list, tuple):
        if not isinstance(value, list | tuple):
            return "be a list"
        return next(filter(None, (_broken(item, parts[0], bounds) for item in value)), None)
    if kind is Literal:
        return None if value in parts else f"be one of {list(parts)}"
    if parts:  # a union: where all rules are broken, the one of the value's own kind
        rules = [_broken(value, part, bounds) for part in parts]
        return (
            None if None in rules else min(rules, key=lambda r: (not r.startswith("lie"), "whole" not in r))
        )
    return "be null" if annotation is NoneType and value is not None else None
