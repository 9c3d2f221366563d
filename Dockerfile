# syntax=docker/dockerfile:1

# One image for every process: web is what it runs unless told otherwise; docker-compose.yml has the commands of the others.
ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS build

# The release that reads uv.lock as it was written. It stays behind in this stage.
RUN pip install --no-cache-dir uv==0.13.8

ENV UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    UV_PROJECT_ENVIRONMENT=/venv \
    UV_PYTHON=/usr/local/bin/python \
    UV_PYTHON_DOWNLOADS=never

# First what changes rarely, the packages: as long as the lock stays, their layer is taken from the cache, and neither
# built nor sent anew. Sources of translations and tests of packages are 20 MB that nothing reads.
WORKDIR /build
COPY pyproject.toml uv.lock ./
RUN --mount=type=cache,target=/root/.cache/uv \
    uv sync --frozen --no-default-groups --group serve --no-install-project && \
    find /venv \( -name '*.po' -o -path '*/tests/*' \) -delete

WORKDIR /app
COPY manage.py Procfile ./
COPY threads threads/
COPY tools tools/
COPY runs runs/
COPY agents_project agents_project/
# No database, no secret and no network is needed here, so none can stay in a layer.
RUN /venv/bin/python -m compileall -q . && \
    /venv/bin/python manage.py collectstatic --no-input --verbosity 0


FROM python:${PYTHON}-slim

# A number of its own, the same in each build, for whoever gives it rights on a volume. Nothing in the image belongs to it.
RUN useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin longhaul

ENV PATH=/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

WORKDIR /app
COPY --from=build /venv /venv
COPY --from=build /app /app

USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# Web's. A container with another command needs another check: `python -m agents_project.probe agents`.
HEALTHCHECK --interval=15s --timeout=10s --start-period=60s --start-interval=2s --retries=3 \
    CMD ["python", "-m", "agents_project.probe", "web"]
CMD ["uvicorn", "agents_project.asgi:application", "--host", "0.0.0.0", "--port", "8000", "--timeout-graceful-shutdown", "5"]
