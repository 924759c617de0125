# Everything that needs no GPU: Prefect's server and worker, MLflow, curation, and small models on a CPU. From the
# checkout's root (Cuvee runs from its checkout, because conf/ is not part of a wheel, so the image holds one):
#   docker build -f infra/images/data.Dockerfile -t cuvee-data:0.1.0 \
#     --build-arg COMMIT="$(git describe --always --dirty --abbrev=12)" .
FROM python:3.11.14-slim-bookworm

ARG TORCH=2.13.0
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# git: sources that are repositories. bubblewrap: the walls around model-written programs where the kernel lets it.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends bubblewrap git \
    && rm -rf /var/lib/apt/lists/*
# The CPU build, by itself: any other request for torch fetches gigabytes of CUDA libraries.
# setuptools: what it needs that the base has too old, and no other package asks for.
RUN pip install --no-deps --index-url https://download.pytorch.org/whl/cpu "torch==${TORCH}" \
    && pip install --no-deps setuptools==84.2.1

WORKDIR /opt/cuvee
COPY pyproject.toml constraints.txt requirements.lock README.md ./
COPY infra/images/requirements.py infra/images/locked.py /tmp/images/
RUN python /tmp/images/requirements.py kubernetes ray server > /tmp/images/wanted.txt \
    && pip install -q --dry-run --report /tmp/images/report.json -c constraints.txt -r /tmp/images/wanted.txt \
    && python /tmp/images/locked.py /tmp/images/report.json > /tmp/images/locked.txt \
    && pip install --no-deps --require-hashes -r /tmp/images/locked.txt \
    && rm -r /tmp/images
COPY conf conf
COPY flows flows
COPY stages stages
RUN pip install --no-deps -e . \
    && useradd --uid 10001 --user-group --home-dir /var/lib/cuvee --create-home cuvee

# Records name the commit; an image has no git history to ask.
ARG COMMIT=unknown
ENV CUVEE_COMMIT=${COMMIT} CUVEE_STATE=/var/lib/cuvee/state HOME=/var/lib/cuvee
WORKDIR /var/lib/cuvee
USER 10001:10001
ENTRYPOINT ["cuvee"]
CMD ["--help"]
