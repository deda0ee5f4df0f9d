# The backend for NVIDIA GPUs: TorchServe with PyTorch's CUDA build, a gateway of its own on 8080. It holds no
# archive: mount model_store. The host needs NVIDIA's driver and its container toolkit, nothing else of CUDA.
#
#   docker build -f docker/accelerator.Dockerfile -t beeline-accelerator:0.1.0 .
#   docker run --gpus all -p 8080:8080 -v "$PWD/model_store:/model_store:ro" beeline-accelerator:0.1.0
#
# Another device (AWS Neuron, say) needs three things: its PyTorch in an environment as below, its name among the
# devices that handlers/beeline/engines chooses from, and its count in host/machine.py. None is written.
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
# Whatever the umask of the checkout was.
RUN chmod -R a+rX /opt/beeline /usr/local/bin && python -m compileall -q .
ENV PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 \
    # nvidia-smi, which counts the GPUs, CUDA, and nvJPEG's decoder in hardware.
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
