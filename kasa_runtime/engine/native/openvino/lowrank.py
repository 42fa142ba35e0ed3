"""Low-rank branches beside a graph's linear layers: operations of our own (`lowrank.cpp`), on the
input and on the product of a layer, that add to each row the terms of its adapter. Where a product
goes into a residual sum or a gated activation alone, the operation does this too.

    y = x W^T + (x A^T) B^T - (x Q^T) P^T        A (r, in), B (out, r), Q (t, in), P (out, t)

The operations of all graphs of an executor read one table of pointers, so a change of adapters
touches neither a graph nor a factor.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from openvino.utils.node_factory import NodeFactory

from kasa_runtime.background import give_way
from kasa_runtime.engine.native.executor import NO_SLOT, PackedBatch, TailSource
from kasa_runtime.engine.native.openvino.linears import below_logit_rows
from kasa_runtime.engine.native.openvino.patterns import (
    biased,
    by_input,
    gated_pair,
    moves_data,
    readers,
    redirect,
    residual_sum,
)

if TYPE_CHECKING:
    from torch import Tensor

    from kasa_runtime.adapter.lora import AdapterWeights

Packed = Mapping[str, NDArray[np.float32]]
"""Weights in the layout of `product.hpp`, by layer."""

ALL_ROWS, LOGIT_ROWS = 0, 1
"""Which rows of a step an operation sees."""


class LowRank:
    """The table of terms and the operations that read it. `add` and `prepare` on any thread, all
    else on the step thread."""

    def __init__(
        self, library: Path, shapes: Mapping[str, tuple[int, int]], num_slots: int
    ) -> None:
        self._native = _load(library)
        self._factory = NodeFactory()
        self._factory.add_extension(library)
        self._num_slots = num_slots
        self._layers = {name: number for number, name in enumerate(shapes)}
        self.shapes = shapes
        self._held: dict[int, list[Tensor]] = {}  # by slot
        self._tails: dict[str, tuple[Tensor, Tensor]] = {}  # (q, p), the largest that was needed
        self._merged_slot = NO_SLOT
        # of every slot: what its rows need, and what they need while another one is merged; and
        # what the base's rows need then
        num_sets = 2 * num_slots + 1
        sizes = np.array(list(shapes.values()), np.int64)
        self._table = self._native.kasa_table_new(len(shapes), _pointer(sizes), num_sets)
        # With this object and not before: a load may be under way when the engine is closed.
        weakref.finalize(self, self._native.kasa_table_free, self._table).atexit = False

    def add(self, graph: Any, linears: Mapping[str, Any]) -> None:
        """Put the operations beside `linears`, the products by layer in the order of the graph,
        which has none yet."""
        gathered = below_logit_rows(graph, linears)
        groups = by_input(linears)
        shrunk: set[str] = set()
        for names in groups:
            step = LOGIT_ROWS if names[0] in gathered else ALL_ROWS
            if names[0] not in shrunk:
                self._add_shrink([linears[name] for name in names], names, step)
            rest = list(names)
            if pair := gated_pair({name: linears[name] for name in names}):
                gate, up, activated = pair
                reading = readers(activated, groups, linears)
                shrunk.update(reading)
                inputs = [biased(linears[name]) for name in (gate, up)]
                new = self.operation("ExpandGated", inputs, [gate, up], step, reading).output(0)
                redirect(activated.get_target_inputs(), new)
                rest = [name for name in names if name not in (gate, up)]
            for name in rest:
                self._add_expand(biased(linears[name]), name, step)
        graph.validate_nodes_and_infer_types()

    def _add_shrink(self, readers: list[Any], names: list[str], step: int) -> None:
        x = readers[0].input(0).get_source_output()
        if moves_data(x.get_node()):
            x = self._factory.create("Barrier", [x]).output(0)
        shrunk = self.operation("Shrink", [x], names, step).output(0)
        redirect([reader.input(0) for reader in readers], shrunk)

    def _add_expand(self, product: Any, name: str, step: int) -> None:
        if residual := residual_sum(product):
            total, other = residual
            new = self.operation("ExpandAdd", [product, other], [name], step).output(0)
            redirect(total.get_target_inputs(), new)
            return
        users = product.get_target_inputs()  # before the operation is one of them
        redirect(users, self.operation("Expand", [product], [name], step).output(0))

    def operation(
        self,
        kind: str,
        inputs: list[Any],
        names: list[str],
        step: int,
        reading: Iterable[str] = (),
        sizes: Iterable[int] = (),
    ) -> Any:
        """One of `lowrank.cpp` on these outputs, for the layers `names`."""
        attributes = {
            "table": self._table,
            "layers": [self._layers[name] for name in names],
            "next": [self._layers[name] for name in reading],
            "sizes": list(sizes),
            "step": step,
        }
        return self._factory.create(kind, inputs, attributes)

    def pack(self, weight: NDArray[np.float32], packed: NDArray[np.float32]) -> None:
        """`weight` (out, in) in the layout of the products, into memory of `packed_size`."""
        (out, in_features), strides = weight.shape, (step // 4 for step in weight.strides)
        self._native.kasa_pack(_pointer(weight), out, in_features, *strides, _pointer(packed))

    def fold(self, slot: int, pristine: Packed, merged: Packed) -> None:
        """Packed weights of these layers with the adapter of a slot, into `merged`, whose arrays
        may be those of `pristine`."""
        layers, to = self._pointers(merged)
        _, source = self._pointers({name: pristine[name] for name in merged})
        self._native.kasa_table_fold(
            self._table, slot, len(layers), *map(_pointer, (layers, source, to))
        )

    def use(self, packed: Packed) -> None:
        """These weights of these layers, from the next step on; the caller keeps the memory."""
        layers, addresses = self._pointers(packed)
        self._native.kasa_table_use(self._table, len(layers), *map(_pointer, (layers, addresses)))

    def _pointers(self, packed: Packed) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The numbers of layers and the addresses of their weights: one call for all of them, since
        a thread that comes back from one waits until it has the interpreter."""
        layers = np.array([self._layers[name] for name in packed], np.int64)
        return layers, np.array([_pointer(array) for array in packed.values()], np.int64)

    def prepare(self, slot: int, adapter: AdapterWeights, tails: TailSource) -> None:
        """Fill a slot that no row has; what a load that failed left in it goes."""
        self.forget(slot)
        held = self._held[slot] = []
        for name, delta in adapter.modules.items():
            give_way()
            a, b = _rows(delta.a), _rows(delta.b.T)
            self._append(name, slot, a, b, 1.0)
            held += [a, b]
            if delta.t:
                q, p = self._tail(name, delta.t, tails)
                self._append(name, slot, q, p, -1.0)
                held += [q, p]

    def forget(self, slot: int) -> list[Tensor]:
        """Empty a slot. Returns what it held, for the caller to drop: that takes a millisecond."""
        self._native.kasa_table_clear(self._table, slot)
        held = self._held.pop(slot, [])
        if not self._held:
            self._tails.clear()
        return held

    def merge(self, slot: int) -> None:
        """Rows get what distinguishes their adapter from the one in `slot`, which is in the
        weights; NO_SLOT: none is. Again after every change of adapters."""
        self._merged_slot = slot
        self._native.kasa_table_merge(self._table, self._num_slots, slot)

    def begin(self, batch: PackedBatch) -> None:
        """Give every row of the step its terms."""
        sets = [self._set(s.slot) for s in batch.sequences]
        rows = np.repeat(np.array(sets, np.int32), [s.num_tokens for s in batch.sequences])
        self._step(ALL_ROWS, rows)
        self._step(LOGIT_ROWS, rows[batch.logit_rows.numpy()])

    def _set(self, slot: int) -> int:
        if slot == self._merged_slot:
            return -1
        if self._merged_slot == NO_SLOT:
            return slot
        return 2 * self._num_slots if slot == NO_SLOT else self._num_slots + slot

    def _step(self, which: int, sets: NDArray[np.int32]) -> None:
        self._native.kasa_table_step(self._table, which, sets.ctypes.data, len(sets))

    def _append(self, name: str, slot: int, a: Tensor, b: Tensor, factor: float) -> None:
        rank, in_features = a.shape
        self._native.kasa_table_add(
            self._table, self._layers[name], slot, a.data_ptr(), in_features, b.data_ptr(),
            b.shape[1], rank, factor,
        )  # fmt: skip

    def _tail(self, name: str, t: int, tails: TailSource) -> tuple[Tensor, Tensor]:
        """q (t, in), p (t, out)"""
        held = self._tails.get(name)
        if held is None or len(held[0]) < t:
            tail = tails.get(name, t)
            held = self._tails[name] = _rows(tail.q), _rows(tail.p.T)
        q, p = held
        return q[-t:], p[-t:]


def _pointer(array: NDArray[Any]) -> int:
    return int(array.ctypes.data)


def _rows(x: Tensor) -> Tensor:
    return x.float().contiguous()


def _load(library: Path) -> Any:
    native = ctypes.CDLL(str(library))
    i64, pointer = ctypes.c_int64, ctypes.c_void_p
    native.kasa_table_new.restype = pointer
    native.kasa_table_new.argtypes = [i64, pointer, i64]
    native.kasa_table_use.argtypes = [pointer, i64, pointer, pointer]
    native.kasa_table_fold.argtypes = [pointer, i64, i64, pointer, pointer, pointer]
    native.kasa_pack.argtypes = [pointer, i64, i64, i64, i64, pointer]
    native.kasa_table_free.argtypes = [pointer]
    native.kasa_table_add.argtypes = [
        pointer, i64, i64, pointer, i64, pointer, i64, i64, ctypes.c_float
    ]  # fmt: skip
    native.kasa_table_clear.argtypes = [pointer, i64]
    native.kasa_table_merge.argtypes = [pointer, i64, i64]
    native.kasa_table_step.argtypes = [pointer, i64, pointer, i64]
    return native
