# A Python that this machine lacks, of Debian's next release, with the environment that the tests run in; see tests/pythons.
FROM debian:bookworm-slim
ARG PYTHON=python3.14
# A release is skipped: OpenSSL has moved a file from one package to another since.
# hadolint ignore=DL3008
RUN sed -i s/bookworm/forky/ /etc/apt/sources.list.d/* && apt-get update \
    && apt-get install -y --no-install-recommends -o Dpkg::Options::=--force-overwrite "$PYTHON-venv"
ENV UV_SYSTEM_CERTS=1 UV_NO_CACHE=1 UV_NO_PROGRESS=1 PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1
COPY requirements/uv.txt requirements/main.txt requirements/extras.txt /requirements/
RUN "$PYTHON" -m venv /opt/venv \
    && pip install --no-cache-dir --require-hashes -r /requirements/uv.txt \
    && uv pip install --quiet --python /opt/venv/bin/python --require-hashes --no-deps --compile-bytecode \
       -r /requirements/main.txt -r /requirements/extras.txt
COPY docker/beeline.pth /requirements/
RUN cp /requirements/beeline.pth /opt/venv/lib/"$PYTHON"/site-packages/
# Read-only, as it is mounted: what Hypothesis remembers goes elsewhere.
ENV HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis
WORKDIR /opt/beeline
