"""Language modelling by a decoder: prompt and completion, chat messages, or plain text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from kasa_runtime.errors import ConfigError, DataError
from kasa_runtime.training.config import TaskKind
from kasa_runtime.training.examples import IGNORED, Collator, Example, Examples, packed
from kasa_runtime.training.generate import generate
from kasa_runtime.training.metrics import TEXT_METRICS, References, check_metrics, score
from kasa_runtime.training.rows import Row
from kasa_runtime.training.tasks.base import BatchLoss, Outcome, Report, Task

PERPLEXITY = "perplexity"


class CausalTask(Task):
    """`completion`, `chat` and `text`. Perplexity is over the tokens that have a loss."""

    metrics: ClassVar[tuple[str, ...]] = (*TEXT_METRICS, PERPLEXITY)
    task_type: ClassVar[str] = "CAUSAL_LM"

    def prepare(self, tokenizer: PreTrainedTokenizerBase, train: Sequence[Row]) -> None:
        super().prepare(tokenizer, train)
        kind, names = self.data.task, self.config.eval.metrics
        texts = [name for name in names if name in TEXT_METRICS]
        check_metrics(texts)
        if kind is TaskKind.TEXT and texts:
            raise ConfigError(f"[eval] metrics: {texts[0]} needs answers; plain text has none")
        if not tokenizer.chat_template and (kind is TaskKind.CHAT or self.data.chat):
            raise ConfigError(
                "[data] task = chat and chat = true need a tokenizer with a chat template, this "
                "model's has none"
            )
        if tokenizer.eos_token_id is None:
            raise ConfigError("[model] the tokenizer has no end-of-sequence token")

    def question(self, row: Row) -> str:
        if self.data.task is TaskKind.TEXT:
            return row.render(self.data.text)
        if self.data.task is TaskKind.CHAT:
            return self._messages(row)[0]["content"]
        return super().question(row)

    def load_model(self, directory: Path, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options)

    def encode(self, rows: Sequence[Row]) -> Examples:
        """Rows longer than max_length are left out and counted; plain text is cut into pieces."""
        if self.data.task is TaskKind.TEXT:
            examples = [piece for row in rows for piece in self._pieces(row)]
            return self._examples(examples, len(rows), 0)
        examples = [self._example(row) for row in rows]
        short = [e for e in examples if len(e) <= self.data.max_length]
        if not short:
            raise DataError(
                f"{rows[0].source}: all {len(rows)} rows are longer than max_length = "
                f"{self.data.max_length} tokens; the shortest has {min(map(len, examples))}"
            )
        return self._examples(short, len(short), len(examples) - len(short))

    def _examples(self, examples: list[Example], num_rows: int, num_too_long: int) -> Examples:
        if self.data.packing:
            examples = packed(examples, self.data.max_length)
        return Examples(examples, num_rows=num_rows, num_too_long=num_too_long)

    def _example(self, row: Row) -> Example:
        if self.data.task is TaskKind.CHAT:
            return self._conversation(row)
        return self._answered(self.prompt_ids(row), self.completion_ids(row))

    @staticmethod
    def _answered(prompt: Sequence[int], completion: Sequence[int]) -> Example:
        labels = [*[IGNORED] * len(prompt), *completion]
        labels[0] = IGNORED  # nothing stands before it to tell it from
        return Example((*prompt, *completion), tuple(labels))

    def completion_ids(self, row: Row) -> list[int]:
        """The completion and the end-of-sequence token."""
        text = self.completion(row)
        if not text.strip():
            raise row.error(f"the completion {self.data.completion!r} is empty")
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self._eos]

    def completion(self, row: Row) -> str:
        return row.render(self.data.completion)

    def prompt_ids(self, row: Row) -> list[int]:
        """What a caller would send for this row, as tokens."""
        if self.data.task is TaskKind.CHAT:
            messages = self._messages(row)
            if messages[-1]["role"] == "assistant":
                messages = messages[:-1]
            return self._chat_ids(messages, answer_next=True)
        return self.encode_prompt(row.render(self.data.prompt), chat=self.data.chat)

    def encode_prompt(self, text: str, *, chat: bool) -> list[int]:
        """A plain prompt with the tokenizer's special tokens, or a user message through its chat
        template."""
        if not chat:
            ids: list[int] = self.tokenizer(text)["input_ids"]
            return ids
        system = self.data.system
        messages = [{"role": "system", "content": system}] if system else []
        return self._chat_ids([*messages, {"role": "user", "content": text}], answer_next=True)

    def _conversation(self, row: Row) -> Example:
        """All turns, with a loss on those of the assistant, their end included."""
        messages = self._messages(row)
        ids: list[int] = []
        labels: list[int] = []
        for index, message in enumerate(messages):
            answer = message["role"] == "assistant"
            if answer:
                opened = self._chat_ids(messages[:index], answer_next=True)
                self._grow(row, ids, labels, opened, learn=False)
            closed = self._chat_ids(messages[: index + 1], answer_next=False)
            self._grow(row, ids, labels, closed, learn=answer)
        if not any(label != IGNORED for label in labels):
            raise row.error(f"{self.data.messages}: want a message of the assistant, found none")
        return Example(tuple(ids), tuple(labels))

    @staticmethod
    def _grow(
        row: Row, ids: list[int], labels: list[int], longer: list[int], *, learn: bool
    ) -> None:
        """Extend `ids` to `longer`, which must begin with them."""
        if longer[: len(ids)] != ids:
            raise row.error(
                "the model's chat template writes earlier messages differently once others follow, "
                "so the assistant's tokens cannot be told apart; use task = completion"
            )
        new = longer[len(ids) :]
        labels += new if learn else [IGNORED] * len(new)
        ids += new

    def _messages(self, row: Row) -> list[dict[str, str]]:
        messages: Any = row.get(self.data.messages)
        ok = isinstance(messages, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
            for m in messages
        )  # fmt: skip
        if not ok or not messages:
            raise row.error(
                f"{self.data.messages}: want a list of {{role, content}} with texts, got "
                f"{str(messages)[:80]!r}"
            )
        return list(messages)

    def _chat_ids(self, messages: Sequence[Mapping[str, str]], *, answer_next: bool) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=answer_next,
            tokenize=False,
        )
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _pieces(self, row: Row) -> list[Example]:
        text = row.render(self.data.text)
        if not text.strip():
            raise row.error(f"the text {self.data.text!r} is empty")
        ids = [*self.tokenizer(text)["input_ids"], self._eos]
        size = self.data.max_length
        pieces = [ids[start : start + size] for start in range(0, len(ids), size)]
        return [self._answered((), piece) for piece in pieces if len(piece) > 1]

    @property
    def _eos(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def loss(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> BatchLoss:
        """Cross-entropy over the tokens that have a label.

        Only those positions enter the output embeddings: with a large vocabulary they cost as much
        as many layers. The hook leaves the model's own forward, with any scaling of its logits, as
        it is."""
        targets = inputs["labels"][:, 1:]
        keep = targets != IGNORED  # (batch, length - 1)
        unwrapped: Any = getattr(model, "module", model)  # of DistributedDataParallel
        head: nn.Module = unwrapped.get_output_embeddings()
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        with head.register_forward_pre_hook(lambda _, args: (args[0][:, :-1][keep],)):
            logits = model(**rest, use_cache=False).logits  # (labelled tokens, vocabulary)
        total = functional.cross_entropy(logits.float(), targets[keep], reduction="sum")
        return BatchLoss(total, int(keep.sum()))

    def measure(
        self, model: PreTrainedModel, rows: Sequence[Row], report: Report | None = None
    ) -> Outcome:
        prompts = [self.prompt_ids(row) for row in rows] if self._text_metrics else []
        return self._outcome(model, rows, prompts, stop_at_newline=False, report=report)

    def measure_base(
        self,
        model: PreTrainedModel,
        rows: Sequence[Row],
        train: Sequence[Row],
        progress: Callable[[str], Any],
    ) -> dict[str, Outcome]:
        """Two fair chances for a model that was never told the task: zero-shot, with an instruction
        through its chat template, and few-shot, with training rows before the prompt."""
        if not self._text_metrics:
            return super().measure_base(model, rows, train, progress)
        ways = {"base, zero-shot": self._zero_shot_prompt}
        settings = self.config.eval
        if settings.few_shot and self.data.task is TaskKind.COMPLETION:
            shots = self._shots(train)
            ways[f"base, {settings.few_shot}-shot"] = lambda row: self.encode_prompt(
                shots + row.render(self.data.prompt), chat=False
            )
        outcomes = {}
        for name, ask in ways.items():
            with progress(name) as report:
                prompts = [ask(row) for row in rows]
                outcomes[name] = self._outcome(
                    model, rows, prompts, stop_at_newline=True, report=report
                )
        return outcomes

    def _zero_shot_prompt(self, row: Row) -> list[int]:
        if self.data.task is TaskKind.CHAT:
            return self.prompt_ids(row)
        text = row.render(self.data.prompt)
        if self.config.eval.instruction:
            text = f"{self.config.eval.instruction}\n\n{text}"
        return self.encode_prompt(text, chat=bool(self.tokenizer.chat_template))

    def _shots(self, train: Sequence[Row]) -> str:
        """Training rows, the same for every prompt, each on a line of its own before it."""
        return "".join(
            f"{row.render(self.data.prompt)}{self.completion(row)}\n"
            for row in train[: self.config.eval.few_shot]
        )

    @property
    def _text_metrics(self) -> list[str]:
        return [name for name in self.config.eval.metrics if name in TEXT_METRICS]

    def _outcome(
        self,
        model: PreTrainedModel,
        rows: Sequence[Row],
        prompts: Sequence[Sequence[int]],
        *,
        stop_at_newline: bool,
        report: Report | None,
    ) -> Outcome:
        metrics: dict[str, float] = {}
        texts: list[str] = []
        if self._text_metrics:
            texts = generate(
                model,
                self.tokenizer,
                prompts,
                max_new_tokens=self.config.eval.max_new_tokens,
                batch_size=self.config.eval.batch_size,
                stop_at_newline=stop_at_newline,
                report=report,
            )
            references: References = [self.references(row) for row in rows]
            metrics |= score(self._text_metrics, texts, references)
        if PERPLEXITY in self.config.eval.metrics:
            metrics[PERPLEXITY] = round(math.exp(min(700.0, self.mean_loss(model, rows))), 4)
        return Outcome({name: metrics[name] for name in self.config.eval.metrics}, texts)

    def references(self, row: Row) -> list[str]:
        """The texts that are right answers to a row."""
        field = self.config.eval.references
        if not field:
            return [self._answer(row).strip()]
        value = row.fields.get(field)
        texts = [value] if isinstance(value, str) else value
        if not texts or not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
            raise row.error(
                f"[eval] references: want a text or a list of texts in {field!r}, got {value!r}"
            )
        return texts

    def _answer(self, row: Row) -> str:
        if self.data.task is not TaskKind.CHAT:
            return self.completion(row)
        last = self._messages(row)[-1]
        if last["role"] != "assistant":
            raise row.error(f"{self.data.messages}: the last message must be the assistant's")
        return last["content"]

    def held_out(self, model: PreTrainedModel, rows: Sequence[Row]) -> dict[str, float]:
        loss = self.mean_loss(model, rows)
        return {"loss": loss, PERPLEXITY: math.exp(min(700.0, loss))}

    @torch.inference_mode()
    def mean_loss(self, model: PreTrainedModel, rows: Sequence[Row]) -> float:
        """Cross-entropy per labelled token of all rows, in nats."""
        model.eval()
        examples, collate = self.encode(rows), Collator(self.pad_id)
        order = sorted(range(len(examples)), key=lambda i: len(examples.examples[i]))
        total, count, size = 0.0, 0, self.config.eval.batch_size
        for start in range(0, len(order), size):
            batch = collate([examples[i] for i in order[start : start + size]])
            loss = self.loss(model, {k: v.to(model.device) for k, v in batch.items()})
            total, count = total + loss.total.item(), count + loss.count
        return total / max(1, count)
