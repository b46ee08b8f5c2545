"""The table of fused kernels."""

from __future__ import annotations

from optkit.registry import Registry

KERNELS = Registry(
    "kernel",
    {
        "layer-norm": "optkit.kernels.triton.norm:LayerNorm",
        "add-layer-norm": "optkit.kernels.triton.norm:AddLayerNorm",
        "rms-norm": "optkit.kernels.triton.norm:RmsNorm",
        "add-rms-norm": "optkit.kernels.triton.norm:AddRmsNorm",
        "swiglu": "optkit.kernels.triton.gated:SwiGlu",
        "geglu": "optkit.kernels.triton.gated:GeGlu",
        "matmul": "optkit.kernels.triton.matmul:MatMul",
        "linear": "optkit.kernels.triton.matmul:Linear",
        "linear-relu": "optkit.kernels.triton.matmul:LinearRelu",
        "grouped-linear": "optkit.kernels.triton.grouped:GroupedLinear",
        "attention": "optkit.kernels.triton.attention:Attention",
        "masked-attention": "optkit.kernels.triton.attention:MaskedAttention",
        "causal-attention": "optkit.kernels.triton.attention:CausalAttention",
        "causal-masked-attention": "optkit.kernels.triton.attention:CausalMaskedAttention",
        "paged-attention": "optkit.kernels.triton.paged:PagedAttention",
        "paged-attention-quantized": "optkit.kernels.triton.paged:PagedAttentionQuantized",
        "rotary-write": "optkit.kernels.triton.paged:RotaryWrite",
        "rotary-write-quantized": "optkit.kernels.triton.paged:RotaryWriteQuantized",
        "linear-int8": "optkit.kernels.triton.eight_bits:LinearInt8",
        "linear-fp8": "optkit.kernels.triton.eight_bits:LinearFp8",
        "linear-fp8-blocks": "optkit.kernels.triton.block_scales:LinearFp8Blocks",
        "linear-int4": "optkit.kernels.triton.weights:LinearInt4",
        "linear-int4-decode": "optkit.kernels.triton.weights:LinearInt4Decode",
        "rotary": "optkit.kernels.triton.rotary:Rotary",
        "quantize": "optkit.kernels.triton.quantize:Quantize",
        "quantize-fp8": "optkit.kernels.triton.quantize:QuantizeFp8",
        "dequantize": "optkit.kernels.triton.quantize:Dequantize",
        "softmax": "optkit.kernels.triton.softmax:Softmax",
        "cross-entropy": "optkit.kernels.triton.cross_entropy:CrossEntropy",
        "depthwise-conv": "optkit.kernels.triton.depthwise:DepthwiseConv",
        "depthwise-conv-relu": "optkit.kernels.triton.depthwise:DepthwiseConvRelu",
        "top-k": "optkit.kernels.triton.top:Top",
        "top-detections": "optkit.kernels.triton.top:TopDetections",
        "linear-gelu": "optkit.kernels.triton.matmul:LinearGelu",
    },
    group="optkit.kernels",
)
