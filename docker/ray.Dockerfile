# syntax=docker/dockerfile:1
# Pods of a Ray cluster that serves a bundle on processors, by KubeRay. From the root of a checkout:
#   docker build -f docker/ray.Dockerfile -t gpt2-bundle-ray:0.1.0-cpu .
FROM python:3.12-slim AS build
WORKDIR /src
# The packages first, in a layer that a change of the code leaves as it is.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY serving/__init__.py serving/__init__.py
RUN python -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check --constraint constraints.txt '.[serve,onnx,guided,ray]'
COPY serving serving
RUN /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps --force-reinstall . \
    && /opt/venv/bin/pip uninstall --yes --quiet pip

FROM python:3.12-slim
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp
USER 65532:65532
EXPOSE 8000 6379 8265 10001
# KubeRay gives the command.
CMD ["ray", "--help"]
