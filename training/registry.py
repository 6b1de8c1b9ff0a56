"""Methods found by their file names: listing, describing (both without importing them) and loading."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.abc import InspectLoader
from typing import TypeVar

Base = TypeVar("Base")


@dataclass(frozen=True)
class MethodCard:
    """What a method's file says of itself.

    Attributes:
        name: the file's name, which is the method's.
        paper: the value of its class attribute `paper`, an arXiv id; empty when it has none.
        summary: the first sentence of its docstring.
    """

    name: str
    paper: str
    summary: str


def available(package: str) -> list[str]:
    """The names of the methods in a package, sorted; none is imported.

    Args:
        package: its import name, such as "sublimate.training.objectives".
    """
    path = importlib.import_module(package).__path__
    return sorted(module.name for module in pkgutil.iter_modules(path) if not module.ispkg and module.name[0] != "_")


def load(package: str, name: str, base: type[Base]) -> type[Base]:
    """The one public class deriving from `base` that the method's file defines.

    Raises:
        ValueError: when there is no such method, naming the nearest and all others.
        TypeError: when the file does not define exactly one such class, or that class lacks a class variable that
            `base` declares.
    """
    check_name(package, name)
    module = importlib.import_module(f"{package}.{name}")
    # A dictionary, because a class may have a second name in its module.
    classes = {
        value: value.__name__
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, base)
        and value.__module__ == module.__name__
        and not value.__name__.startswith("_")
    }
    if len(classes) != 1:
        names = ", ".join(classes.values()) or "none"
        raise TypeError(f"{module.__name__} must define exactly one public {base.__name__}, and defines {names}.")
    found = next(iter(classes))
    declared = [
        name
        for kind in reversed(base.__mro__)
        for name, annotation in inspect.get_annotations(kind).items()
        if "ClassVar" in str(annotation)
    ]
    if missing := [name for name in declared if not hasattr(found, name)]:
        raise TypeError(f"{module.__name__}.{found.__name__} must define {' and '.join(missing)}.")
    return found


def check_name(package: str, name: str) -> None:
    """Refuses a name that is no method of the package.

    Raises:
        ValueError: naming the nearest method and all others.
    """
    names = available(package)
    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    suggestion = f"did you mean '{near[0]}'? Available" if near else "available"
    raise ValueError(f"There is no method '{name}' in {package}; {suggestion}: {', '.join(names) or 'none'}.")


def card(package: str, name: str) -> MethodCard:
    """What a method's file says of itself, read from its source without importing it.

    Raises:
        ValueError: when there is no such method.
    """
    check_name(package, name)
    tree = read_source(f"{package}.{name}")
    return MethodCard(name=name, paper=_paper(tree), summary=first_sentence(tree))


def read_source(module: str) -> ast.Module:
    """The syntax tree of a module that is found but not imported (its package is).

    Raises:
        ModuleNotFoundError: when there is no such module in source form.
    """
    spec = importlib.util.find_spec(module)
    source = spec.loader.get_source(module) if spec and isinstance(spec.loader, InspectLoader) else None
    if source is None:
        raise ModuleNotFoundError(f"There is no source of {module}.", name=module)
    return ast.parse(source)


def first_sentence(tree: ast.Module) -> str:
    """The first paragraph of a module's docstring on one line; empty when it has none."""
    return (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ")


def _paper(tree: ast.Module) -> str:
    """The class attribute `paper` of the first public class that has one: a string, or a constant of the module."""
    constants = dict(_assignments(tree.body))
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
            continue
        value = dict(_assignments(node.body)).get("paper")
        if isinstance(value, ast.Name):
            value = constants.get(value.id)
        if isinstance(value, ast.Constant):
            return str(value.value)
    return ""


def _assignments(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr | None]]:
    """Names that statements assign to, with the assigned expressions."""
    for statement in body:
        if isinstance(statement, (ast.Assign, ast.AnnAssign)):
            target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
            if isinstance(target, ast.Name):
                yield target.id, statement.value
