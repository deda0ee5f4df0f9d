# The CPU backend: a server, an archive, and its own gateway on 8080. Two targets: `torchserve`, the last one, and
# `mms`. Neither contains anything of the stage that trains.
#
#   docker build -f docker/cpu.Dockerfile -t beeline-cpu:0.1.0 .
#   docker run -p 8080:8080 -e BATCH_SIZE=32 -e WORKERS=2 -e LINGER_MS=10 beeline-cpu:0.1.0
#
# To pin the base: --build-arg PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

# ---- The archive: trained here on downloaded pictures, or on drawn ones if no download is possible. To use your own
# pictures, build it outside (`make serve`, or the service `archive` of docker-compose.yml) and mount model_store.
FROM ${PYTHON_IMAGE} AS archive
ENV UV_PYTHON_DOWNLOADS=never UV_SYSTEM_CERTS=1 UV_NO_PROGRESS=1 UV_NO_CACHE=1 PATH=/opt/beeline/.venv/bin:$PATH
WORKDIR /opt/beeline
COPY requirements/uv.txt requirements/main.txt requirements/
RUN pip install --no-cache-dir --require-hashes -r requirements/uv.txt \
    && uv venv --quiet .venv \
    && uv pip install --quiet --require-hashes --no-deps --compile-bytecode -r requirements/main.txt
COPY pyproject.toml ./
COPY handlers handlers
COPY host host
COPY archive archive
COPY train train
COPY cli cli
COPY config/train config/train
RUN uv pip install --quiet --no-deps --no-build-isolation --editable .
COPY docker/train /usr/local/bin/
ENTRYPOINT ["train"]

FROM archive AS trained
# Arguments of `beeline train`: `--generated` draws the pictures without trying a download.
ARG TRAINING=""
# Quick, so that a build takes no minutes; for all epochs use the service `archive`, or mount model_store.
# hadolint ignore=SC2086
RUN train --quick ${TRAINING}

# ---- Pillow-SIMD replaces Pillow where it can be built: x86-64. Debian's libjpeg is libjpeg-turbo.
FROM ${PYTHON_IMAGE} AS pillow
# The processor features that are required. "cc -mavx2" is faster if every machine that runs it is from 2013 or later.
ARG SIMD_CC="cc -msse4.2"
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev pkgconf libjpeg62-turbo-dev zlib1g-dev libwebp-dev libtiff-dev
COPY requirements/pillow-simd.txt requirements/main.txt /requirements/
# Built with the hashed setuptools of that file; pip would fetch its own without a hash.
RUN one() { sed -n "/^$1==/,/# via/p" "/requirements/$2.txt" > "/requirements/$1.one"; } \
    && if [ "$(uname -m)" = x86_64 ]; \
    then one setuptools pillow-simd && one pillow-simd pillow-simd && one pillow-avif-plugin pillow-simd \
         && pip install --no-cache-dir --no-deps --require-hashes -r /requirements/setuptools.one \
         && pip wheel --no-cache-dir --no-deps --only-binary :all: --require-hashes -w /wheels -r /requirements/pillow-avif-plugin.one \
         && CC=${SIMD_CC} pip wheel --no-cache-dir --no-deps --no-build-isolation --require-hashes -w /wheels -r /requirements/pillow-simd.one; \
    else one pillow main \
         && pip wheel --no-cache-dir --no-deps --require-hashes -w /wheels -r /requirements/pillow.one; fi

# ---- One environment for each server, with only what its processes import.
FROM ${PYTHON_IMAGE} AS environment
# Engines in addition to OpenVINO: torch, onnxruntime, or both with a space between them.
ARG ENGINES=""
# PyTorch's own index of builds without CUDA. Empty: pip's default index. PyTorch is the only package without a hash,
# because each index and each platform has a different build of the same version.
ARG PYTORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements/main.in requirements/image-torch.txt requirements/image-onnxruntime.txt /requirements/
WORKDIR /opt/venv/lib/python3.11/site-packages
# hadolint ignore=DL3013
RUN python -c 'import sys; assert sys.version_info[:2] == (3, 11), "PYTHON_IMAGE must be a Python 3.11"' \
    && python -m venv --without-pip /opt/venv \
    && for engine in ${ENGINES}; do \
        case "${engine}" in \
            torch) pip --python /opt/venv install --no-cache-dir --no-deps ${PYTORCH_INDEX:+--index-url ${PYTORCH_INDEX}} \
                "$(grep '^torch==' /requirements/main.in)" || exit ;; \
            onnxruntime) ;; \
            *) echo "ENGINES has '${engine}'; allowed: torch, onnxruntime" >&2; exit 2 ;; \
        esac; \
        pip --python /opt/venv install --no-cache-dir --no-deps --require-hashes -r "/requirements/image-${engine}.txt" || exit; \
    done
# Headers, static libraries, tools and tests serve only those who compile against PyTorch.
RUN if [ -d torch ]; then \
        /opt/venv/bin/python -c 'import torch; assert torch.version.cuda is None, "this index has no PyTorch for CPUs"' \
        && rm -rf torch/include torch/share torch/test /opt/venv/share \
        && find torch/bin -type f -not -name torch_shm_manager -delete \
        && find torch \( -name '*.a' -o -name '*.pyi' \) -delete; \
    fi
# The project's packages, as in an editable install. Workers see only the ones in their archive.
COPY docker/beeline.pth /opt/venv/lib/python3.11/site-packages/
COPY --from=pillow /wheels /wheels
# OpenVINO's plugins for other devices and its readers of other formats: 80 of 178 MB.
ENV OPENVINO_UNUSED=".*(_gpu_.*|_npu_.*|cache[.]json|openvino_(onnx|tensorflow|tensorflow_lite|pytorch|paddle|jax|gguf)_frontend[.]so.*|/include/.*|/cmake/.*)"

FROM environment AS environment-torchserve
COPY requirements/image-torchserve.txt /requirements/
RUN pip --python /opt/venv install --no-cache-dir --no-deps /wheels/*.whl \
    && pip --python /opt/venv install --no-cache-dir --no-deps --require-hashes -r /requirements/image-torchserve.txt \
    && find openvino -regextype egrep -regex "${OPENVINO_UNUSED}" -delete

FROM environment AS environment-mms
COPY requirements/image-mms.txt /requirements/
RUN pip --python /opt/venv install --no-cache-dir --no-deps /wheels/*.whl \
    && pip --python /opt/venv install --no-cache-dir --no-deps --require-hashes -r /requirements/image-mms.txt \
    && find openvino -regextype egrep -regex "${OPENVINO_UNUSED}" -delete

# ---- The common base of both servers' images.
FROM ${PYTHON_IMAGE} AS base
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends nginx-light tini libjpeg62-turbo libwebp7 libwebpmux3 libwebpdemux2 libtiff6 libgomp1 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/* \
    && useradd --uid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin beeline \
    && mkdir /model_store
COPY docker/entrypoint docker/healthcheck docker/beeline /usr/local/bin/
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
# Processes write only to /tmp: mount a tmpfs there, and the rest may be read-only.
ENV PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 \
    BEELINE_STATE=/tmp/beeline \
    BEELINE_INFERENCE_ADDRESS=http://0.0.0.0:8080 \
    BEELINE_DRAIN_SECONDS=3 BEELINE_STOP_SECONDS=60 \
    BEELINE_LOG_MEGABYTES=2 BEELINE_LOG_FILES=1
USER 10001:10001
# SageMaker may choose the port: SAGEMAKER_BIND_TO_PORT.
LABEL com.amazonaws.sagemaker.capabilities.accept-bind-to-port=true
EXPOSE 8080
HEALTHCHECK --interval=5s --timeout=3s --start-period=120s --retries=3 CMD ["healthcheck"]
ENTRYPOINT ["tini", "--", "entrypoint"]

# ---- Multi Model Server
FROM base AS mms
ENV BEELINE_SERVER=mms BEELINE_MMS_PYTHON=/opt/venv/bin/python
COPY --from=environment-mms /opt/venv /opt/venv
COPY --from=trained /opt/beeline/model_store /opt/beeline/model_store

# ---- TorchServe
FROM base AS server
ENV BEELINE_SERVER=torchserve
COPY --from=environment-torchserve /opt/venv /opt/venv

# ---- The bill of materials (`make sbom`), written by tools that are in no image. This target trains nothing.
FROM server AS counted
# hadolint ignore=DL3002
USER 0
COPY requirements/sbom.txt /requirements/
RUN python -m venv --without-pip /opt/sbom \
    && pip --python /opt/sbom install --no-cache-dir --no-deps --require-hashes -r /requirements/sbom.txt \
    && mkdir /bill \
    && /opt/sbom/bin/cyclonedx-py environment --output-reproducible -o /bill/python.json /opt/venv/bin/python \
    && /opt/sbom/bin/distro2sbom --distro deb --system --sbom cyclonedx --format json -o /bill/debian.json

FROM scratch AS bill
COPY --from=counted /bill /

# ---- The default target.
FROM server AS torchserve
COPY --from=trained /opt/beeline/model_store /opt/beeline/model_store
