"""This process among those that `torchrun` or `accelerate launch` started; mostly it is alone."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState


def this_process() -> PartialState:
    """Its rank, its device, and a barrier. Without an accelerator the processes meet over gloo,
    which accelerate does only when it is told that the CPU is meant."""
    return PartialState(cpu=on_cpu())


def on_cpu() -> bool:
    """Whether this run uses no accelerator: for want of one, or by `accelerate launch --cpu`."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return asked or not torch.accelerator.is_available()
