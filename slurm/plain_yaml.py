"""Settings in YAML, read as a person reads them: what a plain word means, the type of its field says.

YAML 1.1, which PyYAML reads, makes 010 an eight, 1:30 a ninety, off a false and 2024-01-01 a date. Here numbers are
decimal, the booleans true and false, nothing is null or ~, and all else is text. What is no text keeps its text beside
it: a commit 1234567, a name 2024 and an average 0.9999 are text where their field takes text.
"""

import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin, get_type_hints

import yaml

KEPT = (*(f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str")), None)  # None: what is unknown
DIGITS = r"(?:0|[1-9][0-9]*)"
MAX_VALUES, MAX_DEPTH = 100_000, 50  # of a text with its aliases written out
NULLS = ("", "~", "null", "Null", "NULL")
WORDS = {form: word == "true" for word in ("true", "false") for form in (word, word.capitalize(), word.upper())}
SWITCHES = {"yes": True, "on": True, "no": False, "off": False}  # where a field takes true or false and no text


@dataclass(frozen=True)
class Plain:
    """A word that is no text, as it is written and as what it is read; `settle` takes one of the two."""

    text: str
    value: int | float | bool | None

    def __repr__(self) -> str:
        return repr(self.value)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {}  # type: ignore[misc]
    yaml_constructors: ClassVar[dict[Any, Any]] = {
        tag: construct for tag, construct in yaml.SafeLoader.yaml_constructors.items() if tag in KEPT
    }

    def get_single_node(self) -> Any:
        """The whole tree. Refused where it is endless, a bomb of aliases, or deeper than those who read it can go."""
        root = super().get_single_node()
        waiting, count = [(root, 0)] if root else [], 0
        while waiting:
            node, depth = waiting.pop()
            count += 1
            if count > MAX_VALUES or depth > MAX_DEPTH:
                fault = "nested too deeply" if depth > MAX_DEPTH else f"more than {MAX_VALUES:,} values"
                raise yaml.constructor.ConstructorError(None, None, fault, node.start_mark)
            parts = node.value if isinstance(node, yaml.CollectionNode) else ()
            waiting += [(part, depth + 1) for pair in parts for part in (pair if isinstance(pair, tuple) else (pair,))]
        return root

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Keys are text, and each stands once."""
        keys: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key that is no word", key.start_mark)
            if key.value in keys:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value[:40]} stands twice", key.start_mark)
            keys.add(key.value)
        self.flatten_mapping(node)  # `<<`
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


def _reads(kind: str, pattern: str, first: str, read: Callable[[str], Any]) -> None:
    def construct(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Plain:
        try:
            return Plain(node.value, read(node.value))
        except (ValueError, KeyError):
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value[:40]} is no {kind}", node.start_mark
            ) from None

    tag = f"tag:yaml.org,2002:{kind}"
    _Loader.add_implicit_resolver(tag, re.compile(f"^(?:{pattern})$"), [*first, *([""] if kind == "null" else [])])
    _Loader.add_constructor(tag, construct)


def _real(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


_reads("bool", "|".join(WORDS), "tTfF", WORDS.__getitem__)
_reads("null", "|".join(map(re.escape, NULLS)), "~nN", lambda _: None)
_reads("int", rf"[-+]?(?:{DIGITS}|[1-9][0-9]{{0,2}}(?:_[0-9]{{3}})+)", "-+0123456789", int)  # 400_000
REAL = rf"[-+]?(?:{DIGITS}?\.[0-9]+|{DIGITS}\.|{DIGITS}(?=[eE]))(?:[eE][-+]?[0-9]+)?"
_reads("float", rf"{REAL}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+0123456789.", _real)
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("^<<$"), ["<"])
_Loader.add_constructor("tag:yaml.org,2002:merge", lambda _, node: node.value)  # where it is no key


def read_yaml(text: str) -> Any:
    """Dicts by text, lists, text and `Plain`. ValueError says in one line where `text` is no YAML, or holds more."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader that knows even less
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except Exception as error:  # noqa: BLE001 # PyYAML has more than its own for what it cannot read
        raise ValueError(" ".join(str(error).split())[:500]) from None


def settle(hint: Any, tree: Any) -> Any:
    """`tree`, as `read_yaml` gives it, with every `Plain` as its field's type wants it.

    Args:
        hint: the type of the whole: a dataclass, `dict[str, int]`, `str | None`. What it does not know stays as it is.
    """
    kinds = list(members(hint))
    if isinstance(tree, Plain):
        same = any(type(tree.value) is kind for kind in kinds)
        return tree.text if str in kinds and not same and tree.value is not None else tree.value
    if isinstance(tree, str) and bool in kinds and str not in kinds:
        return SWITCHES.get(tree.lower(), tree)
    for kind in kinds:
        if isinstance(tree, dict) and is_dataclass(kind):
            hints = get_type_hints(kind, include_extras=True)
            return {key: settle(hints.get(key), value) for key, value in tree.items()}
        if isinstance(tree, dict) and get_origin(kind) is dict:
            return {key: settle(get_args(kind)[1], value) for key, value in tree.items()}
        if isinstance(tree, list) and get_origin(kind) is tuple:
            parts = get_args(kind)
            each = [parts[0]] * len(tree) if parts[-1] is ... else [*parts, *[None] * len(tree)]
            return [settle(part, value) for part, value in zip(each, tree, strict=False)]
    return tree


def members(hint: Any) -> Iterator[Any]:
    """The types that a field takes: those of a union apart, without what else is said of them."""
    if get_origin(hint) is Annotated:
        yield from members(get_args(hint)[0])
    elif get_origin(hint) in (Union, types.UnionType):
        for part in get_args(hint):
            yield from members(part)
    else:
        yield hint
