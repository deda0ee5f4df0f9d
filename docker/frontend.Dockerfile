# The gateway before several backends: nginx with the page, and the process that finds the backends by name.
#
#   docker build -f docker/frontend.Dockerfile -t beeline-gateway:0.1.0 .
#   docker run -e BEELINE_BACKENDS=http://backend:8080 -p 8000:8000 -p 8080:8080 beeline-gateway:0.1.0
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS environment
COPY requirements/gateway.txt /requirements/
RUN python -m venv --without-pip /opt/venv \
    && pip --python /opt/venv install --no-cache-dir --no-deps --require-hashes -r /requirements/gateway.txt
COPY docker/beeline.pth /opt/venv/lib/python3.11/site-packages/

FROM ${PYTHON_IMAGE}
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends nginx-light tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/* \
    && useradd --uid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin beeline
COPY docker/healthcheck docker/beeline /usr/local/bin/
COPY --from=environment /opt/venv /opt/venv
WORKDIR /opt/beeline
COPY handlers/beeline handlers/beeline
COPY host host
COPY archive archive
COPY serve serve
COPY cli cli
COPY config config
COPY frontend frontend
# The checkout may have a strict umask.
RUN chmod -R a+rX /opt/beeline /usr/local/bin && python -m compileall -q .
ENV PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 \
    BEELINE_STATE=/tmp/beeline \
    BEELINE_INFERENCE_ADDRESS=http://0.0.0.0:8080 \
    BEELINE_PAGE_ADDRESS=http://0.0.0.0:8000 \
    BEELINE_BACKENDS=http://backend:8080 \
    BEELINE_DRAIN_SECONDS=3 BEELINE_STOP_SECONDS=60 \
    BEELINE_LOG_MEGABYTES=2 BEELINE_LOG_FILES=1
USER 10001:10001
EXPOSE 8000 8080 8081
HEALTHCHECK --interval=5s --timeout=3s --start-period=120s --retries=3 CMD ["healthcheck"]
ENTRYPOINT ["tini", "--", "beeline", "serve", "gateway", "--show-logs", "all"]
