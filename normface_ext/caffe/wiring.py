"""The net of one phase: every value numbered, and chains of layers fused where nothing reads between."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from .agents import Agents, InnerDistance, InnerProduct
from .layer import Layer
from .layers import Normalize
from .losses import DistanceLoss, SoftmaxWithLoss
from .margins import TargetMargin
from .scale import Scale
from .spec import Report, Spec
from .sphere import MarginInnerProduct


@dataclass
class Step:
    """One call in a phase: which layer, on which values, into which. Several layers where they are fused."""

    layers: tuple[str, ...]
    inputs: list[int]
    outputs: list[int]
    detached: tuple[int, ...] = ()  # positions in `inputs` whose gradient the file stops


@dataclass
class Weighted:
    value: int
    weight: float
    statistic: bool


@dataclass
class Plan:
    """A phase of the net with every value numbered, so that an in-place layer makes a new one."""

    steps: list[Step] = field(default_factory=list)
    inputs: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)
    weighted: list[Weighted] = field(default_factory=list)
    size: int = 0

    def new(self) -> int:
        self.size += 1
        return self.size - 1

    def uses(self, value: int) -> int:
        counted = sum(step.inputs.count(value) for step in self.steps)
        return counted + (value in self.outputs.values()) + any(w.value == value for w in self.weighted)

    def producer(self, value: int) -> Step | None:
        return next((step for step in self.steps if value in step.outputs), None)


def wire(
    phase: str,
    layers: list[tuple[str, Spec, tuple[str, ...]]],
    modules: nn.ModuleDict,
    made_here: set[str],
    declared: list[str],
    closed: bool,
    report: Report,
) -> Plan:
    """Numbers every value of a phase. A bottom that no layer makes is an input of the
    head, unless the inputs are given (closed)."""
    plan, current = Plan(), {}
    for key, spec, phases in layers:
        if phase not in phases:
            continue
        numbers = []
        for i, bottom in enumerate(spec.bottoms):
            if bottom not in current:
                if bottom not in declared and (closed or bottom in made_here):
                    spec.refuse(
                        f"no layer before it in the phase {phase} makes the bottom `{bottom}`", "bottom", i
                    )
                current[bottom] = plan.inputs[bottom] = plan.new()
            numbers.append(current[bottom])
        outputs = []
        for i, top in enumerate(spec.tops):
            if top in current and top not in spec.bottoms:
                spec.refuse(f"the top `{top}` exists already in the phase {phase}", "top", i)
            current[top] = plan.new()
            outputs.append(current[top])
        detached = tuple(i for i, flag in enumerate(spec.message.propagate_down) if not flag)
        plan.steps.append(Step((key,), numbers, outputs, detached))
        layer = modules[key]
        assert isinstance(layer, Layer)
        weights = list(spec.message.loss_weight) or [layer.LOSS] + [0.0] * (len(spec.tops) - 1)
        for i, (number, weight) in enumerate(zip(outputs, weights, strict=False)):
            if weight:
                plan.weighted.append(Weighted(number, float(weight), i in layer.STATISTICS))
    consumed = {number for step in plan.steps for number in step.inputs}
    made = {number for step in plan.steps for number in step.outputs}
    plan.outputs = {name: number for name, number in current.items() if number in made - consumed}
    return plan


def fuse(plan: Plan, layers: nn.ModuleDict) -> list[tuple[str, ...]]:
    """Replaces every chain from Normalize to a loss by one step, where nothing else reads what is between,
    and drops what then has no reader. Returns the chains."""
    chains = []
    for last in list(plan.steps):
        chain = _chain(plan, layers, last)
        if chain is None:
            continue
        fused, normalizers = chain
        plan.steps[plan.steps.index(last)] = fused
        plan.steps = [s for s in plan.steps if s is fused or s.layers[0] not in fused.layers]
        chains.append((*normalizers, *fused.layers))
    unused = plan.steps if chains else []
    while unused:
        unused = [s for s in plan.steps if not any(plan.uses(number) for number in s.outputs)]
        plan.steps = [s for s in plan.steps if s not in unused]
    return chains


def _chain(plan: Plan, layers: nn.ModuleDict, last: Step) -> tuple[Step, tuple[str, ...]] | None:
    """(the fused step, its Normalize layers) of a loss: Normalize + InnerProduct [+ a margin, + Scale, in any
    order] + SoftmaxWithLoss, or MarginInnerProduct + SoftmaxWithLoss, or Normalize + InnerDistance (L2) + a
    metric loss."""
    loss = layers[last.layers[0]]
    softmax = isinstance(loss, SoftmaxWithLoss) and not loss.return_probability
    if not (softmax or isinstance(loss, DistanceLoss)) or last.detached:
        return None
    names, labels = [last.layers[0]], last.inputs[1]
    step = _only_for(plan, last.inputs[0])
    between: list[type] = []
    while softmax and step is not None:
        kind = _between(plan, layers, step, labels, between)
        if kind is None:
            break
        between.insert(0, kind)
        names.insert(0, step.layers[0])
        step = _only_for(plan, step.inputs[0])
    if step is None:
        return None
    names.insert(0, step.layers[0])
    agents = layers[step.layers[0]]
    if isinstance(agents, MarginInnerProduct):
        others = {number for other in plan.steps for number in other.inputs}
        read = others & set(step.outputs[1:])
        if read or not (softmax and agents.normalize and not between and step.inputs[1] == labels):
            return None
        outputs = [*last.outputs, *step.outputs[1:]]
        return Step(tuple(names), [step.inputs[0], labels], outputs), ()
    if softmax:
        fits = isinstance(agents, InnerProduct) and not agents.has_bias
    else:
        fits = isinstance(agents, InnerDistance) and agents.p == 2
    if not fits or not isinstance(agents, Agents) or (agents.own and not agents.normalize):
        return None
    found = [_normalized(plan, layers, number, agents.eps) for number in step.inputs]
    sources = [source for source in found if source is not None]
    if len(sources) < len(found):
        return None
    fused = Step(tuple(names), [number for number, _ in sources] + [labels], list(last.outputs))
    return fused, tuple(name for _, name in sources)


def _between(
    plan: Plan, layers: nn.ModuleDict, step: Step, labels: int, after: list[type]
) -> type[Scale | TargetMargin] | None:
    """Which of the two a step between the product and the softmax is, if it is one that can be fused; `after`
    are those between it and the softmax."""
    layer = layers[step.layers[0]]
    if isinstance(layer, Scale):
        if Scale in after or not (layer.own and layer.one_number and not layer.has_bias):
            return None
        # A margin behind a scale is divided by it.
        return None if after and not (layer.fixed or layer.min_value > 0) else Scale
    if isinstance(layer, TargetMargin) and TargetMargin not in after and step.inputs[1] == labels:
        source = plan.producer(step.inputs[0])
        scaled = source is not None and isinstance(layers[source.layers[0]], Scale)
        return TargetMargin if layer.fuses(scaled) else None
    return None


def _only_for(plan: Plan, value: int) -> Step | None:
    """The step that makes a value, if the value has one reader and its gradient flows on."""
    step = plan.producer(value)
    return step if step is not None and plan.uses(value) == 1 and not step.detached else None


def _normalized(plan: Plan, layers: nn.ModuleDict, number: int, eps: float) -> tuple[int, str] | None:
    """(what a value is the L2-normalised form of, the layer that normalises it)."""
    step = plan.producer(number)
    layer = None if step is None else layers[step.layers[0]]
    if step is None or not isinstance(layer, Normalize) or step.detached or step.outputs[0] != number:
        return None
    return (step.inputs[0], step.layers[0]) if layer.p == 2 and layer.eps == eps else None
