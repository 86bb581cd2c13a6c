"""The modules that the diffusers pipeline needs as one file, which loads where this project is not installed.

diffusers copies a repository's pipeline.py, and single files beside its components, into a cache and runs them there: a
file that imports no other can neither miss one nor meet one of another version.
"""

import ast
import builtins
from functools import lru_cache
from pathlib import Path

ENTRY = "pipeline_hf"
HEAD = """# Fixed Point Diffusion Models as a pipeline of diffusers: modules of the package fpdm in one file, written by
# an export. It needs torch and diffusers, and transformers for an AutoencoderRAE. Apache License 2.0.
"""
OWN_SOURCE = '''
_SOURCE = Path(__file__).read_text(encoding="utf-8")  # now: another export may take this file's place in the cache


def pipeline_source() -> str:
    """This file."""
    return _SOURCE
'''


@lru_cache
def pipeline_source() -> str:
    """The file's text.

    Raises ValueError where two modules use a name for different things: one of them needs another name.
    """
    modules: dict[str, _Module] = {}
    _collect(ENTRY, modules)
    imports: dict[str, str] = {}
    owners: dict[str, str] = dict.fromkeys(dir(builtins), "Python")
    for name, module in modules.items():
        for bound, statement in module.imports.items():
            if imports.setdefault(bound, statement) != statement:
                raise ValueError(f"fpdm.{name}: {statement!r}, where another module has {imports[bound]!r}")
        for defined in sorted(set(module.defined)):
            if defined in owners:
                raise ValueError(f"fpdm.{name}: {defined} is a name of {owners[defined]} too; choose another")
            owners[defined] = f"fpdm.{name}"
    if both := sorted(owners.keys() & imports.keys()):
        raise ValueError(f"{owners[both[0]]}: {both[0]} is imported by another module; choose another name")
    imports["SimpleNamespace"] = "from types import SimpleNamespace"
    head = HEAD + "\n" + "\n".join(sorted(set(imports.values()))) + "\n"
    wanted_whole = {whole for module in modules.values() for whole in module.whole}
    return head + "".join(module.text(name, whole=name in wanted_whole) for name, module in modules.items())


class _Module:
    """What a module of fpdm imports and defines; `needs` are other modules of fpdm, `whole` those taken as a module."""

    def __init__(self, name: str) -> None:
        source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
        tree = ast.parse(source)
        self.docstring = ast.get_docstring(tree) or ""
        self.imports: dict[str, str] = {}
        self.needs: list[str] = []
        self.whole: list[str] = []
        self.defined: list[str] = []
        self._lines = source.splitlines()
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._import(name, node)
            elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                self.defined += _names(node)
                continue
            for line in range(node.lineno - 1, node.end_lineno or node.lineno):
                self._lines[line] = ""

    def _import(self, name: str, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            if isinstance(node, ast.Import):
                self.imports[alias.asname or alias.name.partition(".")[0]] = f"import {ast.unparse(alias)}"
            elif node.module == "fpdm":
                self.needs.append(alias.name)
                self.whole.append(alias.name)
            elif (node.module or "").startswith("fpdm."):
                if alias.asname:
                    raise ValueError(f"fpdm.{name}: imports {alias.name} under another name; import it as it is")
                self.needs.append((node.module or "").removeprefix("fpdm."))
            else:
                self.imports[alias.asname or alias.name] = f"from {node.module} import {ast.unparse(alias)}"

    def text(self, name: str, *, whole: bool) -> str:
        """The module without its imports, its docstring as a comment."""
        said = "".join(f"# {line}".rstrip() + "\n" for line in self.docstring.splitlines())
        body = "\n".join(self._lines).strip("\n")
        names = ", ".join(f"{one}={one}" for one in self.defined if not one.startswith("_"))
        taken = f"\n\n{name} = SimpleNamespace({names})" if whole else ""
        return f"\n\n# ---- fpdm/{name}.py ----\n{said}\n{body}{taken}\n"


class _OwnSource(_Module):
    """In the place of this module."""

    def __init__(self) -> None:
        self.imports = {"Path": "from pathlib import Path"}
        self.needs, self.whole, self.defined = [], [], ["_SOURCE", "pipeline_source"]

    def text(self, name: str, *, whole: bool) -> str:
        return f"\n{OWN_SOURCE}"


def _collect(name: str, modules: dict[str, _Module]) -> None:
    """Adds a module after those that it needs."""
    if name in modules:
        return
    module = _OwnSource() if name == "single_file" else _Module(name)
    for needed in module.needs:
        _collect(needed, modules)
    modules[name] = module


def _names(node: ast.stmt) -> list[str]:
    """The names that a statement of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.If | ast.Try | ast.With | ast.For):
        return sorted(
            {name for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt) for name in _names(child)}
        )
    return [part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]
