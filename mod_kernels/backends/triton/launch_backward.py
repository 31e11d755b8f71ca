"""The backward ops on the host, as :mod:`.launch` has the others."""

from __future__ import annotations

import functools

from ..._layout import CHANNELS_LAST, layout_of
from ..._library import OPS
from . import configs_backward, launch, variants_backward
from .configs import align_of
from .in_force import tuning_for
from .launch import _check_size, _like, _on_device_of
from .plans import MOST_PLANS, TYPE_NAMES, sample_stride
from .variants_backward import Needed, Parts

_fuse_backward_variant = functools.lru_cache(MOST_PLANS)(variants_backward.fuse_backward_variant)
_select_backward_variants = functools.lru_cache(MOST_PLANS)(variants_backward.select_backward_variants)
_input_gradient_variant = functools.lru_cache(MOST_PLANS)(variants_backward.input_gradient_variant)


def fuse_channels_backward(dy, z, scores, index, position, z_needed, scores_needed):
    n, channels, h, w = dy.shape
    k, hw = z.shape[1], h * w
    dz = _like(z, k) if z_needed else z.new_empty(0)
    dscores = scores.new_empty(scores.shape if scores_needed else 0)
    if dy.numel() == 0:
        return dz, dscores.zero_()
    if not z_needed and not scores_needed:
        return dz, dscores
    _check_size(dy)
    strides = sample_stride(dy), sample_stride(z)
    align, hw_align = align_of(*strides), align_of(hw)
    channels_last = layout_of(dy) == CHANNELS_LAST
    kind = TYPE_NAMES[dy.dtype]
    variant = _fuse_backward_variant(
        kind, channels, k, hw, align, hw_align, position, channels_last, z_needed, scores_needed
    )
    programs = n * configs_backward.fuse_backward_config(kind, k, hw, channels_last).chunks
    index = index if position == "original" else scores
    scalars = (*(stride // align for stride in strides), hw // hw_align)
    with _on_device_of(dy):
        launch.run(variant, programs, dy, z, scores, index, dz, dscores, *scalars)
    return dz, dscores


def select_channels_backward(dscores, scores, index, hidden, pooled, fc1_weight, fc2_weight, *needed):
    outputs = OPS["select_channels_backward"].fake(
        dscores, scores, index, hidden, pooled, fc1_weight, fc2_weight, *needed
    )
    (n, k), (units, channels) = scores.shape, fc1_weight.shape
    if n == 0:
        return tuple(output.zero_() for output in outputs)
    wanted = Needed(*needed)
    if not any(wanted):
        return outputs
    tuning, types = tuning_for(scores), (TYPE_NAMES[fc1_weight.dtype], TYPE_NAMES[fc2_weight.dtype])
    first, second = _select_backward_variants(tuning, *types, channels, units, k, wanted)
    dlogits = scores.new_empty((n, channels) if wanted.logits else 0)
    dhidden = scores.new_empty((n, units) if wanted.hidden else 0)
    # What autograd hands in may be expanded: the gradient of a sum is.
    dscores, pooled = dscores.contiguous(), pooled.contiguous()
    with _on_device_of(scores):
        programs = n * (
            configs_backward.select_backward_config(tuning, channels, units, k).parts if wanted.hidden else 1
        )
        launch.run(first, programs, dscores, scores, index, hidden, fc2_weight, dlogits, dhidden)
        programs = variants_backward.select_weights_programs(second, n)
        launch.run(second, programs, dlogits, dhidden, hidden, pooled, fc1_weight, *outputs, n)
    return outputs


def input_gradient(dy, dpooled, dgathered, index, y, overwritten, position):
    dx = _like(dy, dy.shape[1])
    if dx.numel() == 0:
        return dx
    _check_size(dy)
    n, channels, h, w = dy.shape
    hw, channels_last, kind = h * w, layout_of(dy) == CHANNELS_LAST, TYPE_NAMES[dy.dtype]
    overwritten = None if y is None else overwritten
    parts = Parts(*(part is not None for part in (dpooled, dgathered, y, overwritten)))
    position = position if parts.overwritten else "first"
    narrow = dgathered if parts.dgathered else overwritten
    k = 1 if narrow is None else narrow.shape[1]
    strides = [0 if part is None else sample_stride(part) for part in (dy, y, dgathered, overwritten)]
    aligns = align_of(*strides[:2]), align_of(*strides[2:]), align_of(hw)
    tuning = tuning_for(dy)
    variant = _input_gradient_variant(tuning, kind, channels, k, hw, aligns, position, channels_last, parts)
    config = configs_backward.input_gradient_config(tuning, kind, channels, k, hw, aligns[2], channels_last)
    pointers = (
        dpooled.contiguous() if parts.dpooled else None,  # what autograd hands in may be expanded
        dgathered,
        index if parts.reads_index(position) else None,
        y,
        overwritten,
    )
    scalars = (
        *(stride // align for stride, align in zip(strides, (*aligns[:1] * 2, *aligns[1:2] * 2), strict=True)),
        hw // aligns[2],
        config.tiles,
    )
    with _on_device_of(dy):
        present = (dy if pointer is None else pointer for pointer in pointers)
        launch.run(variant, n * config.chunks * config.tiles, dy, *present, dx, *scalars)
    return dx
