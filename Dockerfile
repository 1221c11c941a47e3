# All processes of durably; the first argument says which: processor, worker, gateway, connectors, topics, …
#
# An image of your own adds your modules, and what they import:
#
#   FROM durably:local
#   COPY --chown=durably shop.py ./
ARG PYTHON_IMAGE=python:3.11-slim
FROM ${PYTHON_IMAGE}

RUN useradd --create-home --uid 1000 durably \
 && mkdir -p /data \
 && chown durably /data

WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY schemas schemas
COPY sdk sdk
COPY processor processor
COPY connectors connectors
RUN python -m pip install --no-cache-dir -c constraints.txt '.[http,crypto,faust,metrics,otel]'
COPY examples examples

# Unbuffered, so that the last words of a process that is killed are in its log.
ENV DURABLY_DATA_DIR=/data PYTHONUNBUFFERED=1
VOLUME /data
# By number: Kubernetes cannot tell of a name that it is not root's.
USER 1000
ENTRYPOINT ["durably"]
CMD ["--help"]
