"""Flags of commands that generate: SamplingParams' fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kasa_runtime.commands.flags import build, options
from kasa_runtime.types import SamplingParams

HELP: dict[str, dict[str, Any]] = {
    "max_tokens": {"default": 256, "help": "most tokens to generate", "show_default": True},
    "min_tokens": {"help": "fewest tokens to generate"},
    "temperature": {"help": "0: greedy"},
    "top_p": {"help": "draw from the tokens that make up this probability"},
    "top_k": {"help": "draw from this many most likely tokens; 0: all"},
    "min_p": {"help": "draw from tokens this likely, relative to the most likely"},
    "repetition_penalty": {"help": "above 1: fewer repetitions of prompt and output"},
    "presence_penalty": {"help": "above 0: fewer tokens that the output has"},
    "frequency_penalty": {"help": "above 0: the same, times how often it has them"},
    "seed": {"help": "make the draw repeatable"},
    "stop": {"help": "end at this text; may be given several times"},
    "ignore_eos": {"help": "go on after the end of sequence"},
    "logprobs": {"help": "log-probabilities of this many tokens, with --json"},
}

sampling_options = options(SamplingParams, section="Sampling", **HELP)


def sampling_of(values: Mapping[str, Any]) -> SamplingParams:
    """What the flags say. Raises InvalidRequest."""
    return build(SamplingParams, values)
