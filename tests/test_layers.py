"""Imports point one way: the layer table of CONTRIBUTING.md, enforced on the source of the package and of the C++ code.

Every import counts, at module level or inside a function. The controls at the end check that a breach is seen.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "sdft_kernels"
OPS = ("divergence", "topk_divergence", "token_logprob", "prefix_attention")


@dataclass(frozen=True)
class Layer:
    """Modules of `PACKAGE` that match `pattern` ({op}: any op), what they may import of it, and of third parties."""

    pattern: str
    may_import: tuple[str, ...] = ()
    eager: frozenset[str] = frozenset()
    lazy: frozenset[str] = frozenset()


BASE = ("_version", "_dispatch", "_native", "_ema", "_head", "_gemm", "_checks", "_chunks", "_rows")
TERMS = ("{op}.fields", "{op}.token_loss", "{op}.statistics")
OTHER_OPS = ("{other}", "{other}.api")
ALL_OPS = ("{any}", "{any}.api")
TORCH = frozenset({"torch"})
MODEL_STACK = frozenset({"transformers", "peft", "accelerate", "safetensors", "tqdm", "datasets", "jinja2", "numpy"})
ANYTHING = frozenset({"*"})

# The first matching row holds, so the order matters; a module that no row matches is an error.
LAYERS = (
    Layer("__init__", ("_version", *ALL_OPS, "models", "distill")),
    Layer("_version"),
    Layer("_native", ("_version",), eager=TORCH),
    Layer("_ema", ("_native",), eager=TORCH),
    Layer("_dispatch", ("_version", "_native"), eager=TORCH),
    Layer("_head"),
    Layer("_gemm", ("_native",), eager=TORCH),
    Layer("_triton_math", eager=frozenset({"triton"})),
    Layer("_checks", ("_head", "_dispatch"), eager=TORCH),
    Layer("_rows", ("_head",), eager=TORCH),
    Layer("_chunks", ("_head", "_gemm", "_checks"), eager=TORCH),
    Layer("{op}.fields", eager=TORCH),
    Layer("{op}.token_loss", ("{op}.fields",), eager=TORCH),
    Layer("{op}.statistics", (*BASE, "{op}.fields"), eager=TORCH),
    Layer("{op}.gallery", TERMS, eager=TORCH),
    Layer("{op}.kernels_triton", (*BASE, "_triton_math"), eager=frozenset({"triton"})),
    Layer("{op}.kernels_triton_backward", ("_triton_math", "{op}.kernels_triton"), eager=frozenset({"triton"})),
    Layer(
        "{op}.fused_triton", (*BASE, "{op}.call", "{op}.kernels_triton", "{op}.kernels_triton_backward"), eager=TORCH
    ),
    Layer("{op}.fused_native", (*BASE, "{op}.call", "{op}.parts"), eager=TORCH),
    Layer("{op}.rows_triton", (*BASE, *TERMS, "{op}.kernels_triton"), eager=TORCH),
    Layer("{op}.rows_*", (*BASE, *TERMS), eager=TORCH),
    Layer("{op}.reference", (*BASE, *TERMS, "{op}.tree"), eager=TORCH),
    Layer("{op}.vocab_parallel", (*BASE, *TERMS), eager=TORCH),
    Layer("{op}.driver", ("{op}.vocab_parallel", *BASE, *TERMS, "{op}.rows_*", *OTHER_OPS), eager=TORCH),
    Layer("{op}.operators", (*BASE, *TERMS, "{op}.driver", "{op}.call"), eager=TORCH),
    Layer(
        "{op}.api",
        (
            *(*BASE, *TERMS, "{op}.reference", "{op}.driver", "{op}.operators"),
            *(
                "{op}.planner",
                "{op}.tree",
                "{op}.parts",
                "{op}.call",
                "{op}.composition",
                "{op}.fused_*",
                *OTHER_OPS,
            ),
        ),
        eager=TORCH,
    ),
    Layer("{op}.planner", ("_native",)),
    Layer("{op}.identity", eager=TORCH),
    Layer("{op}.cache", ("{op}.identity",), eager=TORCH),
    Layer("{op}.tree", ("{op}.planner",), eager=TORCH),
    Layer("{op}.parts", ("{op}.tree",), eager=TORCH),
    Layer("{op}.call", ("{op}.tree", "{op}.parts"), eager=TORCH),
    Layer("{op}.part_dense", (*BASE, "{op}.parts"), eager=TORCH),
    Layer("{op}.part_flash", (*BASE, "{op}.parts", "{op}.part_dense"), eager=TORCH, lazy=frozenset({"flash_attn"})),
    Layer("{op}.composition", (*BASE, "{op}.tree", "{op}.parts", "{op}.call", "{op}.part_*"), eager=TORCH),
    Layer("{op}.__init__", ("{op}.api", "{op}.planner", "{op}.tree", "{op}.cache", *TERMS)),
    Layer("testing.*", (*BASE, *ALL_OPS, "{any}.*", "testing", "testing.*"), eager=TORCH),
    # Subclasses of transformers' cache: imported lazily, by `models.shared_prefill`.
    Layer("models.decode_cache", ("models.decode_attention",), eager=TORCH | {"transformers"}),
    Layer("models.*", (*BASE, *ALL_OPS, "models", "models.*"), eager=TORCH, lazy=MODEL_STACK),
    Layer("distill.*", (*BASE, *ALL_OPS, "models", "models.*", "distill", "distill.*"), eager=TORCH | MODEL_STACK),
    Layer(
        "integrations.*",
        (*BASE, *ALL_OPS, "models", "models.*", "distill", "distill.*", "integrations", "integrations.*"),
        eager=TORCH,
        lazy=ANYTHING,
    ),
    Layer("cli._*", ("*",), eager=TORCH, lazy=ANYTHING),
    Layer("cli.*", ("*",), lazy=ANYTHING),
    Layer("__main__", ("cli", "cli.*")),
)


@dataclass(frozen=True)
class Import:
    target: str  # absolute, e.g. "sdft_kernels.divergence.api" or "torch.nn"
    line: int
    lazy: bool


class _Imports(ast.NodeVisitor):
    def __init__(self, module: str, known: set[str]) -> None:
        self.package = module.rpartition(".")[0]  # "a.b.__init__" and "a.b.c" both live in package "a.b"
        self.known = known
        self.depth = 0
        self.found: list[Import] = []

    def _add(self, target: str, node: ast.AST) -> None:
        self.found.append(Import(target, node.lineno, self.depth > 0))

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_If(self, node: ast.If) -> None:
        typing_only = ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        self.depth += typing_only
        self.generic_visit(node)
        self.depth -= typing_only

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        parts = self.package.split(".")
        base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
        source = ".".join(part for part in (base, node.module or "") if part)
        for alias in node.names:
            name = f"{source}.{alias.name}"
            self._add(name if self._is_module(name) else source, node)

    def visit_Call(self, node: ast.Call) -> None:
        function = ast.unparse(node.func)
        if function.endswith("import_module") or function == "__import__":
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                self._add(first.value, node)
        self.generic_visit(node)

    def _is_module(self, name: str) -> bool:
        return name in self.known or f"{name}.__init__" in self.known


def imports_of(module: str, source: str, known: set[str]) -> list[Import]:
    visitor = _Imports(module, known)
    visitor.visit(ast.parse(source))
    return visitor.found


def _expand(pattern: str, op: str) -> Iterator[str]:
    if "{any}" in pattern or "{other}" in pattern:
        for name in OPS:
            if "{any}" in pattern or name != op:
                yield pattern.replace("{any}", name).replace("{other}", name)
    else:
        yield pattern.replace("{op}", op)


def layer_of(name: str) -> tuple[Layer, str]:
    """The row for a module named relative to the package, and its op ("" outside ops)."""
    op = name.partition(".")[0]
    op = op if op in OPS else ""
    for layer in LAYERS:
        if ("{op}" not in layer.pattern or op) and fnmatchcase(name, layer.pattern.replace("{op}", op)):
            return layer, op
    raise AssertionError(f"{PACKAGE}.{name} is in no layer: name it after one of {[row.pattern for row in LAYERS]}")


def _inside_breach(layer: Layer, op: str, target: str) -> bool:
    allowed = [pattern for entry in layer.may_import for pattern in _expand(entry, op)]
    return not any(fnmatchcase(target, pattern) for pattern in allowed)


def _outside_breach(layer: Layer, item: Import) -> bool:
    top = item.target.partition(".")[0]
    if top in sys.stdlib_module_names:
        return False
    allowed = layer.eager | (layer.lazy if item.lazy else frozenset())
    return top not in allowed and "*" not in allowed or top in ("benchmarks", "tests")


def breaches(sources: Mapping[str, str]) -> list[str]:
    """Every import in `sources` (module name to code) that the table forbids, as "module:line imports target"."""
    known = set(sources)
    found = []
    for module, source in sorted(sources.items()):
        name = module.removeprefix(f"{PACKAGE}.")
        layer, op = layer_of(name)
        for item in imports_of(module, source, known):
            if item.target == PACKAGE:
                bad = name not in ("cli.__main__",) and layer.pattern not in ("cli._*", "cli.*", "integrations.*")
            elif item.target.startswith(f"{PACKAGE}."):
                bad = _inside_breach(layer, op, item.target.removeprefix(f"{PACKAGE}."))
            else:
                bad = _outside_breach(layer, item)
            if bad:
                found.append(f"{module}:{item.line} imports {item.target}{' lazily' if item.lazy else ''}")
    return found


def package_sources() -> dict[str, str]:
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text() for path in files}


INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*[<"]([^>"]+)[>"]', re.MULTILINE)
PYTHON_HEADERS = ("Python.h", "pybind11/")
TORCH_HEADERS = ("torch/", "ATen/", "c10/")
STABLE_HEADERS = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")


def include_breaches(sources: Mapping[str, str]) -> list[str]:
    """Only python/ sees CPython, only csrc outside include/ sees torch, and of torch only the stable ABI."""
    found = []
    for path, source in sorted(sources.items()):
        for header in INCLUDE.findall(source):
            python_header = header.startswith(PYTHON_HEADERS)
            torch_header = header.startswith(TORCH_HEADERS)
            may_see_torch = path.startswith("csrc/") and not path.startswith("csrc/include/")
            if python_header and not path.startswith("python/"):
                found.append(f"{path} includes {header}: only python/ may")
            if torch_header and not may_see_torch:
                found.append(f"{path} includes {header}: raw pointers only")
            if torch_header and may_see_torch and not header.startswith(STABLE_HEADERS):
                found.append(f"{path} includes {header}: not in torch's stable ABI")
    return found


def cpp_sources() -> dict[str, str]:
    suffixes = {".h", ".in", ".cuh", ".cpp", ".cu"}
    files = [path for top in ("csrc", "python") for path in (ROOT / top).rglob("*") if path.suffix in suffixes]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in files}


def test_package_imports_point_one_way() -> None:
    sources = package_sources()
    assert f"{PACKAGE}.divergence.api" in sources
    assert breaches(sources) == []


def test_cpp_includes_keep_to_their_side() -> None:
    sources = cpp_sources()
    assert {"csrc/ops.cpp", "csrc/include/sdft_kernels/prefix_tree.h", "python/bindings/host.cpp"} <= set(sources)
    assert include_breaches(sources) == []


KNOWN = {
    f"{PACKAGE}.{name}": ""
    for name in (
        "__init__",
        "_dispatch",
        "divergence.__init__",
        "divergence.api",
        "divergence.driver",
        "divergence.fields",
        "divergence.reference",
        "divergence.rows_torch",
        "divergence.rows_native",
        "token_logprob.__init__",
        "token_logprob.api",
        "token_logprob.driver",
        "models.__init__",
        "distill.__init__",
        "distill.trainer",
        "cli.env",
    )
}


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("divergence.rows_torch", "from . import rows_native"),
        ("divergence.rows_torch", "from .rows_native import step"),
        ("divergence.rows_torch", "def f():\n    from .reference import g"),
        ("divergence.reference", "from .driver import run"),
        ("divergence.reference", "import sdft_kernels.divergence.driver"),
        ("divergence.reference", "import importlib\nimportlib.import_module('sdft_kernels.divergence.driver')"),
        ("divergence.driver", "from .api import linear_divergence"),
        ("divergence.api", "from ..token_logprob.driver import run"),
        ("divergence.api", "from sdft_kernels import linear_divergence"),
        ("divergence.api", "import transformers"),
        ("divergence.api", "def f():\n    import triton"),
        ("divergence.rows_torch", "import numpy"),
        ("_dispatch", "from .divergence import api"),
        ("models.__init__", "from ..distill import SelfDistiller"),
        ("models.__init__", "from ..divergence.rows_torch import step"),
        ("models.__init__", "import transformers"),
        ("distill.trainer", "def f():\n    from ..cli import env"),
        ("distill.trainer", "from benchmarks import demo"),
        ("distill.trainer", "def f():\n    import trl"),
        ("cli.env", "import torch"),
        ("__init__", "import torch.utils.data\nimport numpy"),
    ],
)
def test_breach_is_seen(name: str, code: str) -> None:
    assert breaches(KNOWN | {f"{PACKAGE}.{name}": code}), code


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("divergence.rows_torch", "import math\nimport torch\nfrom .fields import FIELDS"),
        ("divergence.driver", "from . import rows_torch"),
        ("divergence.api", "from ..token_logprob import linear_token_logprob\nfrom ..token_logprob.api import f"),
        ("models.__init__", "def f():\n    import peft"),
        ("distill.trainer", "import transformers\nfrom ..models import head_kwargs\nfrom .. import _native"),
        ("cli.env", "def run():\n    import torch\n    import sdft_kernels"),
        ("__init__", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .divergence import f"),
    ],
)
def test_allowed_import_is_not_flagged(name: str, code: str) -> None:
    sources = KNOWN | {f"{PACKAGE}._native": "", f"{PACKAGE}.{name}": code}
    assert breaches(sources) == []


def test_module_outside_the_table_is_an_error() -> None:
    with pytest.raises(AssertionError, match="divergence.helpers is in no layer"):
        breaches({f"{PACKAGE}.divergence.helpers": ""})


@pytest.mark.parametrize(
    ("path", "header"),
    [
        ("csrc/include/sdft_kernels/a.h", "torch/csrc/stable/tensor.h"),
        ("csrc/include/sdft_kernels/a.h", "Python.h"),
        ("csrc/ops.cpp", "pybind11/pybind11.h"),
        ("csrc/cpu/a.cpp", "torch/extension.h"),
        ("csrc/cpu/a.cpp", "ATen/ATen.h"),
        ("python/bindings/a.cpp", "torch/csrc/stable/tensor.h"),
    ],
)
def test_include_breach_is_seen(path: str, header: str) -> None:
    assert include_breaches({path: f"#include <vector>\n  #  include <{header}>\n"})
