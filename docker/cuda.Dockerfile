# syntax=docker/dockerfile:1
# gpt2-bundle serve on an NVIDIA GPU, without TensorFlow. From the root of a checkout:
#   docker build -f docker/cuda.Dockerfile -t gpt2-bundle-serve:0.1.0-cuda .
# onnxruntime-gpu is built for CUDA 13 from 1.27 on. Ubuntu 24.04 has Python 3.12.
FROM ubuntu:24.04 AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
# The packages first, in a layer that a change of the code leaves as it is.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY serving/__init__.py serving/__init__.py
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check --constraint constraints.txt '.[serve,onnx-gpu,guided]'
COPY serving serving
# tokenizers asks for the client of a hub, which only a download needs; other packages bring their tests.
RUN /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps --force-reinstall . \
    && /opt/venv/bin/pip uninstall --yes --quiet \
        huggingface_hub hf-xet httpx2 httpcore2 truststore fsspec filelock tqdm PyYAML pip \
    && find /opt/venv -depth -type d -name tests -exec rm -r {} +

FROM nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp
USER 65532:65532
EXPOSE 8000 8001
STOPSIGNAL SIGTERM
ENTRYPOINT ["gpt2-bundle", "serve"]
CMD ["--help"]
