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

if TYPE_CHECKING:
    from torch import Tensor

    from kasa_runtime.adapter.lora import AdapterWeights

ALL_ROWS, LOGIT_ROWS = 0, 1
"""Which rows of a step an operation sees."""

RESHAPING = frozenset({"Reshape", "Squeeze", "Unsqueeze"})
MOVING = frozenset(
    {"Gather", "GatherElements", "GatherND", "Transpose", "Slice", "StridedSlice", "Concat"}
    | {"Split", "VariadicSplit", "Tile", "Broadcast", "ReverseSequence"}
)
"""What the plugin might let change places with an operation on rows."""


class LowRank:
    """The table of terms and the operations that read it. `add` and `prepare` on any thread, all
    else on the step thread."""

    def __init__(self, library: Path, layers: Iterable[str], num_slots: int) -> None:
        self._native = _load(library)
        self._factory = NodeFactory()
        self._factory.add_extension(library)
        self._num_slots = num_slots
        self._layers = {name: number for number, name in enumerate(layers)}
        self._held: dict[int, list[Tensor]] = {}  # by slot
        self._tails: dict[str, tuple[Tensor, Tensor]] = {}  # (q, p), the largest that was needed
        self._merged_slot = NO_SLOT
        # of every slot: what its rows need, and what they need while another one is merged; and
        # what the base's rows need then
        num_sets = 2 * num_slots + 1
        self._table = self._native.kasa_table_new(len(self._layers), num_sets)
        # With this object and not before: a load may be under way when the engine is closed.
        weakref.finalize(self, self._native.kasa_table_free, self._table).atexit = False

    def add(self, graph: Any, linears: Mapping[str, Any]) -> None:
        """Put the operations beside `linears`, the products by layer in the order of the graph,
        which has none yet."""
        gathered = below_logit_rows(graph, linears)
        groups = _by_input(linears)
        shrunk: set[str] = set()
        for names in groups:
            step = LOGIT_ROWS if names[0] in gathered else ALL_ROWS
            if names[0] not in shrunk:
                self._add_shrink([linears[name] for name in names], names, step)
            rest = list(names)
            if pair := _gated_pair({name: linears[name] for name in names}):
                gate, up, activated = pair
                reading = _readers(activated, groups, linears)
                shrunk.update(reading)
                inputs = [_biased(linears[name]) for name in (gate, up)]
                new = self._operation("ExpandGated", inputs, [gate, up], step, reading)
                _redirect(activated.get_target_inputs(), new)
                rest = [name for name in names if name not in (gate, up)]
            for name in rest:
                self._add_expand(_biased(linears[name]), name, step)
        graph.validate_nodes_and_infer_types()

    def _add_shrink(self, readers: list[Any], names: list[str], step: int) -> None:
        x = readers[0].input(0).get_source_output()
        if _moves_data(x.get_node()):
            x = self._factory.create("Barrier", [x]).output(0)
        shrunk = self._operation("Shrink", [x], names, step)
        _redirect([reader.input(0) for reader in readers], shrunk)

    def _add_expand(self, product: Any, name: str, step: int) -> None:
        if residual := _residual_sum(product):
            total, other = residual
            new = self._operation("ExpandAdd", [product, other], [name], step)
            _redirect(total.get_target_inputs(), new)
            return
        users = product.get_target_inputs()  # before the operation is one of them
        _redirect(users, self._operation("Expand", [product], [name], step))

    def _operation(
        self, kind: str, inputs: list[Any], names: list[str], step: int, reading: Iterable[str] = ()
    ) -> Any:
        attributes = {
            "table": self._table,
            "layers": [self._layers[name] for name in names],
            "next": [self._layers[name] for name in reading],
            "step": step,
        }
        return self._factory.create(kind, inputs, attributes).output(0)

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


def _rows(x: Tensor) -> Tensor:
    return x.float().contiguous()


def _moves_data(node: Any) -> bool:
    """Whether a node, or one that it only gives another shape, changes the places of rows or
    features."""
    while node.get_type_name() in RESHAPING:
        node = node.input(0).get_source_output().get_node()
    return node.get_type_name() in MOVING


def _by_input(linears: Mapping[str, Any]) -> list[list[str]]:
    """Layers that read the same output, in order."""
    groups: list[tuple[Any, list[str]]] = []
    for name, node in linears.items():
        x = node.input(0).get_source_output()
        if groups and groups[-1][0] == x:
            groups[-1][1].append(name)
        else:
            groups.append((x, [name]))
    return [names for _, names in groups]


def _readers(x: Any, groups: list[list[str]], linears: Mapping[str, Any]) -> list[str]:
    """The layers that read `x`, if nothing else does."""
    for names in groups:
        if linears[names[0]].input(0).get_source_output() == x:
            return names if len(x.get_target_inputs()) == len(names) else []
    return []


def _only_user(output: Any) -> Any:
    """The node that alone reads an output, once; None where there are others."""
    users = list(output.get_target_inputs())
    return users[0].get_node() if len(users) == 1 else None


def _other_input(node: Any, output: Any) -> Any:
    a, b = (i.get_source_output() for i in node.inputs())
    return b if a == output else a


def _biased(linear: Any) -> Any:
    """The layer's output: of the product, or of the sum with its bias."""
    product = linear.output(0)
    user = _only_user(product)
    if user is None or user.get_type_name() != "Add":
        return product
    bias = _other_input(user, product).get_node().get_type_name() == "Constant"
    return user.output(0) if bias and _same_shape(user.output(0), product) else product


def _same_shape(a: Any, b: Any) -> bool:
    return bool(a.get_partial_shape() == b.get_partial_shape())


def _residual_sum(product: Any) -> tuple[Any, Any] | None:
    """The sum that a product goes into, and what it is added to there."""
    user = _only_user(product)
    if user is None or user.get_type_name() != "Add":
        return None
    other = _other_input(user, product)
    same = _same_shape(other, product) and _same_shape(user.output(0), product)
    return (user.output(0), other) if same and other != product else None


def _gated_pair(linears: Mapping[str, Any]) -> tuple[str, str, Any] | None:
    """(gate, up, silu(gate) up) where two of the layers are used for nothing else."""
    outputs = {name: _biased(linear) for name, linear in linears.items()}
    for gate, output in outputs.items():
        silu = _only_user(output)
        if silu is None or not _is_silu(silu):
            continue
        product = _only_user(silu.output(0))
        if product is None or product.get_type_name() != "Multiply":
            continue
        other = _other_input(product, silu.output(0))
        for up, candidate in outputs.items():
            if candidate == other and up != gate and _only_user(other) is not None:
                return (gate, up, product.output(0)) if _same_shape(output, other) else None
    return None


def _is_silu(node: Any) -> bool:
    if node.get_type_name() != "Swish":
        return False
    betas = [i.get_source_output().get_node() for i in node.inputs()[1:]]
    return all(b.get_type_name() == "Constant" and b.get_data() == 1 for b in betas)


def _redirect(inputs: Iterable[Any], source: Any) -> None:
    """Let inputs read another output."""
    for reading in inputs:
        reading.replace_source_output(source)


def _load(library: Path) -> Any:
    native = ctypes.CDLL(str(library))
    i64, pointer = ctypes.c_int64, ctypes.c_void_p
    native.kasa_table_new.restype = pointer
    native.kasa_table_new.argtypes = [i64, i64]
    native.kasa_table_free.argtypes = [pointer]
    native.kasa_table_add.argtypes = [
        pointer, i64, i64, pointer, i64, pointer, i64, i64, ctypes.c_float
    ]  # fmt: skip
    native.kasa_table_clear.argtypes = [pointer, i64]
    native.kasa_table_merge.argtypes = [pointer, i64, i64]
    native.kasa_table_step.argtypes = [pointer, i64, pointer, i64]
    return native
