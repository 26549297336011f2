"""What was built: build_info's facts, the registered operators."""

import importlib.metadata
import re
from pathlib import Path

import pytest
import torch
import typing_sample

import normface_ext
from normface_ext.engine import library

PACKAGE = Path(normface_ext.__file__).parent


def test_every_package_is_listed():
    """A wheel has the packages that pyproject.toml names, and no others."""
    root = Path(__file__).parents[1]
    line = re.search(
        r"^packages = \[(.*?)\]$", (root / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL
    )
    listed = re.findall(r'"([^"]+)"', line[1])
    found = [path.parent.relative_to(root) for path in (root / "normface_ext").rglob("__init__.py")]
    assert sorted(listed) == sorted(".".join(path.parts) for path in found)


def test_build_info_says_what_is_at_hand():
    info = normface_ext.build_info()
    assert info["version"] == importlib.metadata.version("normface_ext")
    assert info["torch_run"] == torch.__version__
    assert re.match(r"2\.\d+", str(info["torch_built"]))
    assert info["compiler"] and info["simd"]
    assert info["cuda_built"] == (PACKAGE / "_cuda.so").exists()
    assert bool(info["cuda_architectures"]) == info["cuda_built"]
    assert info["cuda_loaded"] == (info["cuda_reason"] is None)
    if info["cuda_loaded"]:
        assert torch.version.cuda is not None


def test_every_operator_has_a_cpu_kernel():
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("normface_ext::")}
    assert names
    assert [name for name in names if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")] == []


def test_cuda_kernels_cover_the_same_operators():
    if not normface_ext.build_info()["cuda_loaded"]:
        pytest.skip(str(normface_ext.build_info()["cuda_reason"]))
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("normface_ext::")}
    assert [name for name in names if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")] == []


def test_missing_cuda_is_explained(monkeypatch):
    monkeypatch.setattr(library, "_cuda_reason", "`_cuda` was not built")
    with pytest.raises(
        RuntimeError, match=r"^normalize: .*`_cuda` was not built.*NORMFACE_CUDA=1 pip install"
    ):
        library.require_cuda("normalize")


def test_loaded_cuda_is_not_complained_about(monkeypatch):
    monkeypatch.setattr(library, "_cuda_reason", None)
    library.require_cuda("normalize")


def test_another_namespace_is_used_and_given_back():
    other = torch.ops.normface_another
    with pytest.raises(KeyError), library.use_namespace(other):
        assert library.namespace() is other
        raise KeyError
    assert library.namespace() is torch.ops.normface_ext


def test_the_sample_that_type_checkers_read_runs():
    typing_sample.main()


def test_the_version_is_the_same_everywhere():
    root = Path(__file__).parents[1]
    version = re.search(r'^VERSION = "(.+)"$', (root / "setup.py").read_text(), re.MULTILINE)[1]
    assert importlib.metadata.version("normface_ext").partition("+")[0] == version
    assert re.search(r"^version: (.+)$", (root / "CITATION.cff").read_text(), re.MULTILINE)[1] == version
    assert re.search(r"^## \[(.+?)\]", (root / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version
