"""adapter_config.json and kasa_meta.json: what is applied, what is refused, by name."""

from __future__ import annotations

import json
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kasa_runtime.adapter.config import (
    AdapterConfig,
    AdapterMeta,
    config_json,
    meta_json,
    parse_config,
    parse_meta,
)
from kasa_runtime.adapter.kasa import TruncationRule
from kasa_runtime.errors import AdapterInvalid
from kasa_runtime.types import AdapterMethod

RAW = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "v_proj"],
    "kasa_config": {"beta": 0.5, "gamma": 0.25},
}
META = {"format_version": 1, "truncation_rule": "min_dim"}
Q, V = "model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.v_proj"


def parse(**changes: object) -> AdapterConfig:
    return parse_config(RAW | changes, has_diagonal=True)


def meta(**changes: object) -> AdapterMeta:
    return parse_meta(META | changes, has_kasa_config=True, has_diagonal=True)


class TestMethod:
    @pytest.mark.parametrize("kasa_config", [{}, {"beta": 1}, {"beta": 1e-4, "gamma": 1e-3}])
    def test_kasa_config_makes_it_kasa_even_empty(self, kasa_config):
        assert parse(kasa_config=kasa_config).method is AdapterMethod.KASA

    def test_diagonal_without_kasa_config_is_the_authors_kasa(self):
        raw = RAW | {"kasa_config": None}
        assert parse_config(raw, has_diagonal=True).method is AdapterMethod.KASA

    def test_neither_is_plain_lora(self):
        raw = {key: value for key, value in RAW.items() if key != "kasa_config"}
        assert parse_config(raw, has_diagonal=False).method is AdapterMethod.LORA

    def test_regularisers_default_to_pefts(self):
        assert (parse(kasa_config={}).beta, parse(kasa_config={}).gamma) == (1e-4, 1e-3)
        assert (parse().beta, parse().gamma) == (0.5, 0.25)


class TestPatterns:
    """PEFT's rule: the first pattern that matches the end of the path, whole components."""

    @pytest.mark.parametrize(
        ("pattern", "hits"),
        [
            ("q_proj", True),
            ("self_attn.q_proj", True),
            (r"layers\.3\..*", True),
            (r"^model\.layers\.3\.self_attn\.q_proj", True),
            ("q_proj|k_proj", True),
            ("proj", False),  # not a whole component
            ("model", False),  # not the end
            ("^self_attn.q_proj", False),
        ],
    )
    def test_pattern_is_matched_as_peft_does(self, pattern, hits):
        from peft.utils.other import get_pattern_key

        assert (get_pattern_key([pattern], Q) == pattern) is hits
        assert parse(rank_pattern={pattern: 2}).rank_of(Q) == (2 if hits else 8)

    def test_first_match_wins(self):
        config = parse(rank_pattern={"layers.3.self_attn.q_proj": 2, "q_proj": 4})
        assert config.rank_of(Q) == 2
        assert config.rank_of(Q.replace("3", "1")) == 4
        assert config.rank_of(V) == 8

    def test_scaling_uses_the_layers_own_rank_and_alpha(self):
        config = parse(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 40})
        assert config.scaling_of(Q) == 16 / 2
        assert config.scaling_of(V) == 40 / 8

    def test_rslora_divides_by_the_root_of_the_layers_rank(self):
        config = parse(rank_pattern={"q_proj": 4}, use_rslora=True)
        assert config.scaling_of(Q) == 16 / 2
        assert config.scaling_of(V) == pytest.approx(16 / math.sqrt(8))

    @pytest.mark.parametrize("pattern", ["(", "a{99999999999999}", "(" * 5000, r"\p{Bogus}"])
    def test_what_is_no_regular_expression_is_refused(self, pattern):
        with pytest.raises(AdapterInvalid, match="is not a regular expression"):
            parse(rank_pattern={pattern: 2}).rank_of(Q)

    def test_catastrophic_expression_is_refused_soon(self):
        start = time.perf_counter()
        with pytest.raises(AdapterInvalid, match="takes too long"):
            parse(target_modules="((a|aa)+)+b").targets("a" * 60)
        assert time.perf_counter() - start < 5


class TestTargets:
    @pytest.mark.parametrize(
        ("changes", "module", "hit"),
        [
            ({}, Q, True),
            ({}, "q_proj", True),
            ({}, "model.layers.3.self_attn.xq_proj", False),
            ({}, "model.layers.3.self_attn.q_proj.inner", False),
            ({"target_modules": [Q]}, Q, True),
            ({"target_modules": [Q]}, Q.replace("3", "2"), False),
            ({"target_modules": r".*\.layers\.3\..*_proj"}, Q, True),
            ({"target_modules": r".*q_pro"}, Q, False),
            ({"target_modules": "all-linear"}, "model.layers.0.mlp.up_proj", True),
            ({"target_modules": "all-linear"}, "lm_head", False),
            ({"exclude_modules": ["v_proj"]}, V, False),
            ({"exclude_modules": ["v_proj"]}, Q, True),
            ({"exclude_modules": r".*\.3\..*"}, Q, False),
            ({"layers_to_transform": [3, 5]}, Q, True),
            ({"layers_to_transform": [2, 5]}, Q, False),
            ({"layers_to_transform": 3}, Q, True),
            ({"layers_to_transform": [0]}, "transformer.h.0.q_proj", True),
            ({"layers_to_transform": [0]}, "q_proj", False),
            ({"modules_to_save": ["q_proj"]}, Q, False),
            ({"modules_to_save": ["self_attn"]}, Q, False),
            ({"modules_to_save": ["proj"]}, Q, True),
        ],
    )
    def test_names_layers_as_peft_does(self, changes, module, hit):
        assert parse(**changes).targets(module) is hit


class TestModulesToSave:
    @pytest.mark.parametrize(
        ("path", "taken", "named"),
        [
            ("classifier", True, True),
            ("model.classifier", True, True),
            ("classifier.out_proj", True, True),  # a part of it
            ("pre_classifier", True, False),  # PEFT asks for the end of a name
            ("classifiers", False, False),
            ("pooler.dense", False, False),
        ],
    )
    def test_are_named_by_the_end_of_their_path(self, path, taken, named):
        config = parse(modules_to_save=["classifier", "score"])
        assert (config.saves(path), config.saves_exactly(path)) == (taken, named)

    def test_none_is_none(self):
        assert parse(modules_to_save=None).modules_to_save == ()
        assert not parse(modules_to_save=[]).saves("classifier")


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"peft_type": "LOHA"}, "want peft_type \"LORA\", got 'LOHA'"),
            ({"peft_type": None}, 'want peft_type "LORA", got None'),
            ({"peft_type": ["LORA"]}, "want peft_type"),
            ({"bias": "all"}, "want bias \"none\", got 'all'"),
            ({"bias": "lora_only"}, "lora_only"),
            ({"use_dora": True}, "use_dora = True"),
            ({"lora_bias": True}, "lora_bias = True"),
            ({"modules_to_save": "lm_head"}, "modules_to_save must be a list .*got 'lm_head'"),
            ({"modules_to_save": {"lm_head": 1}}, "modules_to_save must be a list"),
            ({"modules_to_save": [1]}, "modules_to_save must be"),
            ({"target_parameters": ["w"]}, "target_parameters"),
            ({"trainable_token_indices": [1]}, "trainable_token_indices"),
            ({"layer_replication": [[0, 2]]}, "layer_replication"),
            ({"use_qalora": True}, "use_qalora"),
            ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
            ({"corda_config": {"x": 1}}, "corda_config"),
            ({"invented_in_2030": "on"}, "invented_in_2030 = 'on'"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' rewrote the base"),
            ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
            ({"init_lora_weights": "OLoRA"}, "OLoRA"),
            ({"init_lora_weights": "corda"}, "corda"),
            ({"init_lora_weights": "loftq"}, "loftq"),
            ({"init_lora_weights": "lora_ga"}, "lora_ga"),
            ({"r": 0}, "r must be an integer from 1, got 0"),
            ({"r": -1}, "r must be an integer from 1, got -1"),
            ({"r": None}, "r must be an integer from 1, got None"),
            ({"r": True}, "got True"),
            ({"r": 8.0}, "got 8.0"),
            ({"r": "8"}, "got '8'"),
            ({"r": 10**9}, "r must be an integer"),
            ({"lora_alpha": "16"}, "lora_alpha must be a finite number, got '16'"),
            ({"lora_alpha": None}, "lora_alpha"),
            ({"lora_alpha": math.nan}, "lora_alpha"),
            ({"lora_alpha": math.inf}, "lora_alpha"),
            ({"lora_alpha": 10**400}, "lora_alpha"),
            ({"lora_alpha": True}, "lora_alpha"),
            ({"target_modules": None}, "target_modules must be"),
            ({"target_modules": 3}, "target_modules must be"),
            ({"target_modules": ["q_proj", 3]}, "target_modules must be"),
            ({"exclude_modules": 3}, "exclude_modules must be"),
            ({"rank_pattern": {"q_proj": 0}}, "q_proj must be an integer from 1, got 0"),
            ({"rank_pattern": ["q_proj"]}, "rank_pattern must be an object"),
            ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern.q_proj must be"),
            ({"kasa_config": True}, "kasa_config must be an object, got True"),
            ({"kasa_config": {"beta": "x"}}, "kasa_config.beta"),
            ({"kasa_config": {"gamma": None}}, "kasa_config.gamma"),
            ({"lora_dropout": "x"}, "lora_dropout"),
            ({"layers_to_transform": ["0"]}, "layers_to_transform must be"),
            ({"layers_to_transform": 3.5}, "layers_to_transform must be"),
            ({"layers_to_transform": True}, "layers_to_transform must be"),
            ({"use_rslora": "false"}, "use_rslora"),
        ],
    )
    def test_names_the_key_and_what_was_found(self, changes, message):
        with pytest.raises(AdapterInvalid, match=message):
            parse(**changes)

    def test_r_must_be_there(self):
        with pytest.raises(AdapterInvalid, match="r must be an integer from 1, got None"):
            parse_config({"peft_type": "LORA", "target_modules": ["q"]}, has_diagonal=False)

    @pytest.mark.parametrize("nothing", [None, False, [], {}, ""])
    def test_unknown_key_without_a_value_is_harmless(self, nothing):
        assert parse(invented_in_2030=nothing, use_dora=nothing, modules_to_save=nothing).r == 8

    @pytest.mark.parametrize(
        "changes",
        [{"init_lora_weights": init} for init in (True, False, "gaussian", "eva", "orthogonal")]
        + [{"fan_in_fan_out": True}, {"lora_dropout": 0.1}, {"peft_version": "99.0"}],
    )
    def test_keys_that_do_not_matter_at_inference_are_taken(self, changes):
        assert parse(**changes).r == 8

    @given(
        st.dictionaries(
            st.sampled_from(
                [
                    *RAW,
                    "bias",
                    "alpha_pattern",
                    "rank_pattern",
                    "layers_to_transform",
                    "lora_dropout",
                    "exclude_modules",
                    "init_lora_weights",
                    "use_rslora",
                    "base_model_name_or_path",
                    "task_type",
                ]
            ),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
                max_leaves=4,
            ),
        )
    )
    @settings(max_examples=300)
    def test_any_json_is_parsed_or_refused(self, changes):
        try:
            config = parse_config(RAW | changes, has_diagonal=True)
            config.targets(Q)
            config.rank_of(Q)
            config.scaling_of(Q)
        except AdapterInvalid:
            pass


class TestMeta:
    def test_without_a_sidecar_the_other_files_tell_the_rule(self):
        def rule(has_kasa_config: bool, has_diagonal: bool) -> TruncationRule:
            found = parse_meta(None, has_kasa_config=has_kasa_config, has_diagonal=has_diagonal)
            return found.truncation_rule

        assert rule(True, True) is TruncationRule.MIN_DIM
        assert rule(False, True) is TruncationRule.IN_FEATURES
        assert rule(False, False) is TruncationRule.NONE

    def test_rank_defaults_to_the_layers_r(self):
        assert meta().truncation_rank_of(Q, 8) == 8
        assert meta(truncation_rank=3).truncation_rank_of(Q, 8) == 3
        assert meta(truncation_rank=0).truncation_rank_of(Q, 8) == 0

    def test_single_layers_override_the_rank(self):
        found = meta(truncation_rank=3, truncation_ranks={Q: 0})
        assert found.truncation_rank_of(Q, 8) == 0
        assert found.truncation_rank_of(V, 8) == 3

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"format_version": 2}, "want format_version 1, got 2.*upgrade"),
            ({"format_version": None}, "want format_version 1, got None"),
            ({"format_version": "1"}, "want format_version 1, got '1'"),
            ({"truncation_rule": "middle"}, "truncation_rule must be one of .*got 'middle'"),
            ({"truncation_rule": None}, "got None"),
            ({"truncation_rule": ["min_dim"]}, "truncation_rule"),
            ({"truncation_rank": -1}, "truncation_rank must be an integer from 0, got -1"),
            ({"truncation_rank": 1.5}, "truncation_rank"),
            ({"truncation_ranks": {Q: -1}}, f"{Q} must be an integer from 0"),
            ({"truncation_ranks": [1]}, "truncation_ranks must be an object"),
            ({"training": 3}, "training must be an object"),
            ({"shear": 0.5}, r"unknown keys \['shear'\]"),
        ],
    )
    def test_names_the_key_and_what_was_found(self, changes, message):
        with pytest.raises(AdapterInvalid, match=message):
            meta(**changes)


class TestRoundTrip:
    CONFIG = AdapterConfig(
        8,
        12.5,
        ("k_proj", "q_proj"),
        rank_pattern={"q_proj": 2},
        alpha_pattern={"q_proj": 3.0},
        use_rslora=True,
        beta=0.1,
        gamma=0.2,
        lora_dropout=0.05,
        exclude_modules=("x",),
        layers_to_transform=(0, 2),
        modules_to_save=("classifier", "score"),
        task_type="SEQ_CLS",
        base_model_name="a/b",
    )

    def test_config_reads_as_it_was_written(self):
        text = config_json(self.CONFIG, peft_can_serve=True)
        assert parse_config(json.loads(text), has_diagonal=True) == self.CONFIG

    def test_plain_lora_has_no_kasa_config(self):
        config = AdapterConfig(8, 16.0, ".*q_proj", method=AdapterMethod.LORA)
        raw = json.loads(config_json(config, peft_can_serve=True))
        assert raw["kasa_config"] is None and raw["peft_type"] == "LORA"
        assert parse_config(raw, has_diagonal=False).target_modules == ".*q_proj"
        assert parse_config(raw, has_diagonal=False).method is AdapterMethod.LORA

    def test_what_peft_would_truncate_wrongly_is_not_called_lora(self):
        assert '"peft_type": "KASA"' in config_json(self.CONFIG, peft_can_serve=False)

    def test_whole_alpha_is_written_as_an_integer(self):
        assert '"lora_alpha": 16,' in config_json(AdapterConfig(8, 16.0, "x"), peft_can_serve=True)
        assert '"lora_alpha": 12.5,' in config_json(self.CONFIG, peft_can_serve=True)

    def test_meta_reads_as_it_was_written(self):
        wrote = AdapterMeta(
            TruncationRule.IN_FEATURES,
            3,
            {Q: 1},
            ortho_form="gram_n",
            reg_reduction="sum",
            base_fingerprint="ab" * 32,
            training={"steps": 10},
        )
        raw = json.loads(meta_json(wrote))
        assert next(iter(raw)) == "format_version"
        assert parse_meta(raw, has_kasa_config=True, has_diagonal=True) == wrote
