"""The format's reader and writer: PEFT's adapters and the authors', ours, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
import struct
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapter.conftest import PEFT_OPTIONS
from adapter.making import (
    ALL_LINEAR,
    LAYER,
    edit_json,
    edit_tensors,
    load_base,
    logits_by_merging,
    logits_of,
    make_adapter,
    write_adapter,
)
from kasa_runtime.adapter import checkpoint
from kasa_runtime.adapter.checkpoint import CARD_FILE, CONFIG_FILE, META_FILE, WEIGHTS_FILE
from kasa_runtime.adapter.config import AdapterMeta
from kasa_runtime.adapter.kasa import TruncationRule, scaling
from kasa_runtime.adapter.lora import Adapter
from kasa_runtime.errors import AdapterInvalid, BaseMismatch
from kasa_runtime.types import AdapterMethod

A, B, DIAG = (
    f"base_model.model.{LAYER}.{part}" for part in ("lora_A.weight", "lora_B.weight", "lora_diag")
)


@pytest.fixture
def kasa(base, tmp_path) -> Path:
    """One of our adapters, on LAYER alone; to be damaged by tests."""
    return write_adapter(tmp_path / "adapter", base)


@pytest.fixture
def from_peft(peft_adapter, tmp_path):
    """A copy, to be damaged by tests, of an adapter that PEFT made."""
    return lambda name: Path(shutil.copytree(peft_adapter(name).directory, tmp_path / name))


def assert_same(got: Adapter, want: Adapter) -> None:
    assert (got.config, got.meta) == (want.config, want.meta)
    assert got.truncation == want.truncation
    assert got.modules.keys() == want.modules.keys()
    for name, weights in want.modules.items():
        assert torch.equal(got.modules[name].a, weights.a)
        assert torch.equal(got.modules[name].b, weights.b)
        if weights.diag is None:
            assert got.modules[name].diag is None
        else:
            assert torch.equal(got.modules[name].diag, weights.diag)


class TestPeftsFormat:
    @pytest.mark.parametrize("name", PEFT_OPTIONS)
    def test_gives_pefts_logits_on_the_untouched_base(self, base, tails, peft_adapter, name):
        made = peft_adapter(name)
        adapter = checkpoint.read(made.directory, base)
        got = logits_by_merging(base.directory, adapter, tails)
        assert (made.logits - logits_of(load_base(base.directory))).abs().max() > 0.1
        torch.testing.assert_close(got, made.logits, atol=1e-4, rtol=0)

    def test_kasa_config_means_the_min_dim_rule_at_each_layers_rank(self, base, peft_adapter):
        adapter = checkpoint.read(peft_adapter("kasa_patterns").directory, base)
        assert adapter.method is AdapterMethod.KASA
        assert adapter.meta.truncation_rule is TruncationRule.MIN_DIM
        assert adapter.truncation["model.layers.0.self_attn.q_proj"] == 2
        assert adapter.truncation["model.layers.1.mlp.up_proj"] == 6
        assert adapter.truncation["model.layers.1.mlp.down_proj"] == 4

    def test_lora_has_no_tail(self, base, peft_adapter):
        adapter = checkpoint.read(peft_adapter("lora").directory, base)
        assert adapter.method is AdapterMethod.LORA
        assert set(adapter.truncation.values()) == {0}
        assert len(adapter.modules) == 21  # all-linear leaves the output embeddings out

    def test_needs_no_more_than_the_keys_that_peft_needs(self, base, from_peft):
        directory = from_peft("kasa_rectangular")
        want = checkpoint.read(directory, base)
        raw = json.loads((directory / CONFIG_FILE).read_text())
        keys = ("peft_type", "r", "lora_alpha", "target_modules", "kasa_config")
        (directory / CONFIG_FILE).write_text(json.dumps({key: raw[key] for key in keys}))
        assert checkpoint.read(directory, base).truncation == want.truncation

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_any_floating_dtype_is_read_as_float32(self, base, from_peft, dtype):
        directory = from_peft("lora")
        want = checkpoint.read(directory, base).modules[LAYER]
        edit_tensors(directory, lambda ts: ts.update({k: v.to(dtype) for k, v in ts.items()}))
        got = checkpoint.read(directory, base).modules[LAYER]
        assert got.a.dtype == torch.float32
        assert torch.equal(got.a, want.a.to(dtype).float())


class TestAuthorsFormat:
    """lora_diag and no kasa_config: the rule is `in_features`."""

    def authors(self, directory: Path) -> Path:
        edit_json(directory / CONFIG_FILE, kasa_config=None)
        return directory

    def direct(self, base, directory: Path) -> torch.Tensor:
        """Logits by the authors' code: keep `in_features - r` components, add s B core A."""
        tensors, model = load_file(directory / WEIGHTS_FILE), load_base(base.directory)
        for key in (k for k in tensors if k.endswith("lora_diag")):
            prefix = key.removesuffix("lora_diag")
            a, b = tensors[f"{prefix}lora_A.weight"], tensors[f"{prefix}lora_B.weight"]
            core = tensors[key] if tensors[key].ndim == 2 else torch.diag(tensors[key])
            layer = model.get_submodule(prefix.removeprefix("base_model.model.").rstrip("."))
            u, s, vh = torch.linalg.svd(layer.weight.data.double(), full_matrices=False)
            keep = layer.in_features - a.shape[0]
            world = (u[:, :keep] * s[:keep]) @ vh[:keep]
            update = scaling(8, 4) * b.double() @ core.double() @ a.double()
            layer.weight.data = (world + update).float()
        return logits_of(model)

    def test_is_applied_by_their_rule(self, base, tails, from_peft):
        directory = self.authors(from_peft("kasa"))
        adapter = checkpoint.read(directory, base)
        got = logits_by_merging(base.directory, adapter, tails)
        torch.testing.assert_close(got, self.direct(base, directory), atol=1e-4, rtol=0)

    def test_differs_from_pefts_rule(self, base, tails, from_peft, peft_adapter):
        adapter = checkpoint.read(self.authors(from_peft("kasa")), base)
        got = logits_by_merging(base.directory, adapter, tails)
        assert (got - peft_adapter("kasa").logits).abs().max() > 1e-3

    def test_cuts_nothing_where_the_layer_is_wide_enough(self, base, from_peft):
        adapter = checkpoint.read(self.authors(from_peft("kasa")), base)
        layer = "model.layers.0"
        assert adapter.method is AdapterMethod.KASA
        assert adapter.meta.truncation_rule is TruncationRule.IN_FEATURES
        assert adapter.truncation[f"{layer}.self_attn.q_proj"] == 4
        assert adapter.truncation[f"{layer}.mlp.gate_proj"] == 4
        assert adapter.truncation[f"{layer}.self_attn.k_proj"] == 0
        assert adapter.truncation[f"{layer}.mlp.down_proj"] == 0

    def test_dense_core_of_the_first_release_is_read(self, base, tails, from_peft):
        directory = self.authors(from_peft("kasa"))

        def make_dense(tensors):
            for key in (k for k in tensors if k.endswith("lora_diag")):
                tensors[key] = torch.diag(tensors[key]) + 0.3 * torch.randn(4, 4)

        edit_tensors(directory, make_dense)
        adapter = checkpoint.read(directory, base)
        assert adapter.modules[LAYER].diag.shape == (4,)
        got = logits_by_merging(base.directory, adapter, tails)
        torch.testing.assert_close(got, self.direct(base, directory), atol=1e-4, rtol=0)

    def test_dense_core_survives_our_own_round_trip(self, base, kasa, tmp_path):
        edit_tensors(kasa, lambda tensors: tensors.update({DIAG: torch.randn(4, 4)}))
        adapter = checkpoint.read(kasa, base)
        checkpoint.write(tmp_path / "again", adapter)
        assert_same(checkpoint.read(tmp_path / "again", base), adapter)


OURS = {
    "kasa": {"targets": ALL_LINEAR},
    "one layer": {},
    "regex": {"targets": r".*\.mlp\..*_proj"},
    "lora": {"targets": ALL_LINEAR, "kasa": False},
    "patterns": {
        "targets": ALL_LINEAR,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"k_proj": 2.5},
        "use_rslora": True,
    },
}
NOT_PEFTS = {
    "other truncation rank": {"truncation_rank": 2},
    "no truncation": {"rule": TruncationRule.NONE},
    "authors' rule": {"rule": TruncationRule.IN_FEATURES},
}


class TestOurFormat:
    @pytest.mark.parametrize("options", (OURS | NOT_PEFTS).values(), ids=OURS | NOT_PEFTS)
    def test_reads_as_it_was_written(self, base, tmp_path, options):
        want = make_adapter(base, base_fingerprint=base.fingerprint, **options)
        checkpoint.write(tmp_path / "a", want, readme="# About")
        assert_same(checkpoint.read(tmp_path / "a", base), want)
        assert {path.name for path in (tmp_path / "a").iterdir()} == set(checkpoint.FILES)
        assert (tmp_path / "a" / CARD_FILE).read_text() == "# About"

    @pytest.mark.parametrize("options", OURS.values(), ids=OURS)
    def test_peft_loads_it_silently_and_computes_the_same(
        self, base, tails, tmp_path, options, caplog
    ):
        from peft import PeftModel

        adapter = make_adapter(base, **options)
        checkpoint.write(tmp_path / "a", adapter)
        model = load_base(base.directory)
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
            warnings.simplefilter("error")
            model = PeftModel.from_pretrained(model, tmp_path / "a")
        assert not caplog.records
        torch.testing.assert_close(
            logits_by_merging(base.directory, adapter, tails), logits_of(model), atol=1e-4, rtol=0
        )

    @pytest.mark.parametrize("options", NOT_PEFTS.values(), ids=NOT_PEFTS)
    def test_what_peft_would_truncate_otherwise_peft_refuses(self, base, tmp_path, options):
        from peft import PeftModel

        adapter = make_adapter(base, ALL_LINEAR, **options)
        assert not checkpoint.peft_can_serve(adapter)
        checkpoint.write(tmp_path / "a", adapter)
        assert json.loads((tmp_path / "a" / CONFIG_FILE).read_text())["peft_type"] == "KASA"
        with pytest.raises((KeyError, ValueError)):
            PeftModel.from_pretrained(load_base(base.directory), tmp_path / "a")

    def test_truncation_rank_of_single_layers_counts(self, base, tmp_path):
        adapter = make_adapter(base, ("q_proj",))
        other = Adapter(
            adapter.config,
            AdapterMeta(TruncationRule.MIN_DIM, truncation_ranks={LAYER: 1}),
            adapter.modules,
        )
        assert checkpoint.peft_can_serve(adapter) and not checkpoint.peft_can_serve(other)
        checkpoint.write(tmp_path / "a", other)
        truncation = checkpoint.read(tmp_path / "a", base).truncation
        assert truncation.pop(LAYER) == 1
        assert set(truncation.values()) == {4}

    def test_is_written_in_the_dtype_asked_for(self, base, tmp_path):
        adapter = make_adapter(base)
        checkpoint.write(tmp_path / "a", adapter, dtype=torch.bfloat16)
        stored = load_file(tmp_path / "a" / WEIGHTS_FILE)
        assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
        got = checkpoint.read(tmp_path / "a", base).modules[LAYER].a
        assert torch.equal(got, adapter.modules[LAYER].a.bfloat16().float())

    def test_is_written_over_an_older_one(self, base, kasa):
        new = make_adapter(base, seed=1)
        checkpoint.write(kasa, new)
        assert_same(checkpoint.read(kasa, base), new)
        assert not [path for path in kasa.iterdir() if path.name.startswith(".")]

    def test_tensors_that_share_memory_or_are_views_are_written(self, base, tmp_path):
        adapter = make_adapter(base)
        w = adapter.modules[LAYER]
        turned = type(w)(w.a.T.contiguous().T, w.a.T[:64], w.diag)
        checkpoint.write(
            tmp_path / "a", Adapter(adapter.config, adapter.meta, {LAYER: turned}, {LAYER: 4})
        )
        got = checkpoint.read(tmp_path / "a", base).modules[LAYER]
        assert torch.equal(got.a, w.a) and torch.equal(got.b, w.a.T)

    def test_file_is_marked_as_pefts_are(self, kasa):
        with safe_open(kasa / WEIGHTS_FILE, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            assert set(handle.keys()) == {A, B, DIAG}


class TestRefusedTensors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda ts: ts.update({"base_model.model.x.lora_magnitude_vector": torch.ones(4)}),
                r"unknown tensor base_model\.model\.x\.lora_magnitude_vector; want .*lora_A",
            ),
            (lambda ts: ts.update({"lm_head.weight": torch.ones(4)}), "unknown tensor lm_head"),
            (
                lambda ts: ts.update({B.replace("weight", "bias"): torch.ones(64)}),
                r"unknown tensor .*lora_B\.bias",
            ),
            (
                lambda ts: ts.update({A.replace(".weight", ".default.weight"): ts.pop(A)}),
                r"unknown tensor .*lora_A\.default\.weight",
            ),
            (lambda ts: ts.pop(A), rf"{LAYER}: lora_A\.weight is missing"),
            (lambda ts: ts.pop(B), rf"{LAYER}: lora_B\.weight is missing"),
            (lambda ts: ts.pop(DIAG), rf"{LAYER}: lora_diag is missing"),
            (
                lambda ts: (ts.pop(A), ts.pop(B)),
                rf"{LAYER}: lora_A\.weight, lora_B\.weight is missing",
            ),
            (
                lambda ts: ts.update({A: torch.ones(5, 64)}),
                rf"{LAYER}\.lora_A\.weight has shape \(5, 64\), want \(4, 64\) for r = 4",
            ),
            (lambda ts: ts.update({A: torch.ones(4, 63)}), r"shape \(4, 63\), want \(4, 64\)"),
            (lambda ts: ts.update({A: torch.ones(256)}), r"shape \(256,\), want \(4, 64\)"),
            (lambda ts: ts.update({B: torch.ones(4, 64)}), r"shape \(4, 64\), want \(64, 4\)"),
            (lambda ts: ts.update({DIAG: torch.ones(3)}), r"shape \(3,\), want \(4,\)"),
            (lambda ts: ts.update({DIAG: torch.ones(4, 3)}), r"shape \(4, 3\), want \(4, 4\)"),
            (lambda ts: ts.update({DIAG: torch.ones(4, 4, 1)}), r"want \(4,\)"),
            (lambda ts: ts.update({DIAG: torch.tensor(1.0)}), r"shape \(\), want \(4,\)"),
            (lambda ts: ts[A].view(-1)[7:8].fill_(torch.nan), f"{A} holds NaN or infinite"),
            (lambda ts: ts[B].view(-1)[7:8].fill_(torch.inf), f"{B} holds NaN or infinite"),
            (lambda ts: ts[DIAG].view(-1)[:1].fill_(-torch.inf), f"{DIAG} holds NaN or infinite"),
            (lambda ts: ts.update({A: ts[A].to(torch.int8)}), f"{A} has dtype torch.int8, want"),
            (lambda ts: ts.update({A: ts[A].bool()}), "has dtype torch.bool"),
            (lambda ts: ts.update({A: ts[A].to(torch.float8_e4m3fn)}), "dtype torch.float8"),
            (lambda ts: ts.clear(), "holds no tensors"),
        ],
    )
    def test_names_the_tensor_and_what_was_wanted(self, base, kasa, change, message):
        edit_tensors(kasa, change)
        with pytest.raises(AdapterInvalid, match=message):
            checkpoint.read(kasa, base)

    def test_values_that_overflow_float32_are_refused(self, base, kasa):
        edit_tensors(kasa, lambda ts: ts.update({A: ts[A].double() * 1e300}))
        with pytest.raises(AdapterInvalid, match=f"{A} holds NaN or infinite"):
            checkpoint.read(kasa, base)

    def test_layer_that_the_base_has_not(self, base, kasa):
        far = {A: A.replace("layers.0", "layers.9"), B: B.replace("layers.0", "layers.9")}
        far[DIAG] = DIAG.replace("layers.0", "layers.9")
        edit_tensors(kasa, lambda ts: ts.update({far[k]: ts[k].clone() for k in far}))
        with pytest.raises(AdapterInvalid, match=r"no linear layer model\.layers\.9\."):
            checkpoint.read(kasa, base)

    def test_embeddings_are_no_linear_layer(self, base, kasa):
        edit_tensors(
            kasa,
            lambda ts: ts.update(
                {k.replace(LAYER, "model.embed_tokens"): ts.pop(k) for k in (A, B, DIAG)}
            ),
        )
        with pytest.raises(AdapterInvalid, match=r"no linear layer model\.embed_tokens"):
            checkpoint.read(kasa, base)

    def test_target_without_tensors_is_an_incomplete_file(self, base, from_peft):
        directory = from_peft("kasa")
        edit_tensors(directory, lambda ts: [ts.pop(k) for k in list(ts) if "layers.2.mlp" in k])
        message = r"names 3 layers that have no tensors, the first is model\.layers\.2\.mlp\.gate"
        with pytest.raises(AdapterInvalid, match=message):
            checkpoint.read(directory, base)

    def test_rank_as_large_as_the_layer(self, base, from_peft):
        directory = from_peft("kasa_rectangular")

        def widen(ts):
            for key, tensor in ts.items():
                dim = {"t": 0, "g": 0}.get(key[-1]) if "lora_B" not in key else 1
                ts[key] = torch.cat([tensor] * 4, dim=dim)

        edit_tensors(directory, widen)
        edit_json(directory / CONFIG_FILE, r=32)
        with pytest.raises(AdapterInvalid, match=r"k_proj: truncation rank must be from 0 to 31"):
            checkpoint.read(directory, base)

    def test_nothing_is_served_of_an_adapter_with_one_bad_layer(self, base, from_peft):
        directory = from_peft("kasa")
        edit_tensors(directory, lambda ts: ts[A.replace("layers.0", "layers.2")].fill_(torch.nan))
        with pytest.raises(AdapterInvalid, match=r"layers\.2"):
            checkpoint.read(directory, base)


class TestRefusedConfigs:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"modules_to_save": ["lm_head"]},
                "modules_to_save names lm_head, but lm_head.weight is",
            ),
            ({"modules_to_save": ["haed"]}, r"\['haed'\], the base has no such module"),
            ({"modules_to_save": 3}, "modules_to_save must be a list of strings"),
            ({"use_dora": True}, "use_dora = True cannot be applied exactly"),
            ({"bias": "all"}, "bias"),
            ({"init_lora_weights": "pissa"}, "'pissa' rewrote the base"),
            ({"invented_in_2030": 3}, "invented_in_2030 = 3"),
            ({"r": 0}, "r must be an integer from 1, got 0"),
            ({"r": 5}, r"has shape \(4, 64\), want \(5, 64\) for r = 5"),
            ({"rank_pattern": {"q_proj": 2}}, r"has shape \(4, 64\), want \(2, 64\) for r = 2"),
            ({"target_modules": ["q_proj", "v_proj"]}, "names 5 layers that have no tensors"),
            ({"target_modules": r"(?:(?:.|..)+)+(?:!|\?)"}, "takes too long"),
            ({"rank_pattern": {"(" * 9999: 4}}, "is not a regular expression"),
        ],
    )
    def test_names_the_key_and_what_was_found(self, base, kasa, changes, message):
        edit_json(kasa / CONFIG_FILE, **changes)
        with pytest.raises(AdapterInvalid, match=message):
            checkpoint.read(kasa, base)

    def test_peft_dora_adapter_is_refused(self, base, tmp_path):
        from adapter.making import make_with_peft

        options = {"r": 4, "target_modules": ["k_proj"], "use_dora": True}
        made = make_with_peft(base.directory, tmp_path / "dora", options)
        with pytest.raises(AdapterInvalid, match="use_dora"):
            checkpoint.read(made.directory, base)

    @pytest.mark.parametrize("file", [CONFIG_FILE, META_FILE])
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "is missing or not JSON"),
            (b"{", "is missing or not JSON"),
            (b"\xff\xfe{}", "is missing or not JSON"),
            (b"[" * 100_000, "is missing or not JSON"),
            (b"[]", "want a JSON object, got list"),
            (b'"text"', "want a JSON object, got str"),
            (b"null", "want a JSON object, got NoneType"),
            (b'{"x": "' + b"y" * (1 << 20) + b'"}', "is larger than 1048576 bytes"),
            (b'{"\\ud800": 1}', "is missing or not JSON"),
        ],
    )
    def test_file_that_is_no_json_object(self, base, kasa, file, data, message):
        (kasa / file).write_bytes(data)
        with pytest.raises(AdapterInvalid, match=rf"{file}:? {message}"):
            checkpoint.read(kasa, base)

    def test_config_is_required(self, base, kasa):
        (kasa / CONFIG_FILE).unlink()
        with pytest.raises(AdapterInvalid, match=rf"{CONFIG_FILE} is missing"):
            checkpoint.read(kasa, base)

    def test_config_may_not_be_a_directory(self, base, kasa):
        (kasa / CONFIG_FILE).unlink()
        (kasa / CONFIG_FILE).mkdir()
        with pytest.raises(AdapterInvalid, match=CONFIG_FILE):
            checkpoint.read(kasa, base)


class TestRefusedSidecars:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"format_version": 2}, "want format_version 1, got 2"),
            ({"truncation_rule": "most"}, "got 'most'"),
            ({"truncation_rank": 64}, rf"{LAYER}: truncation rank must be from 0 to 63 .*got 64"),
            ({"truncation_ranks": {LAYER: 99}}, "got 99"),
        ],
    )
    def test_names_the_key_and_what_was_found(self, base, kasa, changes, message):
        edit_json(kasa / META_FILE, **changes)
        with pytest.raises(AdapterInvalid, match=message):
            checkpoint.read(kasa, base)

    def test_a_truncation_beside_a_plain_lora(self, base, kasa):
        edit_json(kasa / CONFIG_FILE, kasa_config=None)
        tensors = {k: v for k, v in load_file(kasa / WEIGHTS_FILE).items() if "diag" not in k}
        save_file(tensors, kasa / WEIGHTS_FILE)
        with pytest.raises(AdapterInvalid, match=r"truncation_rule min_dim.*a plain LoRA"):
            checkpoint.read(kasa, base)

    def test_made_for_other_weights(self, base, kasa):
        edit_json(kasa / META_FILE, base_fingerprint="ab" * 32)
        with pytest.raises(BaseMismatch, match=rf"abababab.*this base is {base.fingerprint[:16]}"):
            checkpoint.read(kasa, base)

    def test_own_base_is_taken(self, base, kasa):
        edit_json(kasa / META_FILE, base_fingerprint=base.fingerprint)
        assert checkpoint.read(kasa, base).meta.base_fingerprint == base.fingerprint

    def test_unknown_base_is_taken(self, base, kasa):
        edit_json(kasa / META_FILE, base_fingerprint=None)
        assert checkpoint.read(kasa, base).meta.base_fingerprint == ""

    def test_peft_type_kasa_means_nothing_without_it(self, base, tmp_path):
        directory = write_adapter(tmp_path / "a", base, truncation_rank=2)
        (directory / META_FILE).unlink()
        with pytest.raises(AdapterInvalid, match=rf'"KASA" needs {META_FILE}'):
            checkpoint.read(directory, base)


class TestDamagedFiles:
    def test_torn_at_any_point(self, base, kasa):
        path = kasa / WEIGHTS_FILE
        data = path.read_bytes()
        (header,) = struct.unpack("<Q", data[:8])
        points = {0, 1, 7, 8, 9, 8 + header // 2, 8 + header - 1, 8 + header, 8 + header + 1}
        points |= set(range(8 + header, len(data), 97)) | {len(data) - 4, len(data) - 1}
        for keep in sorted(points):
            path.write_bytes(data[:keep])
            with pytest.raises(AdapterInvalid, match=f"{WEIGHTS_FILE} is torn or not"):
                checkpoint.read(kasa, base)

    def test_file_that_is_overwritten_later_changes_nothing(self, base, kasa):
        adapter = checkpoint.read(kasa, base)
        want = [tensor.clone() for tensor in vars(adapter.modules[LAYER]).values()]
        path = kasa / WEIGHTS_FILE
        with path.open("r+b") as stream:
            stream.write(b"\x7f" * path.stat().st_size)
        for got, tensor in zip(vars(adapter.modules[LAYER]).values(), want, strict=True):
            assert torch.equal(got, tensor)

    def test_with_bytes_appended(self, base, kasa):
        with (kasa / WEIGHTS_FILE).open("ab") as stream:
            stream.write(b"more")
        with pytest.raises(AdapterInvalid, match="is torn or not"):
            checkpoint.read(kasa, base)

    @given(data=st.binary(max_size=200))
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_random_bytes(self, base, kasa, data):
        (kasa / WEIGHTS_FILE).write_bytes(data)
        with pytest.raises(AdapterInvalid):
            checkpoint.read(kasa, base)

    @given(data=st.data())
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
    def test_flipped_header_bits_are_refused_or_harmless(self, base, kasa, data):
        good = (kasa / WEIGHTS_FILE).read_bytes()
        (header,) = struct.unpack("<Q", good[:8])
        damaged = bytearray(good)
        damaged[data.draw(st.integers(0, 7 + header))] ^= 1 << data.draw(st.integers(0, 7))
        (kasa / WEIGHTS_FILE).write_bytes(damaged)
        try:
            checkpoint.read(kasa, base)
        except AdapterInvalid:
            pass
        finally:
            (kasa / WEIGHTS_FILE).write_bytes(good)

    def test_enormous_header(self, base, kasa):
        (kasa / WEIGHTS_FILE).write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
        with pytest.raises(AdapterInvalid, match="is torn or not"):
            checkpoint.read(kasa, base)

    def test_missing(self, base, kasa):
        (kasa / WEIGHTS_FILE).unlink()
        with pytest.raises(AdapterInvalid, match=f"want {WEIGHTS_FILE}, it is missing"):
            checkpoint.read(kasa, base)

    @pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "weights.pkl"])
    def test_pickle_is_never_loaded(self, base, kasa, name):
        tensors = load_file(kasa / WEIGHTS_FILE)
        (kasa / WEIGHTS_FILE).unlink()
        torch.save(tensors, kasa / name)
        with pytest.raises(AdapterInvalid, match=f"found {name}, a pickle, which is never loaded"):
            checkpoint.read(kasa, base)

    def test_pickle_under_the_name_of_safetensors(self, base, kasa):
        torch.save(make_adapter(base).modules[LAYER].a, kasa / WEIGHTS_FILE)
        with pytest.raises(AdapterInvalid, match="is torn or not"):
            checkpoint.read(kasa, base)

    def test_empty_directory(self, base, tmp_path):
        with pytest.raises(AdapterInvalid, match=WEIGHTS_FILE):
            checkpoint.read(tmp_path, base)

    def test_crash_while_writing_leaves_each_file_whole(self, base, kasa, monkeypatch):
        old = {path.name: path.read_bytes() for path in kasa.iterdir()}
        replace = Path.replace

        def crash_at_the_config(self: Path, target: Path) -> Path:
            if target.name == CONFIG_FILE:
                raise KeyboardInterrupt
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", crash_at_the_config)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.write(kasa, make_adapter(base, r=8, seed=1))
        assert (kasa / CONFIG_FILE).read_bytes() == old[CONFIG_FILE]
        assert load_file(kasa / WEIGHTS_FILE)[A].shape == (8, 64)
