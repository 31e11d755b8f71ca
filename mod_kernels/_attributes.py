"""What a module computes by, besides its weights: its attributes, and tensors that are constants to it.

For recognised blocks (:mod:`mod_kernels.foreign`): one is what was compared with its plan only as long as all of
this is as it was then.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .nn._spec_cache import snapshot

# What every module has, or gets from others; the rest of its attributes are its own.
OF_EVERY_MODULE = frozenset(
    (
        *vars(nn.Module()),
        *("_is_replica", "_former_parameters"),  # DataParallel's
        "_compiled_call_impl",
        *("_is_fsdp_managed_module", "_fsdp_use_orig_params"),
        "_mod_kernels_state",
    )
)
Names = frozenset[tuple[str, str]]  # of attributes and buffers: a part's path, and a name in it
_PLAIN = (type(None), bool, int, float, str, torch.dtype)


class Settings(NamedTuple):
    """What a part of a block computes, besides its tensors."""

    path: str
    kind: type | None  # None for the block itself
    attributes: list[tuple[str, Any]]
    of_the_class: list[tuple[str, Any]]


def settings_of(module: nn.Module, written: Names = frozenset()) -> tuple[Settings, ...]:
    """Classes of the submodules, all attributes but tensors, and plain ones of their classes, which one may hide.

    ``written``: those that the block's own forward writes, which are left out.
    """
    return tuple(
        Settings(
            path,
            None if part is module else type(part),
            attributes_of(part, path, written),
            _of_the_class(part),
        )
        for path, part in module.named_modules()
    )


def are_as_set(module: nn.Module, settings: tuple[Settings, ...]) -> bool:
    """Whether ``settings_of(module)`` is still that, as torch 2.11's Dynamo can trace it: by what was there then.

    What it cannot see is an attribute that appears and hides no plain value of its class.
    """
    parts = dict(module.named_modules())
    if len(parts) != len(settings):
        return False
    for one in settings:
        part = parts.get(one.path)
        if part is None or (one.kind is not None and type(part) is not one.kind):
            return False
        for name, value in (*one.attributes, *one.of_the_class):
            now = getattr(part, name, None)
            if now is not value and (type(now) is not type(value) or now != value):
                return False
    return True


def attributes_of(module: nn.Module, path: str, written: Names) -> list[tuple[str, Any]]:
    return [
        (name, snapshot(one))
        for name, one in vars(module).items()
        if name not in OF_EVERY_MODULE and (path, name) not in written and not isinstance(one, Tensor)
    ]


def _of_the_class(module: nn.Module) -> list[tuple[str, Any]]:
    """Plain values, no methods, that an attribute of the instance may hide; PyTorch's own classes have none."""
    kinds = [
        cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch.nn") and cls is not object
    ]
    names = dict.fromkeys(name for cls in kinds for name in vars(cls) if not name.startswith("__"))
    found = [(name, getattr(module, name)) for name in names if name not in vars(module)]
    return [(name, snapshot(one)) for name, one in found if _is_plain(one)]


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    return isinstance(value, _PLAIN) or (isinstance(value, (tuple, list)) and all(map(_is_plain, value)))


def constants_of(module: nn.Module, written: Names) -> dict[tuple[str, str], Tensor]:
    """The tensors that the comparison with a plan does not vary: no weights, and no part of the spec.

    Buffers that are not floating-point, but for what norms count, and tensors that are no parameter or buffer.
    """
    found = {}
    for path, part in module.named_modules():
        held = {name: one for name, one in vars(part).items() if isinstance(one, Tensor)}
        held |= {
            name: one
            for name, one in part._buffers.items()
            if one is not None and not one.is_floating_point() and name != "num_batches_tracked"
        }
        found |= {(path, name): one for name, one in held.items() if (path, name) not in written}
    return found


def held(module: nn.Module) -> dict[tuple[str, str], tuple[Any, Any]]:
    """Every attribute and every buffer but floating-point ones: the object, and what was in it."""
    found = {}
    for path, part in module.named_modules():
        buffers = {name: one for name, one in part._buffers.items() if one is not None}
        kept = {name: one for name, one in buffers.items() if not one.is_floating_point()}
        kept |= {name: one for name, one in vars(part).items() if name not in OF_EVERY_MODULE}
        for name, one in kept.items():
            found[path, name] = one, one.clone() if isinstance(one, Tensor) else snapshot(one)
    return found


def differ(now: tuple[Any, Any], before: tuple[Any, Any]) -> bool:
    if now[0] is not before[0]:
        return True
    if isinstance(now[0], Tensor):
        return now[1].shape != before[1].shape or not torch.equal(now[1], before[1])
    try:
        return bool(now[1] != before[1])
    except (RuntimeError, ValueError):  # tensors and arrays in lists
        return True
