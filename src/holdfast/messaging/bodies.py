"""Kinds of bodies: how a class is written as JSON and read back, and what a fault may say about it.

A body is a msgspec struct, a dataclass, a pydantic model, or one of the plain values of JSON. pydantic is known by the
two methods we call and never imported here, so the bare install does without it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from holdfast.errors import CannotDecode, HoldfastError, InvalidInput

PLAIN: frozenset[type] = frozenset({dict, list, str, int, float, bool, type(None)})

Write = Callable[[Any], bytes]
Read = Callable[[bytes], Any]

write_json: Write = msgspec.json.Encoder().encode


class BodyKind(msgspec.Struct, frozen=True, kw_only=True):
    """One class of bodies: to bytes, from bytes."""

    write: Write
    read: Read


def kind_of(body_type: type) -> BodyKind:
    """How bodies of this class travel; raises `InvalidInput` for a class that has no strict form in JSON."""
    if not isinstance(body_type, type):
        raise InvalidInput(f"{body_type!r} is no class; register list, dict, type(None), a struct or a model")
    if callable(getattr(body_type, "model_validate_json", None)) and hasattr(body_type, "model_dump_json"):
        return _model(body_type)
    if hasattr(body_type, "__pydantic_validator__"):
        raise InvalidInput(f"{body_type.__name__}: a pydantic dataclass would not be validated; make it a BaseModel")
    if not (issubclass(body_type, msgspec.Struct) or dataclasses.is_dataclass(body_type) or body_type in PLAIN):
        raise InvalidInput(
            f"{body_type.__name__} cannot be a body; use a msgspec struct, a dataclass, a pydantic model, "
            f"or one of {', '.join(sorted(each.__name__ for each in PLAIN))}"
        )
    try:
        read: Read = msgspec.json.Decoder(body_type).decode
        write = write_finite if _may_hold_floats(body_type) else write_json
    except (TypeError, NameError, RecursionError) as error:
        raise InvalidInput(f"{body_type.__name__} cannot be read from JSON: {error}") from error
    return BodyKind(write=write, read=read)


def write_finite(body: Any) -> bytes:
    """As `write_json`, which writes NaN and infinities as null; here they raise `InvalidInput`."""
    written = write_json(body)
    if b"null" in written:
        _require_finite(msgspec.to_builtins(body))
    return written


def _require_finite(values: Any) -> None:
    left = [values]
    while left:
        value = left.pop()
        if isinstance(value, float):
            if not math.isfinite(value):
                raise InvalidInput("it holds NaN or an infinity, and JSON has no such number")
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            left += value


def fault(error: Exception) -> str:
    """What is wrong with a body and where, without a word of it: msgspec quotes values in two of its faults."""
    if isinstance(error, CannotDecode):
        return error.detail
    # msgspec passes on what a `__post_init__` says, with the error itself as the cause.
    rule = error.__cause__ if isinstance(error, msgspec.ValidationError) and error.__cause__ else error
    if isinstance(rule, UnicodeDecodeError):
        return f"not UTF-8 at byte {rule.start}"
    if not isinstance(rule, (msgspec.DecodeError, RecursionError)):
        # A rule of ours says what it wants; what another error quotes may be the body.
        said = f": {rule.detail}" if isinstance(rule, HoldfastError) else ""
        return f"its own rule refuses it ({type(rule).__name__}){said}"
    told = str(error)
    where = told[told.rindex(" - at ") :] if " - at " in told else ""
    if told.startswith("Invalid enum value"):
        return f"Invalid enum value{where}"
    if told.startswith("Object contains unknown field"):
        return f"Object contains an unknown field{where}"
    return told


def write_fault(error: Exception) -> str:
    """Why a body cannot be written; only texts that name types, never values."""
    if isinstance(error, InvalidInput):
        return error.detail
    if isinstance(error, UnicodeEncodeError):
        return "a text in it is no Unicode (half a surrogate pair)"
    if isinstance(error, RecursionError):
        return "it is nested too deeply, or holds itself"
    return str(error) if type(error) in (TypeError, OverflowError) else type(error).__name__


def _may_hold_floats(body_type: type) -> bool:
    """Whether a float can stand anywhere in it by its annotations; asked once, when the class is registered."""
    left: list[Any] = [msgspec.inspect.type_info(body_type)]
    seen: set[int] = set()  # types may hold themselves
    while left:
        info = left.pop()
        if isinstance(info, (msgspec.inspect.FloatType, msgspec.inspect.AnyType, msgspec.inspect.CustomType)):
            return True
        if id(info) not in seen:
            seen.add(id(info))
            left += _parts(getattr(info, name) for name in info.__struct_fields__)
    return False


def _parts(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, (msgspec.inspect.Type, msgspec.inspect.Field)):
                yield each


# -- pydantic ----------------------------------------------------------------------------------------------------------


def _model(model: Any) -> BodyKind:
    validate = model.model_validate_json
    known = _names(model)

    def read(body: bytes) -> Any:
        try:
            return validate(body)
        except ValueError as error:
            raise CannotDecode(_model_fault(error, known)) from None

    def write(body: Any) -> bytes:
        # By alias, as it is read; a value that does not fit its field is an error, not a warning that quotes it.
        written = str(body.model_dump_json(by_alias=True, warnings="error")).encode()
        if b"null" in written or b"NaN" in written or b"Infinity" in written:  # as the model is told
            _require_finite(body.model_dump(warnings=False))
        return written

    return BodyKind(write=write, read=read)


def _names(model: Any) -> frozenset[str]:
    """The names of a model's own fields on the wire: the words of a fault's place that are no content."""
    names = set()
    for name, field in getattr(model, "model_fields", {}).items():
        names |= {each for each in (name, field.alias, field.validation_alias) if isinstance(each, str)}
    return frozenset(names)


def _model_fault(error: Any, known: frozenset[str]) -> str:
    """The first fault by its type and place; the sentences of pydantic may quote the body, and so may keys in it."""
    if not hasattr(error, "errors"):
        return f"its own rule refuses it ({type(error).__name__})"
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    path = "$"
    for depth, step in enumerate(faults[0]["loc"]):
        if isinstance(step, int):
            path += f"[{step}]"
        else:
            path += f".{step}" if depth == 0 and step in known else "[...]"
    more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
    return f"{faults[0]['type']} - at `{path}`{more}"
