# SPDX-License-Identifier: Apache-2.0
"""Checks the array types (jaxtyping) of the packages' annotations in every test that calls them.

An import hook puts `checked` on the functions of modules that import jaxtyping. jaxtyping's own
hook would also wrap functions without array types (2.4 us a call, the readers of single bits among
them), and it would refuse a wrong array before the function does; many tests give wrong input to
see an error of ours. So other annotations are ignored, and a wrong array fails a test only if the
function accepts it.
"""

import ast
import functools
import inspect
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader
from types import UnionType
from typing import Any, Union, get_args, get_origin

from beartype.door import is_bearable
from jaxtyping import AbstractArray, jaxtyped

PACKAGES = ("vivit_jax", "checkpoints_convert")


class ArrayTypeError(TypeError):
    """An array whose shape or dtype is not what the annotation says."""


def checked(function):
    """The function, raising ArrayTypeError for an array that does not fit its annotation.

    The function itself where none of its annotations holds an array type.
    """
    hints = {name: hint for name, hint in function.__annotations__.items() if holds_array(hint)}
    if not hints:
        return function
    fits = {name: fit_of(hint) for name, hint in hints.items()}
    returned = fits.pop("return", None)
    parameters = inspect.signature(function).parameters.values()
    named_only = inspect.Parameter.KEYWORD_ONLY
    places = [
        (each.name, sys.maxsize if each.kind is named_only else place, fits[each.name])
        for place, each in enumerate(parameters)
        if each.name in fits
    ]

    @functools.wraps(function)
    def call(*args, **kwargs):
        __tracebackhide__ = True
        with jaxtyped("context"):  # in which a letter stands for one size
            wrong = []
            for name, place, fit in places:
                if place < len(args):
                    value = args[place]
                elif name in kwargs:
                    value = kwargs[name]
                else:
                    continue
                if not fit(value):
                    wrong.append((name, value))
            out = function(*args, **kwargs)
            for name, value in wrong:
                raise ArrayTypeError(message(function, name, value, hints[name]))
            if returned is not None and not returned(out):
                raise ArrayTypeError(message(function, "what it returns", out, hints["return"]))
        return out

    return call


def fit_of(hint) -> Callable[[Any], bool]:
    """Whether a value fits an annotation; classes and unions of them need no beartype."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if all(isinstance(kind, type) and not get_args(kind) for kind in kinds):
        return lambda value: isinstance(value, kinds)
    return lambda value: is_bearable(value, hint)


def holds_array(hint) -> bool:
    """Whether an annotation is, or contains, an array type of jaxtyping."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(map(holds_array, get_args(hint)))


def message(function, name: str, value, hint) -> str:
    try:
        found = f"{value.dtype}{list(value.shape)}"
    except AttributeError:
        found = repr(value)[:200]
    where = f"{function.__module__}.{function.__qualname__}"
    return f"{where}: {name} is {found}, annotated as {hint}"


def install() -> None:
    """Check the packages' modules from now on; none of them may have been imported before."""
    before = [name for name in sys.modules if name.split(".")[0] in PACKAGES]
    assert not before, before
    sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] not in PACKAGES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def get_code(self, fullname):
        path = self.get_filename(fullname)
        source = self.get_data(path)
        if b"from jaxtyping import" not in source:
            return super().get_code(fullname)
        tree = _Decorate().visit(ast.parse(source, path))  # not cached: the cache has no checks
        first = next(i for i, node in enumerate(tree.body) if isinstance(node, ast.ImportFrom))
        tree.body.insert(first, ast.parse("import array_types as _array_types").body[0])
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)


class _Decorate(ast.NodeTransformer):
    def visit_FunctionDef(self, node):
        # Last in the list and applied first: what other decorators make need not be a function.
        check = ast.parse("_array_types.checked", mode="eval").body
        node.decorator_list.append(ast.copy_location(check, node))
        return self.generic_visit(node)
