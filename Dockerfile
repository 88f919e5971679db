# docker build -t tamiyo . --build-arg PIP_EXTRA_INDEX_URL=<index of PyTorch's CPU or CUDA wheels>
# Without that argument pip takes the torch wheel of its default index, which may bring CUDA along.
ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim-bookworm AS build
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
COPY pyproject.toml constraints.txt README.md ./
COPY tamiyo_svc ./tamiyo_svc
RUN python -m venv /opt/tamiyo \
    && /opt/tamiyo/bin/pip install -c constraints.txt ".[demo]"

FROM python:${PYTHON_VERSION}-slim-bookworm
LABEL org.opencontainers.image.title="tamiyo" \
      org.opencontainers.image.description="Strategic controller for morphogenetic training" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 tamiyo \
    && useradd --uid 10001 --gid tamiyo --no-create-home --home-dir /var/lib/tamiyo tamiyo \
    && install -d -o tamiyo -g tamiyo /var/lib/tamiyo
COPY --from=build /opt/tamiyo /opt/tamiyo
ENV PATH=/opt/tamiyo/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    TAMIYO_STATE_DIR=/var/lib/tamiyo \
    TAMIYO_LOG_FORMAT=json
USER 10001:10001
WORKDIR /var/lib/tamiyo
EXPOSE 9464
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:9464/livez', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["tamiyo"]
CMD ["serve"]
