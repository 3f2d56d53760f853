# Two stages: the first has compilers and pip, the second only the virtual environment.
FROM python:3.12-slim AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY store store
COPY reconciler reconciler
COPY adapters adapters
COPY examples examples
RUN python -m venv /opt/venv \
 && /opt/venv/bin/pip install --no-cache-dir --constraint constraints.txt '.[adk]'

FROM python:3.12-slim
RUN useradd --system --no-create-home --uid 10001 reconciler
COPY --from=build /opt/venv /opt/venv
COPY examples /app/examples
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /app
USER 10001
ENTRYPOINT []
CMD ["agent-reconciler", "worker"]
