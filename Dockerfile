# syntax=docker/dockerfile:1
# Build: docker build -t kasa-runtime .
# Run:   docker run -p 127.0.0.1:50051:50051 -p 127.0.0.1:8080:8080 -e KASA_INSECURE=true \
#            -v kasa-home:/var/lib/kasa -v "$PWD/adapters:/adapters" kasa-runtime
# For others than this machine: TLS and tokens in place of KASA_INSECURE, docs/security.md.

FROM python:3.12-slim AS build
WORKDIR /src
RUN python -m venv /opt/kasa
COPY pyproject.toml README.md LICENSE ./
COPY proto ./proto
COPY kasa_runtime ./kasa_runtime
COPY server ./server
RUN /opt/kasa/bin/pip install --no-cache-dir .

FROM python:3.12-slim
# The openvino executor compiles one small operation for the processor that it runs on.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN useradd --system --uid 10001 --create-home kasa \
    && mkdir -p /var/lib/kasa /adapters \
    && chown kasa:kasa /var/lib/kasa /adapters
COPY --from=build /opt/kasa /opt/kasa
ENV PATH=/opt/kasa/bin:$PATH KASA_HOME=/var/lib/kasa PYTHONUNBUFFERED=1
USER kasa
VOLUME ["/var/lib/kasa", "/adapters"]
EXPOSE 50051 8080
# The first start fetches the model, hence the long start period.
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m --retries=3 \
    CMD ["python", "-m", "server.healthcheck"]
ENTRYPOINT ["kasa"]
CMD ["serve", "--host", "0.0.0.0", "--adapters-dir", "/adapters"]
