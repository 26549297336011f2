"""What contributors are told holds: commands, versions and files."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_pre_commit_has_the_versions_of_the_dev_extra():
    extra = re.search(r"^dev = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.M)[1]
    pinned = dict(re.findall(r'"([\w-]+)==([\d.]+)"', extra))
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    hooks = dict(re.findall(r"repo: \S+/(?:mirrors-)?([\w-]+?)(?:-pre-commit)?\n\s+rev: v([\d.]+)", text))
    assert hooks == {name: pinned[name] for name in ("ruff", "clang-format")}


def test_clang_format_is_run_on_what_the_check_looks_at():
    pattern = re.search(r"files: (\S+)", (ROOT / ".pre-commit-config.yaml").read_text())[1]
    suffixes = set(re.findall(r"-name '\*(\.\w+)'", (ROOT / "scripts" / "check").read_text()))
    assert suffixes == {".h", ".inc", ".cuh", ".cu", ".cpp"}
    assert all(re.search(pattern, f"csrc/a/b{suffix}") for suffix in suffixes)
    assert not re.search(pattern, "normface_ext/a.py") and not re.search(pattern, "docs/a.h")


def test_ci_runs_the_readme_s_command_for_every_test():
    program = re.search(r"test_command=\$\(awk '(.*)' README\.md\)", (ROOT / ".ci" / "run").read_text())[1]
    found = subprocess.run(["awk", program, ROOT / "README.md"], check=True, capture_output=True, text=True)
    assert found.stdout == 'pip install ".[test]" && pytest --all -n 2\n'
    fences = re.findall(r"```bash\n(.*?)```", README, re.S)
    assert ['pip install ".[test]" && pytest\n', found.stdout] == [f for f in fences if "[test]" in f]


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:tests|scripts|docs|csrc|\.ci)/[\w./]*)", GUIDE)))
)
def test_files_of_the_guide_exist(path):
    assert (ROOT / path).exists()


def test_options_of_the_guide_are_options():
    said = (ROOT / "scripts" / "dev").read_text() + (ROOT / "scripts" / "check").read_text()
    assert all(option in said for option in ("--list", "--fix"))
