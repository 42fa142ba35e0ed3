"""A model as OpenVINO GenAI reads it, made by optimum-intel.

python -m benchmarks.peers.export_openvino MODEL_DIR OUTPUT_DIR float32|int8
"""

from __future__ import annotations

import sys

import openvino as ov
from openvino_tokenizers import convert_tokenizer
from optimum.intel import OVModelForCausalLM
from transformers import AutoTokenizer


def main(model_dir: str, output: str, precision: str) -> None:
    model = OVModelForCausalLM.from_pretrained(
        model_dir, export=True, compile=False, load_in_8bit=precision == "int8"
    )
    model.save_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    encoder, decoder = convert_tokenizer(tokenizer, with_detokenizer=True)
    ov.save_model(encoder, f"{output}/openvino_tokenizer.xml")
    ov.save_model(decoder, f"{output}/openvino_detokenizer.xml")


if __name__ == "__main__":
    main(*sys.argv[1:])
