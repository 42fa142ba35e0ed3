"""Language modelling by a decoder: prompt and completion, chat messages, or plain text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from kasa_runtime.errors import ConfigError, DataError, ModelError
from kasa_runtime.training.config import RunConfig, TaskKind
from kasa_runtime.training.cross_entropy import cross_entropy
from kasa_runtime.training.examples import IGNORED, Collator, Example, Examples, packed
from kasa_runtime.training.generate import generate
from kasa_runtime.training.metrics import TEXT_METRICS, References, score
from kasa_runtime.training.rows import Row
from kasa_runtime.training.tasks.base import BatchLoss, Outcome, Report, Task
from kasa_runtime.training.tasks.chat import ASSISTANT, Chat, messages_of
from kasa_runtime.training.tasks.isolation import check_isolation

PERPLEXITY = "perplexity"


class CausalTask(Task):
    """`completion`, `chat` and `text`. Perplexity is over the tokens that have a loss."""

    metrics = (*TEXT_METRICS, PERPLEXITY)
    task_type: ClassVar[str] = "CAUSAL_LM"
    chat: Chat | None = None

    def __init__(self, config: RunConfig) -> None:
        if config.data.task is TaskKind.TEXT:
            self.metrics = (PERPLEXITY,)  # the others compare with an answer
        super().__init__(config)

    def prepare(self, tokenizer: PreTrainedTokenizerBase, train: Sequence[Row]) -> None:
        super().prepare(tokenizer, train)
        if tokenizer.eos_token_id is None:
            raise ConfigError("[model] the tokenizer has no end-of-sequence token")
        if self.data.task is TaskKind.CHAT or self.data.chat:
            self.chat = Chat(tokenizer)

    def question(self, row: Row) -> str:
        if self.data.task is TaskKind.TEXT:
            return row.render(self.data.text)
        if self.data.task is TaskKind.CHAT:
            return self._asked(row)[-1]["content"]
        return super().question(row)

    def load_model(self, directory: Path, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, output_loading_info=True, **options
        )
        model, loading = loaded
        if missing := sorted(
            loading["missing_keys"]
        ):  # transformers fills them with random numbers
            raise ModelError(
                f"{directory}: lacks {len(missing)} tensors of {type(model).__name__}, the first "
                f"is {missing[0]}; want a model that generates text"
            )
        if self.data.packing:
            check_isolation(model)
        return cast("PreTrainedModel", model)

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
            assert self.chat
            return self.chat.example(row, messages_of(row, self.data.messages))
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
        return self.answer_ids(text)

    def answer_ids(self, text: str) -> list[int]:
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self._eos]

    def completion(self, row: Row) -> str:
        return row.render(self.data.completion)

    def prompt_ids(self, row: Row) -> list[int]:
        """What a caller would send for this row, as tokens."""
        if self.data.task is TaskKind.CHAT:
            assert self.chat
            return self.chat.prompt_ids(row, self._asked(row))
        return self.encode_prompt(row, row.render(self.data.prompt), chat=self.chat)

    def encode_prompt(self, row: Row, text: str, *, chat: Chat | None) -> list[int]:
        """A plain prompt with the tokenizer's special tokens, or a user message through `chat`."""
        if chat:
            system = self.data.system
            messages = [{"role": "system", "content": system}] if system else []
            return chat.prompt_ids(row, [*messages, {"role": "user", "content": text}])
        ids: list[int] = self.tokenizer(text)["input_ids"]
        if not ids:
            raise row.error(f"the prompt {self.data.prompt!r} is empty")
        return ids

    def _asked(self, row: Row) -> list[dict[str, str]]:
        """The messages of a chat before its last answer."""
        messages = messages_of(row, self.data.messages)
        asked = messages[:-1] if messages[-1]["role"] == ASSISTANT else messages
        if not asked:
            raise row.error(f"{self.data.messages}: want a message before the assistant's")
        return asked

    def _pieces(self, row: Row) -> list[Example]:
        """A text in pieces of max_length. Each begins with the last token of the one before, so
        that every token but the first is told from what precedes it, once."""
        text = row.render(self.data.text)
        if not text.strip():
            raise row.error(f"the text {self.data.text!r} is empty")
        ids: list[int] = list(self.tokenizer(text)["input_ids"])
        if ids[-1] != self._eos:
            ids.append(self._eos)
        size = self.data.max_length
        starts = range(0, len(ids) - 1, size - 1)
        return [self._answered((), ids[start : start + size]) for start in starts]

    @property
    def _eos(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def loss(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> BatchLoss:
        """Cross-entropy over the tokens that have a label."""
        logits, targets, _ = self.labelled_logits(model, inputs)
        return BatchLoss(cross_entropy(logits, targets).sum(), len(targets))

    @staticmethod
    def labelled_logits(
        model: nn.Module, inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (n, vocabulary) of the n tokens that have a label, their labels (n,), and which
        row of the batch each is in (n,).

        Only the positions before them enter the output embeddings: with a large vocabulary these
        cost as much as many layers. The hook leaves the model's own forward, with any scaling of
        its logits, as it is."""
        targets = inputs["labels"][:, 1:]
        keep = targets != IGNORED  # (batch, length - 1)
        unwrapped: Any = getattr(model, "module", model)  # of DistributedDataParallel
        head: nn.Module = unwrapped.get_output_embeddings()
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        with head.register_forward_pre_hook(lambda _, args: (args[0][:, :-1][keep],)):
            logits = model(**rest, use_cache=False).logits
        return logits, targets[keep], keep.nonzero()[:, 0]

    def check(self, rows: Sequence[Row]) -> None:
        if self._text_metrics:
            for row in rows:
                self.prompt_ids(row)
                self.references(row)
        if PERPLEXITY in self.config.eval.metrics:
            self.encode(rows)

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
                row, shots + row.render(self.data.prompt), chat=None
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
        chat = Chat(self.tokenizer) if self.tokenizer.chat_template else None
        return self.encode_prompt(row, text, chat=chat)

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
        last = messages_of(row, self.data.messages)[-1]
        if last["role"] != ASSISTANT:
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
