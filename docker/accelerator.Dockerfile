# The backend for NVIDIA GPUs: TorchServe with PyTorch's CUDA build, and its own gateway on 8080. It contains no
# archive: mount model_store. The host needs only NVIDIA's driver and container toolkit.
#
#   docker build -f docker/accelerator.Dockerfile -t beeline-accelerator:0.1.0 .
#   docker run --gpus all -p 8080:8080 -v "$PWD/model_store:/model_store:ro" beeline-accelerator:0.1.0
#
# Another device, such as AWS Neuron, needs three things: its build of PyTorch in an environment as below, its name
# among the devices in handlers/beeline/engines, and a way to count it in host/machine.py. None of them exists yet.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS environment
COPY requirements/image-accelerator.txt /requirements/
RUN python -m venv --without-pip /opt/venv \
    && pip --python /opt/venv install --no-cache-dir --no-deps --require-hashes -r /requirements/image-accelerator.txt
COPY docker/beeline.pth /opt/venv/lib/python3.11/site-packages/

FROM ${PYTHON_IMAGE}
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends nginx-light tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/* \
    && useradd --uid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin beeline \
    && mkdir /model_store
COPY docker/entrypoint docker/healthcheck docker/beeline /usr/local/bin/
COPY --from=environment /opt/venv /opt/venv
WORKDIR /opt/beeline
COPY handlers handlers
COPY host host
COPY archive archive
COPY serve serve
COPY cli cli
COPY config config
COPY frontend frontend
# The checkout may have a strict umask.
RUN chmod -R a+rX /opt/beeline /usr/local/bin && python -m compileall -q .
ENV PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 \
    # Makes nvidia-smi (which counts the GPUs), CUDA and nvJPEG's hardware decoder available.
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility,video \
    BEELINE_SERVER=torchserve \
    BEELINE_STATE=/tmp/beeline \
    BEELINE_INFERENCE_ADDRESS=http://0.0.0.0:8080 \
    BEELINE_DRAIN_SECONDS=3 BEELINE_STOP_SECONDS=60 \
    BEELINE_LOG_MEGABYTES=2 BEELINE_LOG_FILES=1
USER 10001:10001
EXPOSE 8080
HEALTHCHECK --interval=5s --timeout=3s --start-period=180s --retries=3 CMD ["healthcheck"]
ENTRYPOINT ["tini", "--", "entrypoint"]
