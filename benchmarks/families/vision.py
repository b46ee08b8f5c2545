"""Image classification: convolutions and transformers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from optkit.benchmarks.families.catalogue import Builder, Built
from optkit.benchmarks.families.hub import config, image, model, vision

_SMALL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "num_labels": 10,
}  # fmt: skip


def _mobilenet_v1() -> Built:
    c = config("MobileNetV1Config", image_size=64, depth_multiplier=0.25, num_labels=10)
    return vision(model("MobileNetV1ForImageClassification", c), 64)


def _mobilenet_v2() -> Built:
    c = config("MobileNetV2Config", image_size=64, depth_multiplier=0.35, num_labels=10)
    return vision(model("MobileNetV2ForImageClassification", c), 64)


class _SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.pool, self.down, self.up = nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)  # fmt: skip

    def forward(self, x):  # type: ignore[no-untyped-def]
        s = nn.functional.relu(self.down(self.pool(x)))
        return x * nn.functional.hardsigmoid(self.up(s))


class _Inverted(nn.Module):
    def __init__(self, width: int, inner: int, out: int, kernel: int, stride: int, excite: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.Hardswish(),
            nn.Conv2d(inner, inner, kernel, stride, kernel // 2, groups=inner, bias=False), nn.BatchNorm2d(inner),
            nn.Hardswish(), _SqueezeExcite(inner) if excite else nn.Identity(), nn.Conv2d(inner, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )  # fmt: skip
        self.same = stride == 1 and width == out

    def forward(self, x):  # type: ignore[no-untyped-def]
        y = self.body(x)
        return x + y if self.same else y


def _mobilenet_v3() -> Built:
    module = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish(), _Inverted(16, 16, 16, 3, 2, True),
        _Inverted(16, 72, 24, 3, 2, False), _Inverted(24, 96, 40, 5, 1, True), _Inverted(40, 120, 40, 5, 1, True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 128), nn.Hardswish(), nn.Linear(128, 10),
    )  # fmt: skip
    return Built(module=module, inputs=image(64), dynamic={"input": {0: "batch"}})


def _efficientnet() -> Built:
    c = config(
        "EfficientNetConfig", image_size=64, width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320, num_labels=10
    )  # fmt: skip
    return vision(model("EfficientNetForImageClassification", c), 64)


def _regnet() -> Built:
    c = config(
        "RegNetConfig", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], groups_width=8, num_labels=10
    )
    return vision(model("RegNetForImageClassification", c), 64)


def _resnet() -> Built:
    c = config("ResNetConfig", embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], num_labels=10)
    return vision(model("ResNetForImageClassification", c), 64)


def _convnext() -> Built:
    c = config("ConvNextConfig", hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], num_labels=10)
    return vision(model("ConvNextForImageClassification", c), 64)


def _vit() -> Built:
    return vision(
        model("ViTForImageClassification", config("ViTConfig", image_size=32, patch_size=8, **_SMALL)), 32
    )


def _deit() -> Built:
    c = config("DeiTConfig", image_size=32, patch_size=8, **_SMALL)
    return vision(model("DeiTForImageClassificationWithTeacher", c), 32)


def _swin() -> Built:
    c = config(
        "SwinConfig", image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=10
    )  # fmt: skip
    return vision(model("SwinForImageClassification", c), 32)


def _mobilevit() -> Built:
    c = config("MobileViTConfig", image_size=64, hidden_sizes=[32, 48, 64], neck_hidden_sizes=[8, 16, 24, 32, 40, 48, 64], num_attention_heads=2, num_labels=10)  # fmt: skip
    return vision(model("MobileViTForImageClassification", c), 64)


def _levit() -> Built:
    c = config(
        "LevitConfig", image_size=64, hidden_sizes=[32, 48, 64], num_attention_heads=[2, 3, 4], depths=[1, 1, 1], key_dim=[8, 8, 8],
        down_ops=[["Subsample", 8, 4, 4, 2, 2], ["Subsample", 8, 6, 4, 2, 2]], num_labels=10,
    )  # fmt: skip
    return vision(model("LevitForImageClassification", c), 64)


FAMILIES: Mapping[str, Builder] = {
    "mobilenet_v1": _mobilenet_v1,
    "mobilenet_v2": _mobilenet_v2,
    "mobilenet_v3": _mobilenet_v3,
    "efficientnet": _efficientnet,
    "regnet": _regnet,
    "resnet": _resnet,
    "convnext": _convnext,
    "vit": _vit,
    "deit": _deit,
    "swin": _swin,
    "mobilevit": _mobilevit,
    "levit": _levit,
}
