# docker build -t tamiyo .                                      the service on a CPU
# docker build -t tamiyo:latest-cuda --build-arg VARIANT=cuda . the service on a GPU
# docker build -t tamiyo:demo --build-arg EXTRAS=demo .         with the demo's trainer
#
# VARIANT picks the build of torch. Where the default index has no CPU build, the image gets the one
# with CUDA, which is larger; pass the index that has it as PIP_EXTRA_INDEX_URL.
ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim-bookworm AS build
ARG VARIANT=cpu
ARG EXTRAS=""
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY constraints.txt ./
# Torch first, in a layer of its own: it is nine tenths of the image and changes the least.
RUN python -m venv /opt/tamiyo \
    && version="$(sed -n 's/^torch==//p' constraints.txt)" \
    && install() { /opt/tamiyo/bin/pip install -c constraints.txt "torch==${version}$1"; } \
    && case "${VARIANT}" in cpu) install +cpu || install "" ;; cuda) install "" ;; *) exit 64 ;; esac
COPY pyproject.toml README.md LICENSE ./
COPY packages ./packages
COPY tamiyo_svc ./tamiyo_svc
# The network's CPU form is compiled here, so that the image for CPUs needs no compiler.
RUN /opt/tamiyo/bin/pip install -c constraints.txt ./packages/client ".${EXTRAS:+[${EXTRAS}]}" \
    && /opt/tamiyo/bin/tamiyo compile

FROM python:${PYTHON_VERSION}-slim-bookworm
ARG VARIANT=cpu
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="tamiyo" \
      org.opencontainers.image.description="Strategic controller for morphogenetic training" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
# On a GPU torch.compile starts a compiler when the service starts for the first time.
# hadolint ignore=DL3008
RUN if [ "${VARIANT}" = cuda ]; then \
        apt-get update \
        && apt-get install -y --no-install-recommends g++ \
        && rm -rf /var/lib/apt/lists/*; \
    fi
RUN groupadd --gid 10001 tamiyo \
    && useradd --uid 10001 --gid tamiyo --no-create-home --home-dir /var/lib/tamiyo tamiyo \
    && install -d -o tamiyo -g tamiyo /var/lib/tamiyo
COPY --from=build /opt/tamiyo /opt/tamiyo
# Nothing is written but the state and /tmp, so the root file system can be read-only.
ENV PATH=/opt/tamiyo/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    OMP_NUM_THREADS=1 \
    TORCHINDUCTOR_CACHE_DIR=/var/lib/tamiyo/inductor \
    TAMIYO_STATE_DIR=/var/lib/tamiyo \
    TAMIYO_LOG_FORMAT=json
VOLUME /var/lib/tamiyo
USER 10001:10001
WORKDIR /var/lib/tamiyo
EXPOSE 9464
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:9464/livez', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["tamiyo"]
CMD ["serve"]
