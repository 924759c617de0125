# What trains: NVIDIA's PyTorch with its torch, Transformer Engine and NCCL as they are (26.02: torch 2.11, CUDA 13,
# Transformer Engine 2.12, Python 3.12), and the pinned stack beside them. From the checkout's root:
#   docker build -f infra/images/train.Dockerfile -t cuvee-train:0.1.0 \
#     --build-arg COMMIT="$(git describe --always --dirty --abbrev=12)" .
FROM nvcr.io/nvidia/pytorch:26.02-py3

# The base constrains every `pip install` to versions of its own.
ENV PIP_CONSTRAINT="" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends bubblewrap git python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv --system-site-packages /opt/venv
ENV PATH=/opt/venv/bin:$PATH
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

WORKDIR /opt/cuvee
COPY pyproject.toml constraints.txt requirements.lock README.md ./
COPY infra/images/requirements.py infra/images/locked.py /tmp/images/
# The base's torch and Transformer Engine satisfy what is asked for; the build fails if anything would replace them.
RUN pip list --format=freeze | grep -iE '^(torch|triton|transformer.engine)' > /tmp/images/base.txt \
    && python /tmp/images/requirements.py > /tmp/images/wanted.txt \
    && pip install -q --dry-run --report /tmp/images/report.json \
        -c constraints.txt -c /tmp/images/base.txt -r /tmp/images/wanted.txt \
    && python /tmp/images/locked.py /tmp/images/report.json > /tmp/images/locked.txt \
    && pip install --no-deps --require-hashes -r /tmp/images/locked.txt \
    && test ! -e /opt/venv/lib/python3.12/site-packages/torch \
    && rm -r /tmp/images
COPY conf conf
COPY flows flows
COPY stages stages
RUN pip install --no-deps -e . \
    && useradd --uid 10001 --user-group --home-dir /var/lib/cuvee --create-home cuvee

ARG COMMIT=unknown
ENV CUVEE_COMMIT=${COMMIT} CUVEE_STATE=/var/lib/cuvee/state HOME=/var/lib/cuvee
WORKDIR /var/lib/cuvee
USER 10001:10001
ENTRYPOINT ["cuvee"]
CMD ["--help"]
