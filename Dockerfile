# One build, two images: `docker build --target web .` and `docker build --target worker .`
ARG PYTHON_IMAGE=python:3.13-slim-trixie

FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# Without pip of its own: what runs in production cannot install anything.
RUN python -m venv --without-pip /opt/headway
WORKDIR /src
COPY requirements/base.txt requirements/base.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/headway/bin/python install --require-hashes --only-binary :all: -r requirements/base.txt
COPY pyproject.toml README.md LICENSE ./
COPY headway headway
COPY services services
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/headway/bin/python install --no-deps .

FROM ${PYTHON_IMAGE} AS runtime
COPY --from=build /opt/headway /opt/headway
ENV PATH=/opt/headway/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/data \
    HEADWAY_HOME=/data \
    HEADWAY_FILES_URL=file:///data/files \
    HEADWAY_HOST=0.0.0.0 \
    HEADWAY_PORT=8000 \
    HEADWAY_OPS_HOST=0.0.0.0 \
    HEADWAY_OPS_PORT=9000
# A new named volume takes its owner from this folder.
RUN install -d -o 10001 -g 10001 /data /data/files
WORKDIR /data
USER 10001:10001
STOPSIGNAL SIGTERM
EXPOSE 9000
HEALTHCHECK --interval=5s --timeout=3s --start-period=60s --retries=3 CMD ["python", "-c", "\
import http.client, os\n\
ops = http.client.HTTPConnection('127.0.0.1', int(os.environ['HEADWAY_OPS_PORT']), timeout=2)\n\
ops.request('GET', '/livez')\n\
raise SystemExit(ops.getresponse().status != 200)"]

FROM runtime AS worker
# For kinds of one's own: `COPY reports.py /kinds/` in an image built on this one.
ENV PYTHONPATH=/kinds
CMD ["python", "-m", "services.worker"]

FROM runtime AS web
EXPOSE 8000
CMD ["python", "-m", "services.web"]
