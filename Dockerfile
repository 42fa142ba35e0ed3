# syntax=docker/dockerfile:1
# docker build --target cpu --tag kasa-runtime:cpu .
# docker build --target gpu --tag kasa-runtime:gpu .
# docs/deploy.md says how to run them.

FROM python:3.12-slim AS source
WORKDIR /src
RUN python -m venv /opt/kasa
ENV PATH=/opt/kasa/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY pyproject.toml README.md LICENSE ./
COPY proto ./proto
COPY kasa_runtime ./kasa_runtime
COPY server ./server

FROM source AS build-cpu
# The torch that pip finds by default on x86-64 brings gigabytes of CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --index-url "$TORCH_INDEX" 'torch>=2.11,<2.14' && pip install .

FROM source AS build-gpu
RUN pip install .

FROM python:3.12-slim AS runtime
# At run time: the openvino executor compiles its operations for the processor that it runs on, and
# on a GPU triton compiles the launchers of its kernels.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN groupadd --system --gid 10001 kasa \
    && useradd --system --uid 10001 --gid kasa --home-dir /var/lib/kasa kasa \
    && install --directory --owner kasa --group kasa /var/lib/kasa /adapters
ENV PATH=/opt/kasa/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    KASA_HOME=/var/lib/kasa \
    KASA_ADAPTERS_DIR=/adapters \
    KASA_HOST=0.0.0.0
USER 10001:10001
VOLUME ["/var/lib/kasa", "/adapters"]
EXPOSE 50051 8080
# The first start fetches and converts the model.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-m", "server.healthcheck"]
ENTRYPOINT ["kasa"]
CMD ["serve"]

FROM runtime AS gpu
COPY --from=build-gpu /opt/kasa /opt/kasa
ENV KASA_DEVICE=cuda

FROM runtime AS cpu
COPY --from=build-cpu /opt/kasa /opt/kasa
