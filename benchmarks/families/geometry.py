"""Points, depth, radiance fields, and networks that give back an image."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from optkit.benchmarks.families.catalogue import Builder, Built
from optkit.benchmarks.families.hub import BATCH, config, image, model, vision


def _superpoint() -> Built:
    c = config(
        "SuperPointConfig", encoder_hidden_sizes=[8, 8, 16, 16], decoder_hidden_size=32, keypoint_decoder_dim=65, descriptor_decoder_dim=32,
        keypoint_threshold=0.0, nms_radius=2,
    )  # fmt: skip
    return Built(
        module=model("SuperPointForKeypointDetection", c), inputs={"pixel_values": image(32, batch=1)}, dynamic={}
    )  # fmt: skip


def _depth_anything() -> Built:
    backbone = config(
        "Dinov2Config", image_size=28, patch_size=14, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, mlp_ratio=2,
        out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False,
    )  # fmt: skip
    c = config(
        "DepthAnythingConfig", backbone=None, backbone_config=backbone, reassemble_hidden_size=32, neck_hidden_sizes=[8, 16, 24, 32],
        fusion_hidden_size=16, head_hidden_size=8,
    )  # fmt: skip
    return vision(model("DepthAnythingForDepthEstimation", c), 28)


def _shared(*widths: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        parts += [nn.Conv1d(a, b, 1), nn.BatchNorm1d(b), nn.ReLU()]
    return nn.Sequential(*parts)


class _PointNet(nn.Module):
    """A learnt rotation of the points, features of each, the largest of all."""

    def __init__(self) -> None:
        super().__init__()
        self.turn, self.angles = _shared(3, 16, 32), nn.Linear(32, 9)
        self.each, self.head = _shared(3, 32, 64), nn.Linear(64, 10)

    def forward(self, points: Tensor) -> Tensor:
        turn = self.angles(self.turn(points).amax(2)).view(-1, 3, 3)
        moved = (turn + torch.eye(3, device=points.device)) @ points
        y: Tensor = self.head(self.each(moved).amax(2))
        return y


class _PointNet2(nn.Module):
    """Centres, their nearest neighbours, and the largest feature of each neighbourhood."""

    def __init__(self, centres: int = 8, near: int = 6) -> None:
        super().__init__()
        self.centres, self.near = centres, near
        self.each, self.whole, self.head = _shared(6, 16, 32), _shared(35, 64), nn.Linear(64, 10)

    def forward(self, points: Tensor) -> Tensor:
        centres = points[:, : self.centres]
        apart = (centres[:, :, None] - points[:, None]).square().sum(-1)
        places = apart.topk(self.near, largest=False).indices
        width = points.shape[-1]
        chosen = points.gather(1, places.flatten(1)[..., None].expand(-1, -1, width))
        groups = chosen.view(-1, self.centres, self.near, width)
        x = torch.cat([groups - centres[:, :, None], groups], -1).flatten(1, 2).transpose(1, 2)
        x = self.each(x).unflatten(2, (self.centres, self.near)).amax(3)
        y: Tensor = self.head(self.whole(torch.cat([centres.transpose(1, 2), x], 1)).amax(2))
        return y


class _VoxelNet(nn.Module):
    """Points of each voxel encoded, scattered to a grid seen from above, and convolved."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.size = size
        self.each = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 7, 1)
        )

    def forward(self, points: Tensor, counts: Tensor, places: Tensor) -> Tensor:
        real = torch.arange(points.shape[1], device=points.device)[None] < counts[:, None]
        x = (self.each(points) * real[..., None]).amax(1)
        at = (places[:, 0] * self.size + places[:, 1])[None].expand(x.shape[1], -1)
        grid = torch.zeros(x.shape[1], self.size * self.size, dtype=x.dtype).scatter_add(1, at, x.t())
        y: Tensor = self.body(grid.view(1, -1, self.size, self.size))
        return y


def _voxelnet() -> Built:
    inputs = {
        "points": torch.randn(20, 5, 4), "counts": torch.randint(1, 6, (20,)), "places": torch.randint(0, 8, (20, 2))
    }  # fmt: skip
    return Built(module=_VoxelNet(), inputs=inputs, dynamic={n: {0: "voxels"} for n in inputs})


class _Nerf(nn.Module):
    """Colour along rays: frequencies, a network, and what each sample lets through (a running product)."""

    def __init__(self, frequencies: int = 4) -> None:
        super().__init__()
        self.register_buffer("scales", math.pi * 2.0 ** torch.arange(frequencies, dtype=torch.float32))
        self.body = nn.Sequential(
            nn.Linear(6 * frequencies, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
        )

    def forward(self, origins: Tensor, directions: Tensor, depths: Tensor) -> Tensor:
        points = origins[:, None] + directions[:, None] * depths[..., None]
        waves = (points[..., None] * self.scales).flatten(-2)
        raw = self.body(torch.cat([waves.sin(), waves.cos()], -1))
        steps = depths[:, 1:] - depths[:, :-1]
        hidden = 1 - torch.exp(-torch.relu(raw[:, :-1, 3]) * steps)
        through = torch.cumprod(1 - hidden + 1e-6, 1)
        through = torch.cat([torch.ones_like(through[:, :1]), through[:, :-1]], 1)
        return ((through * hidden)[..., None] * raw[:, :-1, :3].sigmoid()).sum(1)


def _nerf() -> Built:
    inputs = {
        "origins": torch.randn(6, 3), "directions": torch.randn(6, 3), "depths": torch.rand(6, 10).sort(1).values * 4
    }  # fmt: skip
    return Built(module=_Nerf(), inputs=inputs, dynamic={n: {0: "rays"} for n in inputs})


class _Splat(nn.Module):
    """Gaussians in the plane, from near to far, each covering part of what is behind it."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.size = size

    def forward(
        self, means: Tensor, shapes: Tensor, colours: Tensor, opacity: Tensor, depth: Tensor
    ) -> Tensor:
        order = torch.argsort(depth, stable=True)
        means, shapes, colours, opacity = means[order], shapes[order], colours[order], opacity[order]
        inverse = torch.linalg.inv(shapes @ shapes.transpose(1, 2) + 0.1 * torch.eye(2))
        line = torch.linspace(-1, 1, self.size)
        places = torch.stack(
            [line[None].expand(self.size, -1).flatten(), line[:, None].expand(-1, self.size).flatten()], 1
        )
        apart = places[:, None] - means[None]
        far = ((apart[..., None, :] @ inverse)[..., 0, :] * apart).sum(-1)
        cover = (opacity.sigmoid() * torch.exp(-0.5 * far)).clamp(max=0.99)
        through = torch.cumprod(1 - cover, 1) / (1 - cover)
        return ((through * cover)[..., None] * colours).sum(1).view(self.size, self.size, 3)


def _gaussian_splat() -> Built:
    n = 12
    inputs = {
        "means": torch.randn(n, 2), "shapes": torch.randn(n, 2, 2), "colours": torch.rand(n, 3), "opacity": torch.randn(n), "depth": torch.rand(n)
    }  # fmt: skip
    return Built(module=_Splat(), inputs=inputs, dynamic={})


def _swin2sr() -> Built:
    c = config(
        "Swin2SRConfig", image_size=16, patch_size=1, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4, upscale=2
    )  # fmt: skip
    return vision(model("Swin2SRForImageSuperResolution", c), 16)


class _Style(nn.Module):
    """Convolutions with instance norms, residual blocks, and upsampling (Johnson et al., arXiv:1603.08155)."""

    def __init__(self) -> None:
        super().__init__()

        def conv(a: int, b: int, kernel: int, stride: int = 1) -> list[nn.Module]:
            return [
                nn.ReflectionPad2d(kernel // 2),
                nn.Conv2d(a, b, kernel, stride),
                nn.InstanceNorm2d(b, affine=True),
            ]

        self.before = nn.Sequential(*conv(3, 8, 9), nn.ReLU(), *conv(8, 16, 3, 2), nn.ReLU())
        self.block = nn.Sequential(*conv(16, 16, 3), nn.ReLU(), *conv(16, 16, 3))
        self.after = nn.Sequential(
            nn.Upsample(scale_factor=2.0),
            *conv(16, 8, 3),
            nn.ReLU(),
            nn.ReflectionPad2d(4),
            nn.Conv2d(8, 3, 9),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        y: Tensor = self.after(x + self.block(x))
        return y


class _Between(nn.Module):
    """The frame between two: flows to both, warping by sampling, and a blend."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = nn.Sequential(
            nn.Conv2d(6, 16, 3, padding=1), nn.PReLU(16), nn.Conv2d(16, 5, 3, padding=1)
        )

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        found = self.flow(torch.cat([first, second], 1))
        h, w = first.shape[-2:]
        rows = (torch.arange(h, device=first.device) * 2 + 1) / h - 1
        columns = (torch.arange(w, device=first.device) * 2 + 1) / w - 1
        grid = torch.stack([columns[None].expand(h, w), rows[:, None].expand(h, w)], -1)[None]
        warped = [
            nn.functional.grid_sample(
                x, grid + flow.permute(0, 2, 3, 1) * 0.1, align_corners=False, padding_mode="border"
            )
            for x, flow in ((first, found[:, :2]), (second, found[:, 2:4]))
        ]
        share = found[:, 4:].sigmoid()
        return warped[0] * share + warped[1] * (1 - share)


_IMAGE = {0: "batch", 2: "height", 3: "width"}

FAMILIES: Mapping[str, Builder] = {
    "superpoint": _superpoint,
    "depth_anything": _depth_anything,
    "pointnet": lambda: Built(module=_PointNet(), inputs={"points": torch.randn(BATCH, 3, 32)}, dynamic={"points": {0: "batch", 2: "places"}}),
    "pointnet2": lambda: Built(module=_PointNet2(), inputs={"points": torch.randn(BATCH, 24, 3)}, dynamic={"points": {0: "batch", 1: "places"}}),
    "voxelnet": _voxelnet,
    "nerf": _nerf,
    "gaussian_splat": _gaussian_splat,
    "swin2sr": _swin2sr,
    "style_transfer": lambda: Built(module=_Style(), inputs={"x": image(32)}, dynamic={"x": {0: "batch"}}),
    "frame_interpolation": lambda: Built(module=_Between(), inputs={"first": image(32), "second": image(32)}, dynamic={"first": _IMAGE, "second": _IMAGE}),
}  # fmt: skip
