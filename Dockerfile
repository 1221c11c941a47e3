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
RUN python -m pip install --no-cache-dir -c constraints.txt '.[http,crypto,metrics]'
COPY examples examples

ENV DURABLY_DATA_DIR=/data
VOLUME /data
USER durably
ENTRYPOINT ["durably"]
CMD ["--help"]
