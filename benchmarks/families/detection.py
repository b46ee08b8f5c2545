"""Detection and segmentation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from optkit.benchmarks.families.catalogue import Builder, Built
from optkit.benchmarks.families.hub import BATCH, config, image, model, vision


def _yolos() -> Built:
    c = config(
        "YolosConfig", image_size=[32, 32], patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, num_detection_tokens=5, num_labels=4,
    )  # fmt: skip
    return vision(model("YolosForObjectDetection", c), 32)


class _Conv(nn.Sequential):
    def __init__(self, width: int, out: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(width, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out), nn.SiLU()
        )


class _Split(nn.Module):
    """The C2f block of YOLOv8: halves, one of them through a chain of residual blocks, all joined."""

    def __init__(self, width: int, out: int, blocks: int = 1) -> None:
        super().__init__()
        half = out // 2
        self.before, self.after = _Conv(width, out), _Conv(half * (2 + blocks), out)
        self.chain = nn.ModuleList(
            nn.Sequential(_Conv(half, half, 3), _Conv(half, half, 3)) for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.before(x).chunk(2, 1))
        for block in self.chain:
            parts.append(parts[-1] + block(parts[-1]))
        y: Tensor = self.after(torch.cat(parts, 1))
        return y


class _Yolo(nn.Module):
    """Backbone, upsampling neck, and a head per scale with distances as distributions (YOLOv8)."""

    def __init__(self, classes: int = 4, bins: int = 8) -> None:
        super().__init__()
        self.bins = bins
        self.stem = nn.Sequential(_Conv(3, 8, 3, 2), _Conv(8, 16, 3, 2), _Split(16, 16))
        self.middle = nn.Sequential(_Conv(16, 32, 3, 2), _Split(32, 32))
        self.deep = nn.Sequential(_Conv(32, 48, 3, 2), _Split(48, 48))
        self.join = _Split(80, 32)
        self.boxes = nn.ModuleList(nn.Conv2d(w, 4 * bins, 1) for w in (32, 48))
        self.scores = nn.ModuleList(nn.Conv2d(w, classes, 1) for w in (32, 48))
        self.register_buffer("steps", torch.arange(bins, dtype=torch.float32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        middle = self.middle(self.stem(x))
        deep = self.deep(middle)
        up = nn.functional.interpolate(deep, scale_factor=2.0, mode="nearest")
        maps = (self.join(torch.cat([up, middle], 1)), deep)
        boxes, scores = [], []
        for stride, y, box, score in zip((8, 16), maps, self.boxes, self.scores, strict=True):
            h, w = y.shape[-2:]
            ways = box(y).view(-1, 4, self.bins, h * w).softmax(2)
            distance = (ways * self.steps.view(1, 1, -1, 1)).sum(2)
            rows, columns = torch.arange(h, device=x.device) + 0.5, torch.arange(w, device=x.device) + 0.5
            centre = torch.stack(
                [columns[None, :].expand(h, w).reshape(-1), rows[:, None].expand(h, w).reshape(-1)]
            )
            low, high = centre - distance[:, :2], centre + distance[:, 2:]
            boxes.append(torch.cat([(low + high) / 2, high - low], 1) * stride)
            scores.append(score(y).flatten(2).sigmoid())
        return torch.cat(boxes, 2), torch.cat(scores, 2)


class _YoloTop(nn.Module):
    """Without suppression: the best scores of all places are taken (YOLOv10)."""

    def __init__(self, most: int = 8) -> None:
        super().__init__()
        self.body, self.most = _Yolo(), most

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        boxes, scores = self.body(x)
        best, kinds = scores.max(1)
        top, places = best.topk(self.most, 1)
        chosen = boxes.transpose(1, 2).gather(1, places[..., None].expand(-1, -1, 4))
        return chosen, top, kinds.gather(1, places)


_IMAGE = {0: "batch", 2: "height", 3: "width"}


def _yolo_v8() -> Built:
    return Built(module=_Yolo(), inputs={"x": image(64)}, dynamic={"x": _IMAGE})


def _yolo_v10() -> Built:
    return Built(module=_YoloTop(), inputs={"x": image(64)}, dynamic={"x": {0: "batch"}})


def _backbone() -> object:
    return config(
        "ResNetConfig", embedding_size=16, hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1], out_features=["stage4"]
    )  # fmt: skip


def _detr() -> Built:
    c = config(
        "DetrConfig", use_timm_backbone=False, backbone=None, backbone_config=_backbone(), d_model=32, encoder_layers=1,
        decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
        num_queries=6, num_labels=4,
    )  # fmt: skip
    return vision(model("DetrForObjectDetection", c), 64)


def _rt_detr() -> Built:
    backbone = config(
        "RTDetrResNetConfig", embedding_size=16, hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1], out_features=["stage2", "stage3", "stage4"],
        layer_type="basic",
    )  # fmt: skip
    c = config(
        "RTDetrConfig", backbone=None, backbone_config=backbone, use_timm_backbone=False, encoder_hidden_dim=32, d_model=32,
        encoder_in_channels=[24, 32, 48], decoder_in_channels=[32, 32, 32], encoder_ffn_dim=64, decoder_ffn_dim=64,
        encoder_attention_heads=4, decoder_attention_heads=4, decoder_layers=2, num_queries=8, num_denoising=0, num_labels=4,
        anchor_image_size=None,
    )  # fmt: skip
    return vision(model("RTDetrForObjectDetection", c), 64)


def _align(maps: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Each box read at ``size`` times ``size`` places, as RoIAlign with one sample a bin does; ``[boxes, C, size, size]``."""
    h, w = maps.shape[-2:]
    steps = (torch.arange(size, dtype=torch.float32, device=boxes.device) + 0.5) / size
    x = boxes[:, 0, None] + (boxes[:, 2] - boxes[:, 0])[:, None] * steps
    y = boxes[:, 1, None] + (boxes[:, 3] - boxes[:, 1])[:, None] * steps
    grid = torch.stack(
        [(x * 2 / w - 1)[:, None, :].expand(-1, size, -1), (y * 2 / h - 1)[:, :, None].expand(-1, -1, size)],
        -1,
    )
    return nn.functional.grid_sample(maps.expand(boxes.shape[0], -1, -1, -1), grid, align_corners=False)


def _overlap(boxes: Tensor) -> Tensor:
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(2)
    return shared / (area[:, None] + area[None] - shared)


class _MaskRcnn(nn.Module):
    """Proposals, the best of them, aligned features, a head for classes and one for masks; for one image.

    Args:
        suppress: ``""``, ``matrix`` (suppression as a fixed point of a triangular matrix) or ``loop`` (as in textbooks).
    """

    def __init__(self, suppress: str = "") -> None:
        super().__init__()
        self.suppress = suppress
        self.body = nn.Sequential(_Conv(3, 16, 3, 2), _Conv(16, 32, 3, 2))
        self.score, self.delta = nn.Conv2d(32, 1, 1), nn.Conv2d(32, 4, 1)
        self.classes = nn.Sequential(nn.Flatten(), nn.Linear(32 * 16, 32), nn.ReLU(), nn.Linear(32, 5))
        self.masks = nn.Sequential(
            nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(16, 1, 2, 2)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = self.body(x)
        h, w = maps.shape[-2:]
        scores = self.score(maps).flatten()
        y, place = torch.arange(h * w, device=x.device) // w, torch.arange(h * w, device=x.device) % w
        centre = torch.stack([place, y, place, y], 1).to(torch.float32)
        delta = self.delta(maps)[0].flatten(1).t().sigmoid() * 4
        boxes = centre + delta * torch.tensor([-1.0, -1.0, 1.0, 1.0], device=x.device)
        best, order = scores.topk(12)
        boxes = boxes[order]
        if self.suppress == "matrix":
            hides = torch.triu(_overlap(boxes) > 0.5, 1).to(torch.float32)
            kept = torch.ones_like(best)
            for _ in range(boxes.shape[0]):
                kept = ((kept[None] @ hides)[0] < 0.5).to(torch.float32)
            boxes, best = boxes[kept > 0.5], best[kept > 0.5]
        elif self.suppress == "loop":
            overlap, left = _overlap(boxes), torch.arange(12)
            found = []
            while left.numel():
                found.append(left[0])
                left = left[1:][overlap[left[0], left[1:]] <= 0.5]
            kept = torch.stack(found)
            boxes, best = boxes[kept], best[kept]
        features = _align(maps, boxes, 4)
        return boxes, best, self.classes(features).softmax(-1), self.masks(features).sigmoid()


def _mask_rcnn(suppress: str) -> Built:
    return Built(module=_MaskRcnn(suppress), inputs={"x": image(64, batch=1)}, dynamic={})


def _mask2former() -> Built:
    backbone = config(
        "SwinConfig", image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    c = config(
        "Mask2FormerConfig", backbone=None, backbone_config=backbone, use_timm_backbone=False, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=5, num_labels=4, common_stride=4,
    )  # fmt: skip
    return vision(model("Mask2FormerForUniversalSegmentation", c), 64)


def _sam() -> Built:
    c = config(
        "SamConfig",
        vision_config={"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 8, "global_attn_indexes": [1], "window_size": 4, "mlp_dim": 64, "num_pos_feats": 8},
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
    )  # fmt: skip
    inputs = {
        "pixel_values": image(64), "input_points": torch.rand(BATCH, 1, 2, 2) * 64, "input_labels": torch.ones(BATCH, 1, 2, dtype=torch.int64),
        "multimask_output": True,
    }  # fmt: skip
    free = {n: {0: "batch"} for n in ("pixel_values", "input_points", "input_labels")}
    return Built(module=model("SamModel", c), inputs=inputs, dynamic=free)


class _Sam2Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        c = config(
            "Sam2Config",
            vision_config={"backbone_config": config("Sam2HieraDetConfig", image_size=[64, 64], hidden_size=16, num_attention_heads=1, blocks_per_stage=[1, 2, 2, 1], embed_dim_per_stage=[16, 32, 64, 128], num_attention_heads_per_stage=[1, 2, 4, 8], window_size_per_stage=[4, 2, 4, 2], global_attention_blocks=[4], window_positional_embedding_background_size=[4, 4]),
                           "backbone_channel_list": [128, 64, 32, 16], "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "fpn_hidden_size": 16},
            prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
            mask_decoder_config={"hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
        )  # fmt: skip
        self.model = model("Sam2Model", c)

    def forward(self, pixel_values: Tensor, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        found = self.model(pixel_values=pixel_values, input_points=points, input_labels=labels)
        return found.pred_masks, found.iou_scores


def _sam2() -> Built:
    inputs = {
        "pixel_values": image(64), "points": torch.rand(BATCH, 1, 2, 2) * 64, "labels": torch.ones(BATCH, 1, 2, dtype=torch.int64)
    }  # fmt: skip
    return Built(module=_Sam2Image(), inputs=inputs, dynamic={n: {0: "batch"} for n in inputs})


FAMILIES: Mapping[str, Builder] = {
    "yolos": _yolos,
    "yolo_v8": _yolo_v8,
    "yolo_v10": _yolo_v10,
    "detr": _detr,
    "rt_detr": _rt_detr,
    "mask_rcnn_fixed": lambda: _mask_rcnn(""),
    "mask_rcnn_nms": lambda: _mask_rcnn("matrix"),
    "mask_rcnn_nms_loop": lambda: _mask_rcnn("loop"),
    "mask2former": _mask2former,
    "sam": _sam,
    "sam2": _sam2,
}
