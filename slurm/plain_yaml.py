"""Settings in YAML in which the type of a field decides what a plain word means.

YAML 1.1, which PyYAML implements, reads 010 as 8, 1:30 as 90, off as false and 2024-01-01 as a date. Here numbers are
decimal, booleans are true and false, null is null or ~, and everything else is text. A number, boolean or null keeps
its spelling: a commit 1234567, a name 2024 and an average 0.9999 become text where their field takes text.
"""

import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin, get_type_hints

import yaml

KEPT = (*(f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str")), None)  # None: any other tag
DIGITS = r"(?:0|[1-9][0-9]*)"
MAX_VALUES, MAX_DEPTH = 100_000, 50  # with aliases written out
NULLS = ("", "~", "null", "Null", "NULL")
WORDS = {form: word == "true" for word in ("true", "false") for form in (word, word.capitalize(), word.upper())}
SWITCHES = {"yes": True, "on": True, "no": False, "off": False}  # only where a field takes a boolean and no text


@dataclass(frozen=True)
class Plain:
    """A number, boolean or null with its spelling; `settle` chooses between the two."""

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
        """The document's tree. Refuses endless ones, alias bombs, and nesting beyond the recursion of later readers."""
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
        """Keys are text, each at most once."""
        keys: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key that is not plain text", key.start_mark)
            if key.value in keys:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value[:40]} occurs twice", key.start_mark)
            keys.add(key.value)
        self.flatten_mapping(node)  # `<<`
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


def _reads(kind: str, pattern: str, first: str, read: Callable[[str], Any]) -> None:
    def construct(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Plain:
        try:
            return Plain(node.value, read(node.value))
        except (ValueError, KeyError):
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value[:40]} is not a plain {kind}", node.start_mark
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
_Loader.add_constructor("tag:yaml.org,2002:merge", lambda _, node: node.value)  # where it is not a key


def read_yaml(text: str) -> Any:
    """Dicts with text keys, lists, text and `Plain`. ValueError says in one line where `text` is not such YAML."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader with fewer tags
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except Exception as error:  # noqa: BLE001 # PyYAML also raises others' exceptions
        raise ValueError(" ".join(str(error).split())[:500]) from None


def settle(hint: Any, tree: Any) -> Any:
    """`tree`, from `read_yaml`, with every `Plain` replaced by its value or its spelling, as its field's type asks.

    Args:
        hint: the type of `tree`: a dataclass, `dict[str, int]`, `str | None`. Values of unknown fields become values.
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
    """The members of a union, or the type itself; without `Annotated`."""
    if get_origin(hint) is Annotated:
        yield from members(get_args(hint)[0])
    elif get_origin(hint) in (Union, types.UnionType):
        for part in get_args(hint):
            yield from members(part)
    else:
        yield hint
