"""Recognition of MoD blocks written in plain PyTorch, by what they are made of and then by what they compute.

:func:`readings` asks, from layer shapes alone, whether a module could be an MoD block: two linear layers or 1x1
convolutions C -> R -> C, and beside them the convolutions of one known kind at k < C channels. Only such modules
are run (:mod:`mod_kernels._probe`): once to see the order of their layers, and then, with random weights, against
the reference of every form that the shapes allow. What agrees to float64's precision is fused as that form,
anything else is left alone with a reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import _probe
from ._attributes import Names
from ._library import accumulation_dtype
from .foreign import described
from .nn._folding import fold_batch_norm, fold_layer_norm
from .spec import CONV_KINDS, POSITIONS, MoDSpec

# A selector and the longest kind's convolutions; the shortest kind has one.
_MOST_LAYERS = 2 + max(len(kind.between) + 1 for kind in CONV_KINDS.values())
_FEWEST_LAYERS = 3
_FOLDED = (nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm)
_DROPOUTS = ("dropout", "droppath", "stochasticdepth")


class Reading(NamedTuple):
    """What the layers of a module could be, by their shapes: names of modules in it."""

    fc1: str
    fc2: str
    kind: str
    channels: int
    k: int


class Refused(NamedTuple):
    """Why a module is left alone; ``chooses``: not because it chooses no channels, as every MoD block does."""

    reason: str
    chooses: bool = True


@dataclass(frozen=True)
class Plan:
    """How to make the spec of a block: which of its modules and parameters, by name, are what.

    ``norms``: of each convolution, the batch norm after it, or None. ``layer_norm`` and ``gamma``: of a ConvNeXt
    block (the latter its layer scale), else None.
    """

    fc1: str
    fc2: str
    kind: str
    k: int
    convs: tuple[str, ...]
    norms: tuple[str | None, ...]
    layer_norm: str | None
    gamma: str | None
    position: str
    final_relu: bool
    # What forward keeps for others, in which the fused block need not be as it was compared.
    written: Names = frozenset()

    def spec(self, block: nn.Module) -> MoDSpec:
        """The spec of ``block`` with its weights as they are now, detached."""
        fc1, fc2 = block.get_submodule(self.fc1), block.get_submodule(self.fc2)
        weights, biases = [], []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            layer = block.get_submodule(conv)
            folded = _as_conv(layer) if norm is None else fold_batch_norm(layer, block.get_submodule(norm))
            weights.append(folded[0])
            biases.append(folded[1])
        if self.layer_norm is not None:
            norm = block.get_submodule(self.layer_norm)
            weights[1], biases[1] = fold_layer_norm(weights[1], biases[1], norm)
        if self.gamma is not None:
            owner, _, name = self.gamma.rpartition(".")
            gamma = getattr(block.get_submodule(owner), name).detach().flatten().to(weights[-1].dtype)
            weights[-1], biases[-1] = weights[-1] * gamma[:, None, None, None], biases[-1] * gamma
        return MoDSpec(
            fc1.weight.detach().flatten(1),
            fc2.weight.detach().flatten(1),
            self.k,
            self.kind,
            tuple(weights),
            tuple(biases),
            None if fc1.bias is None else fc1.bias.detach(),
            None if fc2.bias is None else fc2.bias.detach(),
            self.position,
            self.final_relu,
        )


def _as_conv(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight (OIHW) and bias (O,) of a convolution or of a linear layer over the channels."""
    weight = layer.weight.detach().to(accumulation_dtype(layer.weight.dtype))
    weight = weight[:, :, None, None] if weight.ndim == 2 else weight
    bias = weight.new_zeros(weight.shape[0]) if layer.bias is None else layer.bias.detach().to(weight.dtype)
    return weight, bias


# ---- by shapes


def readings(module: nn.Module) -> list[Reading]:
    """Every way in which the layers of ``module`` could be an MoD block's; none for nearly every module."""
    shapes, norms = {}, []
    for name, part in module.named_modules():
        shape = _weight_shape(part)
        if shape is not None:
            shapes[name] = shape
            if len(shapes) > _MOST_LAYERS:
                return []
        elif getattr(part, "running_mean", None) is not None:
            norms.append(len(part.running_mean))
    if len(shapes) < _FEWEST_LAYERS:
        return []
    return list(_readings(shapes, Counter(norms)))


def _readings(shapes: dict[str, tuple[int, ...]], norms: Counter) -> Iterator[Reading]:
    for fc1, fc2 in permutations(shapes, 2):
        hidden, channels = shapes[fc1][:2]
        if (
            shapes[fc1] != (hidden, channels, 1, 1)
            or shapes[fc2] != (channels, hidden, 1, 1)
            or hidden >= channels
        ):
            continue
        convs = [shape for name, shape in shapes.items() if name not in (fc1, fc2)]
        # A host's own bottleneck is such a pair around a 3x3 as well: its norms tell it from a selector.
        if norms - Counter(shape[0] for shape in convs):
            continue
        for kind, table in CONV_KINDS.items():
            if len(convs) != len(table.between) + 1:
                continue
            widths = {size for shape in convs for size in shape[:2]}
            fits = (
                k
                for k in widths
                for mid in widths
                if k < channels and sorted(table.shapes(mid, k)) == sorted(convs)
            )
            yield from (Reading(fc1, fc2, kind, channels, k) for k in dict.fromkeys(fits))


def _weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    """OIHW of a linear layer or a 2d convolution, by its attributes: quantised ones have them too."""
    if isinstance(module, torch.jit.ScriptModule):  # a traced one has no other attributes
        weight = getattr(module, "weight", None)
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else ()
        return {2: (*shape, 1, 1), 4: shape}.get(len(shape))
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.out_features, module.in_features, 1, 1
    kernel = getattr(module, "kernel_size", None)
    if isinstance(kernel, tuple) and len(kernel) == 2 and hasattr(module, "groups"):
        return module.out_channels, module.in_channels // module.groups, *kernel
    return None


# ---- by its parts


def why_not_read(module: nn.Module) -> str:
    """Why a module of the right shapes can't be read as plain layers; ``""`` if it can."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted: accelerate the model it was scripted from"
    for name, part in module.named_modules():
        kind = type(part)
        if isinstance(part, torch.jit.ScriptModule):
            return f"{name} is scripted"
        if "quantized" in kind.__module__:
            return f"{name} is quantised ({kind.__module__}.{kind.__name__})"
        if not part._modules and any(word in kind.__name__.lower() for word in _DROPOUTS):
            return f"it has dropout inside: {name} is a {kind.__name__}"
        is_layer = _weight_shape(part) is not None or getattr(part, "running_mean", None) is not None
        if is_layer and kind not in _FOLDED:
            return f"{name} is a {kind.__name__}, none of {', '.join(one.__name__ for one in _FOLDED)}"
        if isinstance(part, nn.BatchNorm2d | nn.SyncBatchNorm) and part.running_mean is None:
            return f"{name} keeps no running statistics"
        if not all(tensor.is_floating_point() for tensor in part.parameters(recurse=False)):
            return f"{name} has parameters that are not floating-point"
    return ""


# ---- by what it computes


def recognise(module: nn.Module, found: list[Reading]) -> Plan | Refused:
    """The plan that reproduces ``module``, of the forms that ``found`` (its readings) allows; or why none does."""
    reason = why_not_read(module)
    if reason:
        return Refused(reason)
    reasons, chooses = [], False
    try:
        probe = _probe.Probe(module)
        for channels in dict.fromkeys(reading.channels for reading in found):
            seen = probe.watch(channels)
            if not seen.selects:
                reasons.append("its forward chooses no channels (no top-k or sort in it)")
                continue
            chooses = True
            if seen.unsorted:
                reasons.append("its top-k has sorted=False: the order of the channels is not defined")
                continue
            plan = _agreeing(probe, module, [one for one in found if one.channels == channels], seen.order)
            if isinstance(plan, Plan):
                return replace(plan, written=probe.written())
            reasons.append(plan)
    except _probe.NotRun as error:
        return Refused(str(error))
    return Refused("; ".join(dict.fromkeys(reasons)), chooses)


def why_not_as_described(module: nn.Module) -> Refused | None:
    """Why a module of a registered class is not what its description says; None if it is."""
    try:
        worst = _probe.Probe(module).differences([described])[0]
    except (_probe.NotRun, TypeError, ValueError) as error:
        return Refused(str(error))
    if worst <= _probe.AGREEMENT:
        return None
    return Refused(f"its registered description is not what it computes: {_by(worst)}")


def _agreeing(probe: _probe.Probe, module: nn.Module, found: list[Reading], order: list[str]) -> Plan | str:
    plans, reasons = [], []
    for reading in found:
        plan = _plan(module, reading, order)
        if isinstance(plan, str):
            reasons.append(plan)
        else:
            plans += [
                replace(plan, position=position, final_relu=final_relu)
                for position in POSITIONS
                for final_relu in (False, True)
            ]
    if not plans:
        return "; ".join(dict.fromkeys(reasons))
    differences = probe.differences([plan.spec for plan in plans])
    least = min(differences)
    if least <= _probe.AGREEMENT:
        return plans[differences.index(least)]
    kinds = ", ".join(dict.fromkeys(plan.kind for plan in plans))
    return f"it computes something else than an MoD block ({kinds}): {_by(least)}"


def _by(difference: float) -> str:
    return f"on random inputs the branch differs by {difference:.1e} of its norm"


def _plan(module: nn.Module, reading: Reading, order: list[str]) -> Plan | str:
    """The layers of a reading in the order they ran, each with its norm; or what does not fit."""
    parts = dict(module.named_modules())
    shapes = {name: _weight_shape(parts[name]) for name in order}
    convs: list[str] = []
    norms: list[str | None] = []
    others = []
    for name in order:
        if shapes[name] is not None:
            if name not in (reading.fc1, reading.fc2):
                convs.append(name)
                norms.append(None)
        elif getattr(parts[name], "running_mean", None) is None:
            others.append(name)
        elif not convs or norms[-1] is not None or not isinstance(parts[convs[-1]], nn.Conv2d):
            return f"{name} does not come after a convolution"
        else:
            norms[-1] = name
    table = CONV_KINDS[reading.kind]
    wanted = table.shapes(shapes[convs[min(table.mid_weight, len(convs) - 1)]][0], reading.k) if convs else []
    if [shapes[name] for name in convs] != wanted:
        return f"its convolutions do not run in the order of a {reading.kind!r}"
    if len(others) != table.between.count("layer_norm"):
        names = ", ".join(dict.fromkeys(others)) or "nothing"
        return f"beside convolutions and batch norms it has {names}: no {reading.kind!r}"
    for name in others:
        if type(parts[name]) is not nn.LayerNorm:
            return f"{name} is a {type(parts[name]).__name__}, not the LayerNorm of a {reading.kind!r}"
    gammas = _other_parameters(module, {reading.fc1, reading.fc2, *order})
    if len(gammas) > 1 or any(module.get_parameter(name).numel() != reading.k for name in gammas):
        return f"it has parameters that no MoD block has: {', '.join(gammas)}"
    gamma = gammas[0] if gammas else None
    layer_norm = others[0] if others else None
    found = reading.fc1, reading.fc2, reading.kind, reading.k, tuple(convs), tuple(norms), layer_norm, gamma
    return Plan(*found, position="first", final_relu=False)


def _other_parameters(module: nn.Module, known: set[str]) -> list[str]:
    """Names of the parameters that lie in none of the modules ``known``."""
    return [name for name, _ in module.named_parameters() if name.rpartition(".")[0] not in known]
