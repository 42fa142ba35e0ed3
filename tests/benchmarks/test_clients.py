"""What foreign programs are given, and what is read of their results."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from benchmarks.clients import guidellm, lm_eval
from benchmarks.clients.guidellm import Load
from benchmarks.clients.lm_eval import Score
from benchmarks.clients.report import Agreement, Report
from benchmarks.clients.tasks import Row, Task, multiple_choice, tickets

ROOT = Path(__file__).parents[2]
TICKETS = ROOT / "examples" / "tickets" / "data" / "test.jsonl"


def test_a_ticket_is_a_choice_of_the_team_and_a_line_to_write() -> None:
    team, route = tickets(TICKETS, 5)
    assert len(team.rows) == len(route.rows) == 5
    assert team.is_choice and not route.is_choice
    for choice, line in zip(team.rows, route.rows, strict=True):
        assert choice.text == line.text and line.text.endswith(" =>")
        assert line.target.startswith(choice.choices[choice.gold].strip() + " | ")


def test_the_form_of_llm_adapters_becomes_choices(tmp_path: Path) -> None:
    rows = [
        {"instruction": f"Say {answer}.\n\nAnswer format: true/false", "answer": answer}
        for answer in ("true", "false")
    ]
    file = tmp_path / "BoolQ-Easy_test.json"
    file.write_text(json.dumps(rows))
    task = multiple_choice(file, 10)
    assert task.name == "boolq_easy_test"
    assert task.rows == (
        Row("Say true.\n\nthe correct answer is", (" true", " false"), 0),
        Row("Say false.\n\nthe correct answer is", (" true", " false"), 1),
    )
    assert len(multiple_choice(file, 1).rows) == 1


def test_a_task_is_written_as_lm_eval_reads_it(tmp_path: Path) -> None:
    task = Task("mine", (Row("a", (" b", " c"), 1), Row("d", (" e", " f"), 0)))
    task.write(tmp_path)
    configuration = json.loads((tmp_path / "mine.yaml").read_text())
    [data] = configuration["dataset_kwargs"]["data_files"].values()
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    assert [row[configuration["doc_to_choice"]] for row in rows] == [[" b", " c"], [" e", " f"]]
    assert [row[configuration["doc_to_target"]] for row in rows] == [1, 0]
    assert configuration["target_delimiter"] == ""


def write_lm_eval_results(folder: Path) -> None:
    results = folder / "results" / "model"
    results.mkdir(parents=True)
    figures = {
        "alias": "x",
        "acc,none": 0.5,
        "acc_stderr,none": 0.5,
    }
    text = {"alias": "y", "exact_match,text": 0.25, "exact_match_stderr,text": "N/A"}
    found = {"results": {"choice": figures, "text": text}}
    (results / "results_2026-01-02.json").write_text(json.dumps(found))
    rows = [
        {"doc_id": 1, "filtered_resps": [["-2.5", "False"], ["-1.0", "True"]]},
        {"doc_id": 0, "filtered_resps": [["-1.5", "False"], ["-3.0", "False"]]},
    ]
    for task, samples in (("choice", rows), ("text", [{"doc_id": 0, "filtered_resps": ["a"]}])):
        lines = "".join(json.dumps(sample) + "\n" for sample in samples)
        (results / f"samples_{task}_2026-01-02.jsonl").write_text(lines)


def test_scores_are_read_in_the_order_of_the_rows(tmp_path: Path) -> None:
    write_lm_eval_results(tmp_path)
    assert lm_eval.read(tmp_path) == [
        Score("choice", "accuracy", 0.5, 2, ((-1.5, -3.0), (-2.5, -1.0))),
        Score("text", "exact match", 0.25, 1),
    ]


def test_agreement_is_of_likelihoods_and_of_what_they_choose() -> None:
    score = Score("choice", "accuracy", 0.5, 2, ((-1.5, -3.0), (-2.5, -1.0)))
    found = Agreement.of(score, [[-1.5, -3.25], [-1.0, -1.5]], [0, 1])
    assert found == Agreement(accuracy=0.5, max_difference=1.5, num_same=1)


def test_loads_are_read(tmp_path: Path) -> None:
    def of(**values: float) -> dict[str, Any]:
        return {"successful": values}

    metrics = {
        "request_totals": {"successful": 7, "errored": 1, "incomplete": 2},
        "requests_per_second": of(mean=2.0),
        "output_tokens_per_second": of(mean=64.0),
        "time_to_first_token_ms": {"successful": {"percentiles": {"p50": 1.0, "p95": 2.0}}},
        "inter_token_latency_ms": {"successful": {"percentiles": {"p50": 3.0, "p95": 4.0}}},
    }
    benchmark = {"config": {"strategy": {"streams": 8}}, "metrics": metrics}
    (tmp_path / "report.json").write_text(json.dumps({"benchmarks": [benchmark]}))
    want = Load("m", 8, 7, 3, 2.0, 64.0, (1.0, 2.0), (3.0, 4.0))
    assert guidellm.read(tmp_path, "m") == want


@pytest.mark.parametrize("tool", ["lm-eval", "guidellm"])
def test_a_command_names_the_server_the_model_and_the_tokenizer(tool: str, tmp_path: Path) -> None:
    python, url, tokenizer = Path("/env/bin/python"), "http://127.0.0.1:1", Path("/models/m")
    if tool == "lm-eval":
        command = lm_eval.command(python, url, "style", tokenizer, ["a", "b"], tmp_path)
        assert "a,b" in command
    else:
        command = guidellm.command(python, url, "style", tokenizer, tmp_path, 16, 8)
    text = " ".join(command)
    assert command[0].startswith("/env/bin/")
    assert url in text and "model=style" in text and "/models/m" in text


def test_a_later_call_goes_on_with_what_is_there(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "clients.py"))
    write_lm_eval_results(tmp_path / "lm-eval-m")
    (tmp_path / "lm-eval-m" / "command.txt").write_text("lm_eval --x")
    report = script["gathered"](["m", "other"], tmp_path)
    assert report.commands == ["lm_eval --x"]
    assert list(report.scores["m"].values()) == lm_eval.read(tmp_path / "lm-eval-m")
    task = Task("choice", (Row("a", (" b", " c")),) * 3)  # of which two were scored
    for model in ("m", "other"):
        with pytest.raises(SystemExit, match=f"no score of {model} in 3 rows of choice"):
            script["verify"](report, model, tmp_path, None, [task])


def test_a_report_has_the_figures_and_no_rows(tmp_path: Path) -> None:
    report = Report("a machine", commands=["lm_eval --x"])
    score = Score("choice", "accuracy", 0.5, 2, ((-1.5, -3.0), (-2.5, -1.0)))
    report.scores["m"] = {"choice": score, "text": Score("text", "exact match", 0.25, 4)}
    report.agreements["m"] = {"choice": Agreement(0.5, 1e-5, 2)}
    report.loads.append(Load("m", 8, 7, 0, 2.0, 64.0, (1.0, 2.0), (3.0, 4.0)))
    text = report.write(tmp_path)
    assert "| m | choice | 2 | accuracy | 50.0 | 50.0 | 2 of 2 | 1.0e-05 |" in text
    assert "| m | text | 4 | exact match | 25.0 |  |  |  |" in text
    assert "| m | 8 | 7 | 0 | 2.00 | 64 | 1 / 2 | 3.0 / 4.0 |" in text
    found = json.loads((tmp_path / "results.json").read_text())
    assert "likelihoods" not in found["scores"]["m"]["choice"]
