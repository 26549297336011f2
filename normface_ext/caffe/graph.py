"""`Head`: the head part of a prototxt as a module that wires Caffe's layers by blob names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..engine.files import quoted
from ..optim import is_scale
from .build import MOST_LAYERS, PHASES, Layers, build, create_blobs, phases
from .fused import fused_tops
from .kinds import kind_of, refuse_unknown
from .layer import Layer
from .scale import Scale
from .sharing import share
from .spec import Context, Report, Spec
from .weights import stored_weights
from .wiring import fuse, wire


class HeadOutput(NamedTuple):
    """What a head returns.

    loss: the sum of loss_weight * top over the tops that have a gradient, or None without a loss layer.
    tops: the blobs that no layer consumes, by name, such as each loss before its weight.
    printed_loss: the sum over every top with a loss_weight, statistics too: what Caffe prints. No gradient.
    """

    loss: Tensor | None
    tops: dict[str, Tensor]
    printed_loss: Tensor | None


class Head(nn.Module):
    """What :func:`load_head` returns.

    ``head(last_ip_layer=x, label=y)`` or ``head({"last_ip_layer": x, "label": y})`` runs the layers of the
    present phase, TRAIN in training mode and TEST in eval mode, and returns a :class:`HeadOutput`.
    ``head.layers["cosine_layer"]`` is a layer by its name in the file; in the state dict a name that torch
    does not allow ("fc.1", "training") is another one ("fc_1", "training_"). In mode "math", Normalize +
    InnerProduct + Scale + SoftmaxWithLoss run as one fused NormFaceLoss, with a margin layer among them or
    with MarginInnerProduct for the first three, too, and Normalize + InnerDistance +
    a metric loss as one fused CContrastiveLoss or CTripletLoss, in every phase where nothing else reads
    what lies between; ``print(head)`` shows where.

    Attributes:
        notes: "file:line: ..." of everything in the file that has no effect here, or another than it seems.
    """

    def __init__(
        self, specs: list[Spec], report: Report, context: Context, declared: list[str], closed: bool
    ) -> None:
        super().__init__()
        self.where: str = report.where
        self.mode: str = context.mode
        self.layers: Layers = Layers()
        self._multipliers: dict[str, list[tuple[float, float]]] = {}
        self._labels: dict[str, str] = {}
        usable: list[tuple[str, Spec, tuple[str, ...]]] = []
        if len(specs) > MOST_LAYERS:
            report.refuse(1, f"expected at most {MOST_LAYERS} layers of a head, got {len(specs)}")
            specs = []
        unknown = [spec for spec in specs if kind_of(spec) is None]
        refuse_unknown(unknown, report)
        taken = {blob for spec in specs for blob in (*spec.bottoms, *spec.tops)}
        widths: dict[str, int | None] = {}
        for spec in specs:
            kind = kind_of(spec)
            if kind is None:
                continue
            key, active = spec.name, phases(spec)
            others = [set(theirs) for _, other, theirs in usable if other.name == spec.name]
            if others:  # layers of one name, in one phase each
                key = f"{spec.name} ({' '.join(active)})"
            if not spec.name or key in self.layers or any(theirs & set(active) for theirs in others):
                spec.refuse(f"expected a name of its own, got {quoted(spec.name)}", "name")
                continue
            if not spec.tops and kind.LOSS:  # Caffe makes a top that no layer reads, "(automatic)"
                spec.tops.append(spec.name + " (automatic)" * (spec.name in taken))
            spec.width = widths.get(spec.bottoms[0]) if spec.bottoms else None
            layer, self._multipliers[key] = build(kind, spec, context)
            for top in spec.tops:
                widths[top] = layer.width(spec.width) if top == spec.tops[0] else None
            self.layers[key] = layer
            self._labels[key] = f"{spec} ({spec.at('')})"
            usable.append((key, spec, active))
        share([(name, self.layers[name], spec) for name, spec, _ in usable], self._multipliers)
        made_here = {top for spec in specs for top in spec.tops if top not in spec.bottoms}
        declared = [*declared, *(top for spec in unknown for top in spec.tops)]
        self._plans = {p: wire(p, usable, self.layers, made_here, declared, closed, report) for p in PHASES}
        self._fused: dict[str, list[tuple[str, ...]]] = {phase: [] for phase in PHASES}
        if not report.problems and self.mode == "math":
            for phase, plan in self._plans.items():
                self._fused[phase] = fuse(plan, self.layers)
        if self.mode == "caffe":
            for name, spec, _ in usable:
                if getattr(self.layers[name], "normalize", False):
                    spec.note(
                        "Caffe's forward pass overwrites the weight by its unit rows; here"
                        " `normface_ext.caffe.renormalize_after_step` does so after each step"
                    )
        self.notes: tuple[str, ...] = tuple(dict.fromkeys(report.lines(report.notes)))
        if not report.problems:
            create_blobs([(self.layers[name], spec) for name, spec, _ in usable], context, report)

    @property
    def phase(self) -> str:
        return "TRAIN" if self.training else "TEST"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The blobs that forward needs in the present phase."""
        return tuple(self._plans[self.phase].inputs)

    def forward(self, blobs: Mapping[str, Tensor] | None = None, /, **named: Tensor) -> HeadOutput:
        given = {**(blobs or {}), **named}
        plan = self._plans[self.phase]
        missing = [name for name in plan.inputs if name not in given]
        if missing:
            raise ValueError(
                f"load_head({self.where}): expected the blobs {', '.join(plan.inputs)} in the phase"
                f" {self.phase}, got no {', '.join(missing)}"
            )
        unknown = [name for name in given if not any(name in p.inputs for p in self._plans.values())]
        if unknown:
            raise ValueError(f"load_head({self.where}): no layer reads {', '.join(unknown)} from outside")
        values: dict[int, Tensor] = {number: given[name] for name, number in plan.inputs.items()}
        for name, number in plan.inputs.items():
            if not isinstance(values[number], Tensor):
                raise TypeError(
                    f"load_head({self.where}): expected `{name}` to be a Tensor,"
                    f" got {type(values[number]).__name__}"
                )
        for step in plan.steps:
            bottoms = [values[number] for number in step.inputs]
            for position in step.detached:
                bottoms[position] = bottoms[position].detach()
            try:
                tops = (
                    fused_tops([self.layers[key] for key in step.layers], bottoms)
                    if len(step.layers) > 1
                    else self.layers[step.layers[0]](*bottoms)
                )
            except (ValueError, TypeError, IndexError) as error:
                raise type(error)(f"{self._labels[step.layers[-1]]}: {error}") from error
            values.update(zip(step.outputs, tops, strict=True))
        weighted = [(w, (w.weight * values[w.value]).sum()) for w in plan.weighted]
        objective = [term for w, term in weighted if not w.statistic]
        return HeadOutput(
            torch.stack(objective).sum() if len(objective) > 1 else objective[0] if objective else None,
            {name: values[number] for name, number in plan.outputs.items()},
            torch.stack([term.detach() for _, term in weighted]).sum() if weighted else None,
        )

    def renormalize_(self) -> list[str]:
        """What Caffe overwrites in its forward pass: the weights of the layers with ``normalize: true`` by
        their unit rows, and the blob of a Scale layer by what its bounds leave of it.

        Returns:
            The names of the layers with ``normalize: true``.

        Raises:
            ValueError: NaN or infinity in a weight; that weight is not changed.
        """
        for layer in self.layers.values():
            if isinstance(layer, Scale):
                layer.clamp_()
        chosen = [name for name, layer in self.layers.items() if getattr(layer, "normalize", False)]
        for name in chosen:
            self.layers[name].renormalize_()
        return chosen

    def parameter_groups(
        self, lr: float, weight_decay: float, *, decay_scale: bool = True
    ) -> list[dict[str, Any]]:
        """Optimizer groups with the file's multipliers: lr * lr_mult and weight_decay * decay_mult.

        Parameters with ``lr_mult: 0`` are fixed and left out.

        Args:
            decay_scale: ``False`` takes the learned scales out of the weight decay, which Caffe's default
                ``decay_mult: 1`` applies to them.

        Raises:
            ValueError: a weight whose number of features is not known yet.
        """
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        seen: set[int] = set()  # a shared parameter counts once
        for key, multipliers in self._multipliers.items():
            layer = self.layers[key]
            assert isinstance(layer, Layer)
            for name, blob, (lr_mult, decay_mult) in zip(
                layer.BLOBS, layer.blobs(), multipliers, strict=True
            ):
                if blob is None:
                    raise ValueError(
                        f"{self._labels[key]}: the weight has no shape yet: give `in_features` to load_head,"
                        " load_caffemodel, or run forward, before making an optimizer"
                    )
                if lr_mult and id(blob) not in seen:
                    seen.add(id(blob))
                    decayed = decay_mult if decay_scale or not is_scale(name, blob) else 0.0
                    groups.setdefault((lr_mult, decayed), []).append(blob)
        return [
            {"params": blobs, "lr": lr * lr_mult, "weight_decay": weight_decay * decay_mult}
            for (lr_mult, decay_mult), blobs in groups.items()
        ]

    @torch.no_grad()
    def load_caffemodel(self, path: str | os.PathLike[str] | bytes, *, strict: bool = True) -> list[str]:
        """Copies the weights of the layers that the file has by the same name; returns those names.

        All or nothing: a file with one wrong blob changes nothing.

        Args:
            path: a .caffemodel (binary NetParameter), or its bytes. Its other layers are skipped.
            strict: the file must have every layer of the head that has parameters.

        Raises:
            ValueError: no such file format, missing layers or two of one name, a wrong shape or count of
                blobs, NaN or infinity (also of a number that only the parameter's dtype can't hold).
            OSError: the file can't be read.
        """
        copies = stored_weights(path, self.layers, self._labels, strict)
        for layer, blob, value in copies:
            self.layers[layer].place(blob, value)
        return list(dict.fromkeys(layer for layer, _, _ in copies))

    def extra_repr(self) -> str:
        lines = [f"{self.where}, mode={self.mode!r}"]
        for phase, plan in self._plans.items():
            lines.append(f"{phase}: {', '.join(plan.inputs)} -> {', '.join(plan.outputs)}")
            for chain in self._fused[phase]:
                kind = self.layers[chain[-1]].FUSED
                lines.append(f"{phase}: fused into {kind}: {' + '.join(chain)}")
        return "\n".join(lines)
