"""PEFT with a LoRA adapter per row of the batch (`adapter_names`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel

from benchmarks.peers.cases import adapter_name
from benchmarks.peers.child import serve
from benchmarks.peers.transformers import Transformers


class Peft(Transformers):
    packages = ("peft", "transformers", "torch")

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        names = [adapter_name(i) for i in range(settings["num_adapters"])]
        root = Path(settings["adapters_dir"])
        model = PeftModel.from_pretrained(self._model, root / names[0], adapter_name=names[0])
        for name in names[1:]:
            model.load_adapter(root / name, adapter_name=name)
        self._model = model.eval()

    def _adapter_options(self, adapters: list[str]) -> dict[str, Any]:
        return {"adapter_names": adapters}


if __name__ == "__main__":
    serve(Peft)
