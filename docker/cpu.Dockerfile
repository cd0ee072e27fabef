# syntax=docker/dockerfile:1
# gpt2-bundle serve on processors, without TensorFlow. From the root of a checkout:
#   docker build -f docker/cpu.Dockerfile -t gpt2-bundle-serve:0.1.0-cpu .
FROM python:3.12-slim AS build
WORKDIR /src
# The packages first, in a layer that a change of the code leaves as it is.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY serving/__init__.py serving/__init__.py
RUN python -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check --constraint constraints.txt '.[serve,onnx,guided]'
COPY serving serving
# tokenizers asks for the client of a hub, which only a download needs; other packages bring their tests.
RUN /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps --force-reinstall . \
    && /opt/venv/bin/pip uninstall --yes --quiet \
        huggingface_hub hf-xet httpx2 httpcore2 truststore fsspec filelock tqdm PyYAML pip \
    && find /opt/venv -depth -type d -name tests -exec rm -r {} +

FROM python:3.12-slim
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
