"""scripts/dev finds the tests that a change touches, and runs them on what was changed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import pytest
import touched

ROOT = touched.ROOT
TESTS = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
OPS = sorted(touched.ops())


@pytest.mark.parametrize(
    ("file", "nearest", "never"),
    [
        ("normface_ext/theory.py", "test_theory", "test_normalize"),
        ("normface_ext/mirror.py", "test_mirror", "test_norm_linear"),
        ("normface_ext/engine/plan.py", "test_plan", "test_image_files"),
        ("normface_ext/evaluation/ytf.py", "test_evaluation_labels", "test_normface_loss"),
        ("normface_ext/caffe/proto.py", "test_caffemodel_files", "test_normface_loss"),
        ("normface_ext/distributed/rows.py", "test_row_optimizers", "test_metric_losses"),
        ("examples/train_digits.py", "test_examples", "test_modules"),
        ("scripts/ptxas_report.py", "test_cuda_compiles", "test_normalize"),
        ("tests/test_theory.py", "test_theory", "test_modules"),
        ("tests/distributed_jobs.py", "test_distributed_wrapping", "test_theory"),
        ("docs/index.md", "test_docs", "test_theory"),
    ],
)
def test_python_and_documents(file, nearest, never):
    assert (ROOT / file).exists()
    found = touched.touched([file])
    assert found.tests[0] == nearest and never not in found.tests and found.lane is None


def test_a_re_export_is_followed_to_where_the_name_is_defined():
    near = touched.touched(["normface_ext/agents/ops.py"]).tests
    assert {"test_agent_shards", "test_metric_losses"} <= set(near) and "test_normalize" not in near
    package = touched.PACKAGE
    assert touched.definer(package, "ArcFace") == f"{package}.softmax.margins"
    assert touched.definer(f"{package}.functional", "normalize") == f"{package}.cosine.functions"
    assert f"{package}.theory" in touched.uses()["test_theory"]


@pytest.mark.parametrize(
    ("file", "tests", "never", "lane"),
    [
        ("csrc/cuda/host/normalize.cu", ["test_normalize"], "test_normface_loss", "cuda"),
        ("csrc/cpu/norm_linear.cpp", ["test_norm_linear"], "test_normalize", "cpu"),
        # Registers no op: its header says whose step it is.
        (
            "csrc/cuda/products/sm80_scores.cu",
            ["test_normface_loss", "test_head_kernels"],
            "test_normalize",
            "cuda",
        ),
        (
            "csrc/cuda/host/hinge_rows.cu",
            ["test_metric_losses", "test_agent_shards"],
            "test_normalize",
            "cuda",
        ),
        ("csrc/cpu/rows_avx2.cpp", ["test_normalize", "test_norm_linear"], "test_theory", "cpu"),
        ("csrc/math/softmax.h", ["test_math", "test_normface_loss"], "test_normalize", None),
        ("csrc/cuda/device/warp.cuh", ["test_emulation", "test_normalize"], "test_theory", "cuda"),
        ("csrc/schemas.h", ["test_contract"], "test_theory", None),
        ("tests/emulation/watch.cpp", ["test_emulation", "test_emulation_hopper"], "test_theory", None),
        ("csrc/cuda/device/cluster.cuh", ["test_emulation_cluster"], "test_theory", "cuda"),
    ],
)
def test_kernels(file, tests, never, lane):
    found = touched.touched([file])
    assert {*tests, touched.ALWAYS} <= set(found.tests) and never not in found.tests
    assert found.lane == lane


def test_changes_add_up():
    both = touched.touched(["csrc/cuda/host/normalize.cu", "normface_ext/theory.py"])
    assert {"test_normalize", "test_theory"} <= set(both.tests)
    assert both.lane is None and len(set(both.tests)) == len(both.tests)
    assert touched.touched(["csrc/cuda/host/normalize.cu", "csrc/cpu/normalize.cpp"]).lane is None
    assert touched.touched(["csrc/cuda/host/normalize.cu", "LICENSE"]).lane == "cuda"
    assert touched.touched(["LICENSE", "no/such/file.py"]).tests == []


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_tests(op):
    assert touched.tests_of_ops([op])


def test_the_tables_name_what_exists():
    rows = [*touched.TESTS_OF_OPS.values(), *touched.TESTS_OF_FILES.values()]
    assert {test for row in rows for test in row} <= TESTS
    assert all(any((ROOT).glob(f"{start}*")) for start in touched.TESTS_OF_FILES)
    assert all(any(op.startswith(start) for op in OPS) for start in touched.TESTS_OF_OPS)


def test_every_source_of_the_package_reaches_a_test():
    for folder in ("normface_ext", "csrc"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".h", ".cu", ".cuh", ".cpp", ".inc"):
                file = path.relative_to(ROOT).as_posix()
                assert touched.touched([file]).tests, file


def dev(*arguments):
    command = [sys.executable, str(ROOT / "scripts" / "dev"), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_list_runs_nothing():
    said = dev("--list", "normface_ext/theory.py", "LICENSE")
    assert said.startswith("2 changed; tests: test_theory,") and said.count("\n") == 1
    assert dev("LICENSE") == "1 changed; tests: none\n"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ninja") is None, reason="ninja, to build with, not found")
def test_it_rebuilds_and_runs_the_nearest_first():
    """With no time at all, the first file is begun and the others are named."""
    said = dev(
        "--seconds", "0.0001", "normface_ext/theory.py", "--", "-k", "bounds_of_the_tables or test_modules"
    )
    assert re.search(r"\d+ passed", said) and "rebuilt in" in said
    assert re.search(r"left after .*: test_modules", said)
    built = ROOT / "build" / "dev" / "normface_ext"
    assert (built / "theory.py").read_bytes() == (ROOT / "normface_ext" / "theory.py").read_bytes()
    assert (built / "_C.so").exists()
