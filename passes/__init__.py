"""The table of passes. A row is a string, so that listing names imports nothing."""

from __future__ import annotations

from optkit.registry import Registry

PASSES = Registry(
    "pass",
    {
        "lift-constants": "optkit.passes.cleanup.constants:LiftConstants",
        "fold-constants": "optkit.passes.cleanup.constants:FoldConstants",
        "fold-shapes": "optkit.passes.cleanup.shapes:FoldShapes",
        "remove-noops": "optkit.passes.cleanup.noops:RemoveNoops",
        "remove-dead": "optkit.passes.cleanup.dead:RemoveDead",
        "share-duplicates": "optkit.passes.cleanup.duplicates:ShareDuplicates",
        "slices-to-split": "optkit.passes.cleanup.slices:SlicesToSplit",
        "cancel-layout": "optkit.passes.cleanup.layout:CancelLayout",
        "clean-casts": "optkit.passes.cleanup.casts:CleanCasts",
        "fold-batch-norm": "optkit.passes.fusion.batch_norm:FoldBatchNorm",
        "fold-pad": "optkit.passes.fusion.pad:FoldPad",
        "fold-affine": "optkit.passes.fusion.affine:FoldAffine",
        "fuse-hard-swish": "optkit.passes.fusion.hard_swish:FuseHardSwish",
        "fuse-gelu": "optkit.passes.fusion.gelu:FuseGelu",
        "fuse-sigmoid": "optkit.passes.fusion.sigmoid:FuseSigmoid",
        "fuse-softplus": "optkit.passes.fusion.softplus:FuseSoftplus",
        "fuse-instance-norm": "optkit.passes.fusion.instance_norm:FuseInstanceNorm",
        "fuse-rms-norm": "optkit.passes.fusion.rms_norm:FuseRmsNorm",
        "fuse-depth-to-space": "optkit.passes.fusion.depth_to_space:FuseDepthToSpace",
        "clean-attention": "optkit.passes.fusion.attention:CleanAttention",
        "group-heads": "optkit.passes.fusion.grouped_heads:GroupHeads",
        "fuse-layer-norm": "optkit.passes.fusion.layer_norm:FuseLayerNorm",
        "matmul-to-gemm": "optkit.passes.lowering.gemm:MatMulToGemm",
        "call-kernels": "optkit.passes.lowering.kernels:CallKernels",
        "cast": "optkit.passes.lowering.cast:CastFloats",
        "equalize-layers": "optkit.passes.quantization.equalize:EqualizeLayers",
        "smooth-activations": "optkit.passes.quantization.smooth:SmoothActivations",
        "prune-channels": "optkit.passes.pruning.structured:PruneChannels",
        "zero-weights": "optkit.passes.pruning.zeros:ZeroWeights",
        "quantize-static": "optkit.passes.quantization.static:QuantizeStatic",
        "quantize-embedding": "optkit.passes.quantization.embedding:QuantizeEmbedding",
        "quantize-weights": "optkit.passes.quantization.weights:QuantizeWeights",
        "palettize-weights": "optkit.passes.quantization.palette:PalettizeWeights",
        "quantize-dynamic": "optkit.passes.quantization.dynamic:QuantizeDynamic",
    },
    group="optkit.passes",
)
