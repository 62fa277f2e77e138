"""TOML files -> strict pydantic models, with errors a person can act on.

Every file a person writes (``study.toml``, ``hospital.toml``, ``server.toml``) comes in here. A refusal is one line
with its place and the likely cure, never a traceback.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from datetime import date, datetime, time
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from medfed.errors import ConfigError
from medfed.seams import Files

LIMIT_BYTES = 1 << 20
_POSITION = re.compile(r"^(?P<what>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)$", re.S)
# The parser takes quadratic time over a key of very many dotted parts: minutes for one megabyte. Such keys are refused
# before parsing. Possessive quantifiers and the look-behind keep this search itself linear.
_KEY_PART = r"""(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')"""
_LONG_KEY = re.compile(rf"(?<![\w-])(?:{_KEY_PART}[ \t]*+\.[ \t]*+){{64}}")
# Python prints no whole number of more than 4300 digits, and refuses to read one, but for these forms.
_LONG_NUMBER = re.compile(r"(?<![\w-])0[box][0-9A-Fa-f_]{1000}")


class StrictModel(BaseModel):
    """A base for models of files: no coercion, no unknown keys, no infinity, no change after reading."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)


Model = TypeVar("Model", bound=BaseModel)


def without_unset(values: dict[str, Any], *later: str) -> dict[str, Any]:
    """What a study says without the keys ``later`` where they are unset: keys that came after studies had been approved are
    left out then, so that these keep their hash."""
    return {key: value for key, value in values.items() if key not in later or value is not None}


def load(files: Files, path: Path, model: type[Model]) -> Model:
    """Read ``path`` as TOML and validate it.

    Raises: ``EnvironmentFault`` 606/607/608/609 (not there, not readable, over 1 MiB), else as ``parse``.
    """
    return parse(files.read(path, limit_bytes=LIMIT_BYTES), path.name, model)


def read_values(files: Files, path: Path) -> dict[str, object]:
    """The nested tables of a TOML file, for ``validate``. Raises as ``load`` does where a file cannot be read or parsed."""
    return _decode(files.read(path, limit_bytes=LIMIT_BYTES), path.name)


def parse(data: bytes, name: str, model: type[Model]) -> Model:
    """Validate the bytes of a TOML file; ``name`` is what errors call it.

    Arrays may fill tuples, strings may fill enums, paths and dates: what strict validation of JSON allows in pydantic.
    Raises: ``ConfigError`` 201 (syntax, doubled key, not UTF-8; with LINE:COLUMN), 202 (unknown key, with the likely
    one), 203 (missing, wrong type, out of range).
    """
    return validate(_decode(data, name), name, model)


def validate(values: Mapping[str, object], name: str, model: type[Model]) -> Model:
    """Validate nested tables that were already parsed (TOML or JSON); raises ``ConfigError`` 201, 202 or 203.

    Strict whatever ``model`` says; ``TypeError`` for a model that would pass over unknown keys.
    """
    _require_closed(model)
    try:
        text = json.dumps(values, default=_plain)
    except RecursionError as error:
        raise ConfigError(201, f"{name} is nested too deeply", "write flat tables") from error
    try:
        return model.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise _explain(error.errors(include_url=False), name, model) from None


def first_fault(error: ValidationError) -> str:
    """``epsilon must be above 0, not -1``: the first fault of values that came from elsewhere than a file."""
    first = error.errors(include_url=False)[0]
    return f"{_dotted(first['loc'])} {_in_words(first)}".strip()


def quoted(text: str) -> str:
    """``text`` as a TOML basic string; what does not print (controls, bidirectional overrides) stands escaped."""
    return '"' + "".join(_escaped(character) for character in text) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"


def _require_closed(model: type[BaseModel]) -> None:
    if model.model_config.get("extra") != "forbid":
        raise TypeError(f"{model.__name__} must be declared with extra='forbid'")
    for field in model.model_fields.values():
        for inner in _models_in(field.annotation):
            _require_closed(inner)


def _decode(data: bytes, name: str) -> dict[str, object]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, column = _place(data, error.start)
        raise ConfigError(201, f"{name} is not UTF-8 at {line}:{column}", "save it as UTF-8") from None
    if _LONG_KEY.search(text):
        raise ConfigError(201, f"{name} is nested too deeply", "write flat tables")
    if _LONG_NUMBER.search(text):
        raise ConfigError(201, f"{name} holds a number that is too long", "correct the file")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _syntax_error(str(error), name, text) from None
    except (RecursionError, ValueError) as error:  # ValueError: an integer of thousands of digits
        what = "is nested too deeply" if isinstance(error, RecursionError) else "holds a number that is too long"
        raise ConfigError(201, f"{name} {what}", "correct the file") from None


def _place(data: bytes, offset: int) -> tuple[int, int]:
    """Line and column (in characters), both from 1, of a byte offset whose prefix is valid UTF-8."""
    before = data[:offset].decode("utf-8-sig")
    return before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1


def _syntax_error(message: str, name: str, text: str) -> ConfigError:
    match = _POSITION.match(message)
    what = match["what"] if match else message
    if match and match["line"]:
        line, column = int(match["line"]), int(match["column"])
    else:
        line, column = text.count("\n") + 1, len(text) - (text.rfind("\n") + 1) + 1
    if what.startswith(("Cannot overwrite", "Cannot declare")):
        what = "this key or table is given twice"
    return ConfigError(201, f"{name} not accepted at {line}:{column}, {_shown(what)}", "correct the syntax (TOML)")


def _plain(value: object) -> str:
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} is no TOML value")


# ---------------------------------------------------------------------------------------------- explaining a refusal


def _explain(errors: list[ErrorDetails], name: str, model: type[BaseModel]) -> ConfigError:
    """One error for all: unknown keys first, as a misspelled key also shows up as a missing one."""
    unknown = [error for error in errors if error["type"] == "extra_forbidden"]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 and not unknown else ""
    if unknown:
        path = _dotted(_without_tags(unknown[0]["loc"], model))
        likely = _likely(path, model)
        hint = f'did you mean "{likely}"?' if likely else "remove it"
        return ConfigError(202, f'{name}: unknown key "{_shown(path)}"', hint)
    first = errors[0]
    path = _dotted(_without_tags(first["loc"], model)) or "the file"
    description = _description(first["loc"], model)
    remedy = f"{'add it' if first['type'] == 'missing' else 'correct it'}{f', {description}' if description else ''}"
    return ConfigError(203, f"{name}: {_shown(path)} {_in_words(first)}{more}", remedy)


def _dotted(location: tuple[int | str, ...]) -> str:
    """``("cohort", "hospitals", 2, "name")`` -> ``cohort.hospitals[3].name``."""
    text = ""  # positions count from 1, as people do
    for part in location:
        text += f"[{part + 1}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


def _without_tags(location: tuple[int | str, ...], model: type[BaseModel]) -> tuple[int | str, ...]:
    """Leave out the names that pydantic puts between a tagged union and its keys; no file shows them."""
    kept: list[int | str] = []
    here: list[type[BaseModel]] = [model]
    for place, part in enumerate(location):
        is_last = place == len(location) - 1
        fields = [each.model_fields[str(part)] for each in here if part in each.model_fields]
        if fields or isinstance(part, int) or is_last or not here:
            kept.append(part)
        if fields:
            here = [inner for field in fields for inner in _models_in(field.annotation)]
    return tuple(kept)


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted paths of every key the model knows, all levels, list positions left out."""
    for field, information in model.model_fields.items():
        path = f"{prefix}{information.alias or field}"
        yield path
        for inner in _models_in(information.annotation):
            yield from _keys(inner, f"{path}.")


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _likely(path: str, model: type[BaseModel]) -> str | None:
    """The known key nearest to an unknown one: beside it first, then the same or a similar name elsewhere."""
    parent, _, key = re.sub(r"\[\d+\]", "", path).rpartition(".")
    known = list(_keys(model))
    beside = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(key, beside, n=1, cutoff=0.6)
    if near:
        return f"{parent}.{near[0]}" if parent else near[0]
    leaves = {other.rpartition(".")[2]: other for other in reversed(known)}
    elsewhere = difflib.get_close_matches(key, leaves, n=1, cutoff=0.8)
    return leaves[elsewhere[0]] if elsewhere else None


def _description(location: tuple[int | str, ...], model: type[BaseModel]) -> str | None:
    """The ``Field(description=...)`` of the place, if the model has one."""
    here: list[type[BaseModel]] = [model]
    found: str | None = None
    for part in location:
        if isinstance(part, int):
            continue
        fields = [each.model_fields[part] for each in here if part in each.model_fields]
        found = fields[0].description if fields else found
        here = [inner for field in fields for inner in _models_in(field.annotation)]
    return found


_TYPES = {
    "bool_type": "true or false",
    "date_type": "a date",
    "dict_type": "a table",
    "enum": "one of the known names",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "frozen_set_type": "a list",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_attributes_type": "a table",
    "model_type": "a table",
    "path_type": "a path in quotes",
    "set_type": "a list",
    "string_type": "text in quotes",
    "tuple_type": "a list",
}
_BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}


def _in_words(error: ErrorDetails) -> str:
    kind, context, value = error["type"], error.get("ctx", {}), _value(error["input"])
    if kind == "missing":
        return "is missing"
    if kind in _BOUNDS:
        word, key = _BOUNDS[kind]
        return f"must be {word} {context[key]:.15g}, not {value}"
    if kind in {"literal_error", "enum"}:
        return f"must be {context['expected']}, not {value}"
    if kind in _TYPES:
        return f"must be {_TYPES[kind]}, not {value}"
    if kind in {"too_short", "too_long"}:
        word, key = ("at least", "min_length") if kind == "too_short" else ("at most", "max_length")
        return f"must have {word} {context[key]} entries, not {context['actual_length']}"
    if kind == "value_error":
        return _shown(str(context.get("error", error["msg"])))
    if kind == "string_pattern_mismatch":
        return f"has a form that is not accepted: {value}"
    return f"is not accepted ({error['msg'].removeprefix('Value error, ')}): {value}"


def _value(value: object) -> str:
    """A value in a few printable characters; tables and lists are not repeated."""
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, bool):
        return "true" if value else "false"
    return _shown(json.dumps(value) if isinstance(value, str) else str(value), limit=40)


def _shown(text: str, limit: int = 160) -> str:
    """Printable ASCII on one line, cut: the file may come from a stranger and the line goes to a terminal."""
    clean = text.encode("ascii", "backslashreplace").decode()
    clean = "".join(character if character.isprintable() else repr(character)[1:-1] for character in clean)
    return clean if len(clean) <= limit else clean[:limit] + "..."
