"""`load_head`: reads a prototxt, lists what is wrong with it, and builds its `Head`."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

from ..engine import checks
from ..engine.arguments import choice, integer
from ..engine.files import clip, file_name, listing, read_bytes
from .graph import Head
from .prototxt import LONGEST_TEXT, parse_text
from .reach import reachable, suggested
from .spec import Context, Report, Spec
from .upgrade import upgraded

MODES = ("math", "caffe")


def load_head(
    path_or_text: str | os.PathLike[str],
    *,
    mode: str = "math",
    inputs: Iterable[str] | None = None,
    in_features: int | None = None,
    eps: float = 1e-12,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Head:
    """The head of a NormFace prototxt as a module: its layers, options, wiring and multipliers.

    Args:
        path_or_text: a file, or its text (anything with a line break or a brace).
        mode: "math": every gradient is that of the value. "caffe": values and gradients as the released
            layers computed them, slips included; see docs/caffe-compatibility.md.
        inputs: blobs given from outside. By default those that no layer of the file makes. Name them to
            load the head of a whole net: layers that cannot be reached from them are left out, and so are
            those of the net before that work in place on one, as ``Head.notes`` tells.
        in_features: D, where a layer has its own weights: Caffe infers it from the net before the head.
            Without it those weights appear with the first forward call, or with load_caffemodel.
        eps: inside the L2 norms; Caffe has 1e-12 on the GPU and 1e-6 on the CPU.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: what the file has that is not supported, all of it, each with its file and line, in at
            most 2000 characters. Also what no memory or time should be spent on: more than 1 MiB of text,
            5000 layers in the net or 1000 in the head, blobs of 2^31 numbers (as in Caffe) or that together
            do not fit into the free memory.
        OSError: the file can't be read.
        ImportError: protobuf is missing (`pip install 'normface_ext[caffe]'`).
    """
    mode = choice("load_head", "mode", mode, MODES)
    if in_features is not None:
        in_features = integer("load_head", "in_features", in_features, 1)
    eps = checks.eps("load_head", "eps", eps)
    where, text = _read(path_or_text)
    net, lines = parse_text(text, where)
    report = Report(where)
    for name, line in lines.unknown:
        report.refuse(line, f"unknown option `{clip(name, 60)}` of the net")
    given = None if inputs is None else [str(name) for name in inputs]
    declared = [str(name) for name in net.input]
    context = Context(mode, eps, in_features, device, dtype)
    found = list(zip(net.layer, lines.fields.get("layer", []), strict=True))
    old = [upgraded(layer, lines.fields["layers"][i], report) for i, layer in enumerate(net.layers)]
    if found and old:
        report.refuse(lines.of("layers"), "expected either `layer` or the older `layers`, got both")
    specs = [Spec(layer, place, report) for layer, place in found + old]
    declared += [top for spec in specs if spec.type == "Input" for top in spec.tops]
    specs = [spec for spec in specs if spec.type != "Input"]
    entries = suggested(specs)
    specs = specs if given is None else reachable(specs, given, report)
    if not specs and not report.problems:
        report.refuse(1, "expected at least one layer of a head, got none")
    head = Head(specs, report, context, declared if given is None else given, given is not None)
    if report.problems:
        count = len(report.problems) + report.more
        hint = ""
        if given is None and any(
            "is not part of a NormFace head" in sentence for _, sentence in report.problems
        ):
            names = ", ".join(map(repr, entries or ("ip1", "label")))
            hint = (
                f"\nTo load the head of a whole net, name the blobs it starts from, such as inputs=({names})."
            )
        are = "things that are" if count > 1 else "thing that is"
        opening = f"load_head: {where} has {count} {are} not supported:"
        raise ValueError(listing(opening, report.lines(report.problems), report.more, hint))
    return head


def _read(path_or_text: str | os.PathLike[str]) -> tuple[str, str]:
    if isinstance(path_or_text, str) and ("\n" in path_or_text or "{" in path_or_text):
        return "<text>", path_or_text
    if not isinstance(path_or_text, (str, os.PathLike)):
        raise TypeError(f"load_head: expected a path or text, got {type(path_or_text).__name__}")
    where = file_name(path_or_text)
    data = read_bytes(path_or_text, LONGEST_TEXT, "a prototxt")
    # Comments in other encodings are read over, as Caffe does; elsewhere their bytes are refused.
    return where, data.decode("utf-8", errors="surrogateescape")
