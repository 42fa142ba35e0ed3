"""Metrics on cases that can be counted by hand."""

from __future__ import annotations

import pytest

from kasa_runtime.errors import ConfigError
from kasa_runtime.training.metrics import check_metrics, parse_structure, score


def test_exact_match_accepts_any_reference() -> None:
    found = score(["exact_match"], [" a", "b", "c"], [["a"], ["x", "b"], ["d"]])
    assert found == {"exact_match": 66.67}


def test_intent_and_slots_are_counted_apart() -> None:
    predictions = ["Play(artist=X; year=1981)", "Weather(city=Rome)", "nonsense"]
    references = [["Play(artist=X; year=1982)"], ["Book(city=Rome)"], ["Play(sort=best)"]]
    found = score(["intent_accuracy", "slot_f1"], predictions, references)
    assert found["intent_accuracy"] == 33.33
    assert found["slot_f1"] == round(100 * 2 * 2 / (3 + 4), 2)


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


def test_unknown_metrics_are_refused_before_training() -> None:
    with pytest.raises(ConfigError, match=r"unknown metric 'blue'; known: .*bleu"):
        check_metrics(["blue"])
