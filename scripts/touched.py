"""Which test files a change touches: what scripts/dev runs.

Python: a test touches the modules whose names it uses, followed through re-exports to where a name is
defined (`nf.functional.c_triplet_loss` is of `agents.functions`), then what those use, and so on: the
number of steps is the distance. C++: from the file through #include to the sources that register ops, from
the ops by the table below to test files, and from the folder to the lane. Nothing is imported or built.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "normface_ext"
#: Runs with every change of a kernel: all ops, both directions, in seconds.
ALWAYS = "test_every_op"
#: Test files by how the names of ops begin, the main one first; every op of csrc/schemas.h has a row.
TESTS_OF_OPS = {
    "normalize": ["test_normalize"],
    "norm_linear": ["test_norm_linear"],
    "head_": ["test_normface_loss", "test_head_kernels", "test_class_shards", "test_loss_weights"],
    "softmax_": ["test_normface_loss", "test_head_kernels", "test_class_shards", "test_loss_weights"],
    "hinge_": ["test_metric_losses", "test_agent_shards", "test_agent_weights"],
    "target_cosine": ["test_metric_losses", "test_agent_shards"],
    "target_center": ["test_sub_centers", "test_sub_center_shards"],
    "cosine_pairs": ["test_metric_losses", "test_agent_shards"],
    "inner_distance": ["test_inner_distance"],
    "pair_distance": ["test_inner_distance"],
}
EMULATION = ["test_emulation", "test_emulation_hopper", "test_emulation_cluster"]
#: What no import says, by the beginning of the path.
TESTS_OF_FILES = {
    "normface_ext/__init__.py": [ALWAYS, "test_contract"],
    "normface_ext/_checkout.py": ["test_install"],
    **{
        f"normface_ext/{family}/__init__.py": [ALWAYS]
        for family in ("agents", "cosine", "distances", "engine", "sigmoid", "softmax")
    },
    "csrc/schemas.h": ["test_contract"],
    "csrc/engine/op.h": [ALWAYS, "test_contract"],
    "csrc/math/": ["test_math"],
    "csrc/cuda/device/": EMULATION,
    "tests/emulation/": [*EMULATION, "test_emulation_cache", ALWAYS],
    "tests/cuda_budget.json": ["test_cuda_compiles"],
    "tests/prototxt/": ["test_caffe_loader"],
    "tests/lanes.py": [ALWAYS],
    "tests/conftest.py": [ALWAYS, "test_selection"],
    "setup.py": ["test_install", "test_build"],
    "pyproject.toml": ["test_build", "test_install"],
    "README.md": ["test_docs"],
    "docs/": ["test_docs"],
    "benchmarks/": ["test_benchmarks"],
    "scripts/dev": ["test_touched"],
}


@dataclass
class Touched:
    """Test files, nearest first, and what -k is to keep of them: None, "cpu" or "cuda" kernels."""

    tests: list[str] = field(default_factory=list)
    lane: str | None = None


# Python -------------------------------------------------------------------------------------------------


@cache
def modules() -> dict[str, Path]:
    """Every module that tests may reach, by the name they import it under."""
    found = {}
    for path in (ROOT / PACKAGE).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    for folder in ("tests", "scripts", "examples", "benchmarks"):
        found |= {path.stem: path for path in (ROOT / folder).glob("*.py")}
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


def absolute(module: str, node: ast.ImportFrom) -> str:
    """The module that `from ... import` names, seen from `module`."""
    if not node.level:
        return node.module or ""
    here = module.split(".")
    up = node.level - (modules()[module].name == "__init__.py")
    return ".".join([*here[: len(here) - up], *([node.module] if node.module else [])])


@cache
def bindings(module: str) -> dict[str, tuple[str, str]]:
    """Imported names: (module, "") for a module, (module, name) for a name in one."""
    found = {}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in modules() or alias.name.partition(".")[0] in modules():
                    whole = alias.name if alias.asname else alias.name.partition(".")[0]
                    found[alias.asname or whole] = (whole, "")
        elif isinstance(node, ast.ImportFrom):
            source = absolute(module, node)
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                if inner in modules() and alias.name not in bindings_of_names(source):
                    found[alias.asname or alias.name] = (inner, "")
                elif source in modules():
                    found[alias.asname or alias.name] = (source, alias.name)
    return found


@cache
def bindings_of_names(module: str) -> frozenset[str]:
    """Names that a package's __init__ imports from elsewhere, which hide its modules of that name."""
    if module not in modules():
        return frozenset()
    imports = (node for node in ast.walk(tree(module)) if isinstance(node, ast.ImportFrom) and node.module)
    return frozenset(alias.asname or alias.name for node in imports for alias in node.names)


def definer(module: str, name: str) -> str:
    """The module where the name is defined, through re-exports."""
    seen = set()
    while name and (module, name) not in seen:
        seen.add((module, name))
        if name in bindings(module):
            module, name = bindings(module)[name]
        else:
            break
    return module


def names_used(module: str) -> set[str]:
    """The modules whose names the code of `module` uses."""
    known, used = bindings(module), set()
    chains = {}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute):
            chains[id(node.value)] = node  # the longest chain is what counts
    for node in ast.walk(tree(module)):
        if not (isinstance(node, ast.Name) and node.id in known):
            continue
        target, name = known[node.id]
        target, here = definer(target, name) if name else target, node
        while (outer := chains.get(id(here))) is not None:
            inner = f"{target}.{outer.attr}"
            if inner in modules() and outer.attr not in bindings_of_names(target):
                target = inner
            elif outer.attr in bindings(target):
                target = definer(target, outer.attr)
            else:
                break
            here = outer
        used.add(target)
        asked = chains.get(id(here))
        if here is node and not name and not (asked and asked.attr.startswith("__")):
            # The module itself is handed on, to getattr perhaps: then to any public name of it.
            used |= {definer(target, each) for each in bindings(target) if not each.startswith("_")}
    text = modules()[module].read_text(encoding="utf-8")
    used |= {name for name in re.findall(rf"[\"'/ ]({PACKAGE}\.[\w.]+)", text) if name in modules()}
    # Scripts that tests start by their file name, such as "train_digits.py"; this one's test starts none.
    if module != "test_touched":
        used |= {name for name in re.findall(r"[\"'/](\w+)\.py\b", text) if name in modules()}
    return used - {module, PACKAGE}


@cache
def uses() -> dict[str, set[str]]:
    return {module: names_used(module) for module in modules()}


def takes_long(test: str) -> bool:
    """Starts processes, or trains as an example does."""
    named = {name.name for name in imports(test)}
    scripts = {
        name for name in named & set(modules()) if modules()[name].parent.name in ("examples", "benchmarks")
    }
    return bool(scripts or {"subprocess", "ranks"} & named)


def imports(module: str) -> list[ast.alias]:
    nodes = [node for node in ast.walk(tree(module)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    sources = [ast.alias(node.module or "") for node in nodes if isinstance(node, ast.ImportFrom)]
    return sources + [alias for node in nodes for alias in node.names]


def tests_of_python(changed: str) -> list[str]:
    """Test files that reach the module, as far as the nearest and one step beyond: the one of its name first,
    then by distance, and those that take long last."""
    distance, reached = 0, {changed}
    found: dict[str, int] = {changed: 0} if changed.startswith("test_") else {}
    while True:
        distance += 1
        new = {module for module, used in uses().items() if used & reached} - reached
        reached |= new
        found |= {module: distance for module in new if module.startswith("test_")}
        if not new or (found and distance > min(found.values())):
            break
    own = f"test_{changed.rpartition('.')[2].strip('_')}"

    def order(test: str) -> tuple[object, ...]:  # of equally near ones the one that is about least else first
        return test != own, found[test], takes_long(test), len(uses()[test]), test

    return sorted(found, key=order)


# C++ ----------------------------------------------------------------------------------------------------


@cache
def included() -> dict[str, set[str]]:
    """What each C++ file includes, directly, by paths from the root."""
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    result = {}
    for file in files:
        text = (ROOT / file).read_text(encoding="utf-8")
        result[file] = set()
        for name in re.findall(r'^\s*#include ["<]([\w./]+)[">]', text, re.M):
            places = (f"{file.rpartition('/')[0]}/{name}", f"csrc/{name}", f"csrc/cuda/{name}")
            result[file] |= {place for place in places if place in files}
    return result


def includers(file: str) -> set[str]:
    """The file and whatever includes it, in however many steps; a source without ops counts as its header."""
    reached, queue = set(), [file]
    while queue:
        here = queue.pop()
        if here in reached:
            continue
        reached.add(here)
        queue += [other for other, names in included().items() if here in names]
        stem = here.rpartition(".")[0]
        if here.endswith((".cu", ".cpp")) and not ops_of(here):
            queue += [
                header for header in (f"{stem}.h", f"{stem.rpartition('_')[0]}.h") if header in included()
            ]
    return reached


def ops_of(source: str) -> set[str]:
    if not source.endswith((".cu", ".cpp")):
        return set()
    found = re.findall(r'm\.impl\("(\w+)"|implement<&(?:\w+::)*(\w+)>', (ROOT / source).read_text("utf-8"))
    return {name for pair in found for name in pair if name}


def ops() -> set[str]:
    """Every op that csrc/schemas.h defines, by its arguments' struct or by a text."""
    texts = [path.read_text("utf-8") for path in (ROOT / "csrc/engine").glob("*_arguments.h")]
    named = re.findall(r'kName = "(\w+)";', "".join(texts))
    return {*named, *re.findall(r'def\(\s*"(\w+)\(', (ROOT / "csrc/schemas.h").read_text("utf-8"))}


def tests_of_ops(ops: Iterable[str]) -> list[str]:
    """Those of the table, the main file of each op before what stands behind it there."""
    place: dict[str, int] = {}
    for start, tests in TESTS_OF_OPS.items():
        if any(op.startswith(start) for op in ops):
            for index, test in enumerate(tests):
                place[test] = min(index, place.get(test, index))
    return sorted(place, key=lambda test: (place[test], test))


def tests_of_csrc(file: str) -> Touched:
    ops = {op for source in includers(file) if source in included() for op in ops_of(source)}
    lane = next((lane for lane in ("cpu", "cuda") if file.startswith(f"csrc/{lane}/")), None)
    return Touched([ALWAYS, *tests_of_ops(ops)], lane)


# Both ---------------------------------------------------------------------------------------------------


def touched(files: Iterable[str]) -> Touched:
    """By paths from the root; what touches no test, such as a licence, adds none."""
    tests: dict[str, None] = {}
    lanes = set()
    for file in files:
        by_table = [
            test for start, found in TESTS_OF_FILES.items() if file.startswith(start) for test in found
        ]
        lane = None
        if file.startswith("csrc/"):
            here = tests_of_csrc(file)
            by_table, lane = [*by_table, *here.tests], here.lane
        elif file.endswith(".py"):
            name = next((name for name, path in modules().items() if path == ROOT / file), None)
            by_table += tests_of_python(name) if name and not by_table else []
        if by_table:
            lanes.add(lane)
        tests |= dict.fromkeys(by_table)
    return Touched(list(tests), lanes.pop() if len(lanes) == 1 else None)
