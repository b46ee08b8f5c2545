"""Memory of a device that is given back and taken again, and tensors that are on it, on the host, or on both."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.errors import ModelError
from optkit.kernels.cuda import CudaError, Device

# Blocks are multiples of it, so that similar sizes share them; more than any alignment that code is promised.
_STEP = 512


class Pool:
    """Blocks of a device's memory; all work on them is on one stream, so a block is free once its last use is queued."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._free: dict[int, list[int]] = {}
        self._sizes: dict[int, int] = {}

    def take(self, size: int) -> int:
        """The address of at least ``size`` bytes.

        Raises:
            ModelError: The device has no room.
        """
        rounded = -(-max(size, 1) // _STEP) * _STEP
        if waiting := self._free.get(rounded):
            return waiting.pop()
        try:
            address = self.device.empty(rounded)
        except CudaError as error:
            raise ModelError(
                f"the device has no room for {rounded} bytes more: {error}", hint="run smaller batches"
            ) from error
        self._sizes[address] = rounded
        return address

    def give(self, address: int) -> None:
        """Take a block back."""
        self._free.setdefault(self._sizes[address], []).append(address)


class Block:
    """Device memory that goes back to its pool with the last reference to it."""

    def __init__(self, pool: Pool, size: int) -> None:
        self._pool = pool
        self.address = pool.take(size)

    def __del__(self) -> None:
        if hasattr(self, "address"):
            self._pool.give(self.address)


@dataclass(slots=True, kw_only=True)
class Tensor:
    """Numbers that lie on the host, on the device, or on both.

    Attributes:
        host: Address, or None while they are on the device alone.
        device: Address, or None while they are on the host alone.
        owners: What keeps the memory.
    """

    shape: tuple[int, ...]
    dtype: ir.DataType
    host: int | None = None
    device: int | None = None
    owners: list[Any]

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * int(self.dtype.itemsize)

    @classmethod
    def of(cls, array: np.ndarray, dtype: ir.DataType) -> Tensor:
        """On the host."""
        array = np.asarray(array, order="C")
        return cls(shape=array.shape, dtype=dtype, host=array.ctypes.data, owners=[array])

    @classmethod
    def empty(cls, pool: Pool, shape: tuple[int, ...], dtype: ir.DataType) -> Tensor:
        """On the device, with whatever was there before."""
        found = cls(shape=shape, dtype=dtype, owners=[])
        block = Block(pool, found.size)
        found.device = block.address
        found.owners.append(block)
        return found

    def to_device(self, pool: Pool) -> int:
        """The address on the device; copied there once."""
        if self.device is None:
            assert self.host is not None
            block = Block(pool, self.size)
            pool.device.copy_in(block.address, self.host, self.size)
            self.device = block.address
            self.owners.append(block)
        return self.device

    def to_host(self, pool: Pool) -> int:
        """The address on the host; copied there once, when the stream is done."""
        if self.host is None:
            assert self.device is not None
            room = np.empty(max(self.size, 1), np.uint8)
            pool.device.copy_out(room.ctypes.data, self.device, self.size)
            self.host = room.ctypes.data
            self.owners.append(room)
        return self.host

    def array(self, pool: Pool) -> np.ndarray:
        """A copy as NumPy has it, of what is on the device now where it is there."""
        if self.device is None:
            assert self.host is not None
            raw = ctypes.string_at(self.host, self.size)
        else:
            room = ctypes.create_string_buffer(max(self.size, 1))
            pool.device.copy_out(ctypes.addressof(room), self.device, self.size)
            raw = room.raw[: self.size]
        return np.frombuffer(raw, self.dtype.numpy()).reshape(self.shape).copy()
