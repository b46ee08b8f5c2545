"""Normalizations and softmax."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.backends.coreml.emit.base import Context, cast, emits, like, name_of, static
from optkit.backends.coreml.quiet import mb
from optkit.graph import ints


def _unused(node: ir.Node) -> str | None:
    extra = [i for i, v in enumerate(node.outputs) if i and (v.uses() or v.is_graph_output())]
    return f"Core ML does not give output {extra[0]}" if extra else None


def _refuse_batch_norm(node: ir.Node) -> str | None:
    return "training_mode" if node.attributes.get_int("training_mode", 0) else _unused(node)


@emits("BatchNormalization", refuse=_refuse_batch_norm)
def _batch_norm(c: Context, node: ir.Node) -> Any:
    x, gamma, beta, mean, variance = c.inputs(node)
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    if 3 <= x.rank <= 5 and all(v.val is not None for v in (gamma, beta, mean, variance)):
        return mb.batch_norm(
            x=x, mean=mean, variance=variance, gamma=gamma, beta=beta, epsilon=like(x, epsilon)
        )
    along = [1, -1, *[1] * (x.rank - 2)]
    gamma, beta, mean, variance = (mb.reshape(x=v, shape=along) for v in (gamma, beta, mean, variance))
    scale = mb.mul(x=gamma, y=mb.rsqrt(x=variance, epsilon=like(x, epsilon)))
    return mb.add(x=mb.mul(x=mb.sub(x=x, y=mean), y=scale), y=beta)


def _normalized(x: Any, axes: list[int], epsilon: float) -> Any:
    """Mean 0 and variance 1 along the last axes."""
    return mb.layer_norm(x=x, axes=axes, epsilon=like(x, epsilon))


@emits("InstanceNormalization")
def _instance_norm(c: Context, node: ir.Node) -> Any:
    x, gamma, beta = c.inputs(node)
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    if x.rank in (3, 4) and gamma.val is not None and beta.val is not None:
        return mb.instance_norm(x=x, gamma=gamma, beta=beta, epsilon=like(x, epsilon))
    along = [1, -1, *[1] * (x.rank - 2)]
    out = _normalized(x, list(range(2, x.rank)), epsilon)
    return mb.add(x=mb.mul(x=out, y=mb.reshape(x=gamma, shape=along)), y=mb.reshape(x=beta, shape=along))


@emits("GroupNormalization")
def _group_norm(c: Context, node: ir.Node) -> Any:
    x, gamma, beta = c.inputs(node)
    groups = node.attributes.get_int("num_groups", 1)
    sizes = c.sizes(x)
    grouped = c.reshape(x, [sizes[0], groups, -1])
    out = c.reshape(_normalized(grouped, [-1], node.attributes.get_float("epsilon", 1e-5)), sizes)
    along = [1, -1, *[1] * (x.rank - 2)]
    return mb.add(x=mb.mul(x=out, y=mb.reshape(x=gamma, shape=along)), y=mb.reshape(x=beta, shape=along))


@emits("LayerNormalization", refuse=_unused)
def _layer_norm(c: Context, node: ir.Node) -> Any:
    x = c.input(node, 0)
    axis = node.attributes.get_int("axis", -1) % x.rank
    axes = list(range(axis, x.rank))
    epsilon = like(x, node.attributes.get_float("epsilon", 1e-5))
    gamma, beta = c.input(node, 1), c.input(node, 2)
    within = [int(d) if isinstance(d, int | np.integer) else -1 for d in x.shape[axis:]]
    affine = [v for v in (gamma, beta) if v is not None]
    if all(v.val is not None and list(v.shape) == within for v in affine):
        given = {"gamma": gamma} if beta is None else {"gamma": gamma, "beta": beta}
        return mb.layer_norm(x=x, axes=axes, epsilon=epsilon, **given)
    out = mb.mul(x=mb.layer_norm(x=x, axes=axes, epsilon=epsilon), y=gamma)
    return out if beta is None else mb.add(x=out, y=beta)


@emits("RMSNormalization", "SimplifiedLayerNormalization", refuse=_unused)
def _rms_norm(c: Context, node: ir.Node) -> Any:
    x, gamma = c.inputs(node)[:2]
    axes = list(range(node.attributes.get_int("axis", -1) % x.rank, x.rank))
    power = mb.reduce_mean(x=mb.mul(x=x, y=x), axes=axes, keep_dims=True)
    scale = mb.rsqrt(x=power, epsilon=like(x, node.attributes.get_float("epsilon", 1e-5)))
    return mb.mul(x=mb.mul(x=x, y=scale), y=gamma)


@emits("LpNormalization")
def _lp_norm(c: Context, node: ir.Node) -> Any:
    x, axis = c.input(node, 0), node.attributes.get_int("axis", -1)
    reduce = mb.reduce_l1_norm if node.attributes.get_int("p", 2) == 1 else mb.reduce_l2_norm
    size = reduce(x=x, axes=[axis], keep_dims=True)
    # ONNX Runtime gives 0 where the norm is 0.
    zero = mb.equal(x=size, y=like(x, 0))
    return mb.real_div(x=x, y=mb.select(cond=zero, a=like(x, 1), b=size))


@emits("LRN")
def _local_response(c: Context, node: ir.Node) -> Any:
    x = c.input(node, 0)
    alpha, beta, k = (
        node.attributes.get_float("alpha", 1e-4),
        node.attributes.get_float("beta", 0.75),
        node.attributes.get_float("bias", 1.0),
    )
    size = node.attributes.get_int("size", 1)
    return mb.local_response_norm(x=x, size=size, alpha=like(x, alpha), beta=like(x, beta), k=like(x, k))


@emits("MeanVarianceNormalization")
def _mean_variance(c: Context, node: ir.Node) -> Any:
    x = c.input(node, 0)
    axes = ints(node, "axes", [0, 2, 3])
    centred = mb.sub(x=x, y=mb.reduce_mean(x=x, axes=axes, keep_dims=True))
    deviation = mb.sqrt(x=mb.reduce_mean(x=mb.mul(x=centred, y=centred), axes=axes, keep_dims=True))
    return mb.real_div(x=centred, y=mb.add(x=deviation, y=like(x, 1e-9)))


@emits("Softmax")
def _softmax(c: Context, node: ir.Node) -> Any:
    return mb.softmax(x=c.input(node, 0), axis=node.attributes.get_int("axis", -1))


@emits("LogSoftmax")
def _log_softmax(c: Context, node: ir.Node) -> Any:
    x, axis = c.input(node, 0), node.attributes.get_int("axis", -1)
    shifted = mb.sub(x=x, y=mb.reduce_max(x=x, axes=[axis], keep_dims=True))
    total = mb.reduce_sum(x=mb.exp(x=shifted), axes=[axis], keep_dims=True)
    return mb.sub(x=shifted, y=mb.log(x=total, epsilon=like(x, 0)))


def _refuse_hardmax(node: ir.Node) -> str | None:
    x = node.inputs[0]
    axis = node.attributes.get_int("axis", -1)
    fixed = x is not None and x.shape is not None and isinstance(x.shape[axis], int)
    return None if fixed else "Hardmax over an axis of free size"


@emits("Hardmax", refuse=_refuse_hardmax)
def _hardmax(c: Context, node: ir.Node) -> Any:
    x, axis = c.input(node, 0), node.attributes.get_int("axis", -1)
    sizes = static(x) or [int(x.shape[axis])]
    largest = mb.reduce_argmax(x=x, axis=axis, keep_dims=False)
    depth = sizes[axis] if len(sizes) > 1 or axis in (0, -1) else sizes[0]
    out = mb.one_hot(
        indices=largest, one_hot_vector_size=depth, axis=axis, on_value=np.int32(1), off_value=np.int32(0)
    )
    return cast(out, name_of(x))
