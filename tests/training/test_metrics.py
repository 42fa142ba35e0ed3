"""Metrics on cases that can be counted by hand, and against the packages that are the oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kasa_runtime.errors import ConfigError
from kasa_runtime.training import metrics as module
from kasa_runtime.training.metrics import (
    LABEL_METRICS,
    NUMBER_METRICS,
    TEXT_METRICS,
    check_packages,
    label_score,
    number_score,
    parse_structure,
    score,
)


def test_exact_match_accepts_any_reference() -> None:
    found = score(["exact_match"], [" a", "b", "c"], [["a"], ["x", "b"], ["d"]])
    assert found == {"exact_match": 66.67}


def test_intent_and_slots_are_counted_apart() -> None:
    predictions = ["Play(artist=X; year=1981)", "Weather(city=Rome)", "nonsense"]
    references = [["Play(artist=X; year=1982)"], ["Book(city=Rome)"], ["Play(sort=best)"]]
    found = score(["intent_accuracy", "slot_f1"], predictions, references)
    assert found["intent_accuracy"] == 33.33
    assert found["slot_f1"] == round(100 * 2 * 2 / (3 + 4), 2)


def test_slot_f1_of_no_slots_at_all_is_zero() -> None:
    assert score(["slot_f1"], ["nothing"], [["Play()"]]) == {"slot_f1": 0}


def test_structures_are_read_in_both_forms() -> None:
    intent, pairs = parse_structure("Play(artist=A; artist=A; title=x (live))")
    assert (intent, pairs) == ("Play", {("artist", "A"): 2, ("title", "x (live)"): 1})
    assert parse_structure("team=sales | ref=none") == (
        "",
        {("team", "sales"): 1, ("ref", "none"): 1},
    )
    assert parse_structure("no pairs here") == ("", {})


def test_text_metrics_take_the_best_of_uneven_references() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    predictions = ["the cat sat on the mat today", "a dog barked at the red car"]
    references = [["something else", predictions[0]], [predictions[1]]]
    found = score(["bleu", "rouge_l"], predictions, references)
    assert found["rouge_l"] == 100
    assert found["bleu"] == pytest.approx(100)
    alone = sacrebleu.corpus_bleu(predictions, [["something else", predictions[1]]]).score
    assert alone < found["bleu"], "the second reference was not used"


def test_bleu_has_its_closed_form() -> None:
    """Five tokens, one wrong at the end: precisions 4/5, 3/4, 2/3, 1/2 and a brevity of 1."""
    pytest.importorskip("sacrebleu")
    want = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert score(["bleu"], ["a b c d x"], [["a b c d e"]])["bleu"] == round(want, 2)
    short = 100 * math.exp(1 - 5 / 4)  # all of its four tokens are right
    assert score(["bleu"], ["a b c d"], [["a b c d e"]])["bleu"] == round(short, 2)


def test_rouge_l_has_its_closed_form() -> None:
    """The longest common subsequence is three words: of four predicted, of six wanted."""
    pytest.importorskip("rouge_score")
    precision, recall = 3 / 4, 3 / 6
    want = 100 * 2 * precision * recall / (precision + recall)
    found = score(["rouge_l"], ["one two x four"], [["one two three four five six"]])
    assert found["rouge_l"] == round(want, 2)


def test_label_metrics_have_their_closed_forms() -> None:
    pytest.importorskip("sklearn")
    predicted = [1] * 6 + [0] * 4
    wanted = [1] * 4 + [0] * 2 + [1] * 1 + [0] * 3
    tp, fp, fn, tn = 4, 2, 1, 3
    correlation = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert label_score(LABEL_METRICS, predicted, wanted, 2) == {
        "accuracy": 70,
        "f1": round(100 * 2 * tp / (2 * tp + fp + fn), 2),
        "matthews": round(100 * correlation, 2),
    }


def test_f1_of_more_labels_is_the_mean_over_them() -> None:
    pytest.importorskip("sklearn")
    found = label_score(["f1"], [0, 1, 2, 2], [0, 1, 1, 2], 3)
    assert found["f1"] == round(100 * (1 + 2 / 3 + 2 / 3) / 3, 2)


@pytest.mark.parametrize("wanted", [[0, 0], [1, 1], [0, 1]])
def test_a_model_that_always_says_the_same_has_no_correlation(wanted: list[int]) -> None:
    pytest.importorskip("sklearn")
    assert label_score(["matthews"], [0, 0], wanted, 2) == {"matthews": 0}
    assert label_score(["f1"], [0, 0], wanted, 2) == {"f1": 0}


def test_number_metrics_have_their_closed_forms() -> None:
    """Numpy says how the numbers, and their ranks, go together."""
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=20), generator.normal(size=20)
    found = number_score(NUMBER_METRICS, x.tolist(), y.tolist())
    ranks = np.corrcoef(x.argsort().argsort(), y.argsort().argsort())[0, 1]
    assert found["pearson"] == pytest.approx(100 * np.corrcoef(x, y)[0, 1], abs=1e-4)
    assert found["spearman"] == pytest.approx(100 * ranks, abs=1e-4)
    assert found["mse"] == pytest.approx(((x - y) ** 2).mean(), abs=1e-4)


def test_numbers_in_a_line_correlate_whole_and_constants_not_at_all() -> None:
    assert number_score(NUMBER_METRICS, [1, 2, 3], [3, 5, 7]) == {
        "pearson": 100,
        "spearman": 100,
        "mse": round((4 + 9 + 16) / 3, 4),
    }
    assert number_score(["pearson", "spearman"], [1, 1], [1, 2]) == {"pearson": 0, "spearman": 0}


@pytest.mark.parametrize("name", ["bleu", "rouge_l", "accuracy", "f1", "matthews"])
def test_missing_package_is_named_before_training(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def absent(module: str) -> None:
        raise ModuleNotFoundError(name=module.partition(".")[0])

    monkeypatch.setattr(module, "import_module", absent)
    with pytest.raises(ConfigError, match=r"not installed; pip install 'kasa-runtime\[train\]'"):
        check_packages([name])
    check_packages([other for other in (*TEXT_METRICS, *NUMBER_METRICS) if other not in (
        "bleu", "rouge_l")])  # fmt: skip
