"""Foreign MoD blocks, written by their users in plain PyTorch: how they are told of, and how they run fused.

A block is fused by giving the module another class: a generated subclass of its own, whose ``forward`` runs the
fused op where that may be and the block's own ``forward`` everywhere else. Not by a ``forward`` of the instance:
that one would be copied, with its reference to the old module, into shallow copies and DataParallel replicas, is
passed over by ``super()``, and is what tools take as a sign of a patched module. With a class, ``isinstance``,
``state_dict``, hooks, ``repr``, ``torch.compile`` and ``super().forward`` are what they were; copies and pickles
carry the original class's name and are given the generated one again when they are made. ``type(block) is ...``
no longer holds, and ``torch.jit.script`` can't read the generated class (``torch.jit.trace`` works).
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import _autograd, functional
from ._attributes import Settings, are_as_set, attributes_of, constants_of, settings_of
from ._layout import OTHER, layout_of
from ._tracing import exporting
from .nn._spec_cache import SpecCache, Watched
from .nn.mod_block import MoDBlock
from .spec import MoDSpec

if TYPE_CHECKING:
    from .recognise import Plan

Describe = Callable[[nn.Module], MoDSpec]

_DESCRIBED: dict[type[nn.Module], Describe] = {}
_STATE = "_mod_kernels_state"


def register_mod_block(cls: type[nn.Module], describe: Describe) -> None:
    """Tell :func:`mod_kernels.accelerate` of an MoD block written in plain PyTorch.

    Modules of exactly this class (a subclass may compute something else) then run as one fused op in eval mode
    where no gradient is needed. ``accelerate`` compares ``describe``'s answer with the module's own forward first.

    Args:
        cls: a subclass of nn.Module whose ``forward(x)`` takes and gives (N, C, H, W).
        describe: from such a module to the :class:`mod_kernels.MoDSpec` of what it computes in eval mode, BN
            folded (:func:`mod_kernels.nn.fold_batch_norm`). Called again whenever a parameter, buffer or plain
            attribute of the module or of one of its submodules has changed, and traced under ``torch.compile``;
            it must read nothing else.

    A second registration of a class replaces the first. An unpickled block of a class that is not registered
    in its process runs as it is written.

    Raises:
        TypeError: cls is not a subclass of nn.Module or describe not callable.
        ValueError: cls is a MoDBlock, which accelerate knows.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls must be a subclass of nn.Module, got {cls!r}")
    if not callable(describe):
        raise TypeError(f"describe must be a function from a module to a MoDSpec, got {describe!r}")
    if issubclass(cls, MoDBlock):
        raise ValueError(f"cls must not be a MoDBlock, which accelerate knows, got {cls.__name__}")
    _DESCRIBED[cls] = describe


def is_registered(module: nn.Module) -> bool:
    """Whether a description of exactly its class (before it was fused) was registered."""
    return original_class(module) in _DESCRIBED


def described(module: nn.Module) -> MoDSpec:
    """The registered description of ``module``.

    Raises:
        TypeError: it is no MoDSpec; and whatever the function raises.
    """
    spec = _DESCRIBED[original_class(module)](module)
    if not isinstance(spec, MoDSpec):
        raise TypeError(f"describe must return a MoDSpec, got {type(spec).__name__}")
    return spec


@dataclass
class _State:
    """What a fused module carries."""

    plan: Plan | None  # how a recognised block is read; None: by what is registered for its class
    overwrite_input: bool
    cache: SpecCache = field(default_factory=SpecCache)
    # Of a recognised block, when it was recognised: all else that it computes by.
    settings: tuple[Settings, ...] = ()
    constants: dict[tuple[str, str], Tensor] | None = None


class FusedForeign(nn.Module):
    """Comes before the block's own class in the generated one (a Module only to be laid out like one)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())  # whatever the block's own forward calls its x
        spec = _spec_for(self, given[0]) if len(given) == 1 else None
        if spec is None:
            return super().forward(*args, **kwargs)
        x = given[0]
        if self._mod_kernels_state.overwrite_input and layout_of(x) != OTHER:
            return functional.mod_block_(x, spec)
        return functional.mod_block(x, spec)

    # The cache checks itself at each call; these let go of memory at once, and answer writes it can't see.

    def train(self, mode: bool = True) -> nn.Module:
        _drop_folded(self)
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        _drop_folded(self)
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        _drop_folded(self)
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return f"{text}, accelerated" if text else "accelerated"

    def __reduce_ex__(self, protocol: int) -> tuple:
        function, arguments, *rest = super().__reduce_ex__(protocol)
        generated, original = type(self), original_class(self)
        arguments = tuple(original if argument is generated else argument for argument in arguments)
        return _rebuilt, (function, *arguments), *rest


def _rebuilt(function: Callable, *arguments: Any) -> nn.Module:
    module = function(*arguments)
    module.__class__ = fused_class(type(module))
    return module


def _drop_folded(module: nn.Module) -> None:
    if _STATE in vars(module):
        module._mod_kernels_state.cache.clear()


@functools.cache
def fused_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``cls`` that runs fused, under the same name; raises what making a subclass raises."""

    @functools.wraps(cls.forward, updated=())  # for its signature, by which exports name their inputs
    def forward(self: FusedForeign, *args: Any, **kwargs: Any) -> Any:
        return FusedForeign.forward(self, *args, **kwargs)

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "_mod_kernels_original": cls}
    names["forward"] = forward
    return types.new_class(cls.__name__, (FusedForeign, cls), exec_body=lambda body: body.update(names))


def why_not_subclassed(module: nn.Module) -> str:
    """Why there is no :func:`fused_class` for it; ``""`` if there is."""
    try:
        fused_class(original_class(module))
    except Exception as error:  # a metaclass or an __init_subclass__ may raise whatever it likes
        return f"its class can't be subclassed: {type(error).__name__}: {error}"
    return ""


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that ``module`` had before it was fused; its class, if it was not."""
    return module._mod_kernels_original if isinstance(module, FusedForeign) else type(module)


def fuse(module: nn.Module, plan: Plan | None, overwrite_input: bool) -> None:
    """Let ``module`` run fused: as ``plan`` reads it or, without one, as its class is registered."""
    before = vars(module).get(_STATE)
    overwrite_input = overwrite_input or (before is not None and before.overwrite_input)
    state = _State(plan, overwrite_input)
    if plan is not None:
        _note(module, state)
    vars(module)[_STATE] = state
    if not isinstance(module, FusedForeign):
        module.__class__ = fused_class(type(module))


def _is_as_recognised(module: nn.Module, state: _State) -> bool:
    """Whether a block still is what was compared with its plan."""
    if torch.compiler.is_compiling():
        # A graph can't depend on what is in a tensor.
        return not state.constants and are_as_set(module, state.settings)
    written = state.plan.written
    if state.constants is None:  # saved by a version that kept none
        _note(module, state)
    now = constants_of(module, written)
    if now.keys() != state.constants.keys():
        return False
    for key, before in state.constants.items():
        one = now[key]
        if one.dtype != before.dtype or one.shape != before.shape or not torch.equal(one, before.to(one.device)):
            return False
    try:
        return settings_of(module, written) == state.settings
    except (RuntimeError, ValueError):  # tensors and arrays in lists have no one answer: they were not there
        return False


def _note(module: nn.Module, state: _State) -> None:
    """Keep what a recognised block is beside its weights."""
    state.settings = settings_of(module, state.plan.written)
    constants = constants_of(module, state.plan.written)
    state.constants = {key: one.detach().clone() for key, one in constants.items()}


def _spec_for(module: nn.Module, x: Tensor) -> MoDSpec | None:
    """The folded spec if this call may run as one op."""
    if getattr(module, _STATE, None) is None:  # made by its class anew, not by accelerate
        return None
    if module.training or exporting() or torch.jit.is_tracing() or type(x) not in (Tensor, nn.Parameter):
        return None
    if torch.is_grad_enabled() and _autograd.needed(x, *module.parameters()):
        return None
    if torch.compiler.is_compiling():
        # Versions and addresses can't be traced: the fold is part of the graph, so it is never stale.
        spec = _fold(module)
    elif forward_ad._current_level >= 0:  # a fold has no tangents
        return None
    else:
        spec = module._mod_kernels_state.cache.get(module, _fold, _watched)
    # Whatever else it is given is between the block and its caller.
    if spec is None or x.ndim != 4 or x.shape[1] != spec.channels or not spec.dtypes <= {x.dtype, torch.float32}:
        return None
    return spec


def _fold(module: nn.Module) -> MoDSpec | None:
    """The block as it is now, or None where it has to run as it is written.

    So while a part has a hook or a forward of its own (fusing would skip it), a part is in training mode, or a
    recognised block is no longer what was compared with its plan.
    """
    for part in module.modules():
        if part.training:
            return None
        if part is not module and (part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part)):
            return None
    state = module._mod_kernels_state
    if state.plan is None:
        return described(module) if is_registered(module) else None
    return state.plan.spec(module) if _is_as_recognised(module, state) else None


def _watched(module: nn.Module) -> Watched:
    """All tensors and attributes of the block and its parts, and how many; the hooks of its parts.

    Not those that its own forward writes: it may do so while it is not fused.
    """
    plan = module._mod_kernels_state.plan
    written = frozenset() if plan is None else plan.written
    tensors, attributes = [], []
    for path, part in module.named_modules():
        for table in (part._parameters, part._buffers, vars(part)):
            held = [name for name, one in table.items() if table is not vars(part) or isinstance(one, Tensor)]
            tensors += [(table, name) for name in held if (path, name) not in written]
        attributes += [(vars(part), name) for name, _ in attributes_of(part, path, written)]
        attributes += [(vars(part), "training"), (vars(part), "forward")]
    parts = list(module.modules())
    hooks = [table for part in parts[1:] for table in (part._forward_hooks, part._forward_pre_hooks)]
    return Watched([part._modules for part in parts], tensors, hooks, attributes, [vars(part) for part in parts])
