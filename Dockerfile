# Two images of the same files. `worker` (the last, so the default): the command line and the worker.
# `chat`: the example service, which needs google-adk and its 60 packages. pip stays in the build stages.
FROM python:3.12.8-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY store store
COPY reconciler reconciler
COPY adapters adapters
COPY examples examples
RUN python -m venv --without-pip /opt/venv \
 && pip --python /opt/venv/bin/python install --constraint constraints.txt .

FROM build AS build-chat
RUN pip --python /opt/venv/bin/python install --constraint constraints.txt '.[adk]'

FROM python:3.12.8-slim-bookworm AS base
# A new volume mounted at /archive or /spill takes its owner from here.
RUN useradd --system --no-create-home --uid 10001 reconciler \
 && mkdir /archive /spill && chown 10001:10001 /archive /spill
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
USER 10001:10001

FROM base AS chat
COPY --from=build-chat /opt/venv /opt/venv
COPY examples /app/examples
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s \
  CMD ["agent-reconciler", "health", "http://127.0.0.1:8000"]
CMD ["python", "examples/chat_server.py", "--http", "0.0.0.0:8000"]

FROM base AS worker
COPY --from=build /opt/venv /opt/venv
EXPOSE 9464
HEALTHCHECK --interval=15s --timeout=5s --start-period=15s \
  CMD ["agent-reconciler", "health", "http://127.0.0.1:9464"]
CMD ["agent-reconciler", "worker"]
