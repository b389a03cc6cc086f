# fewstep for CUDA: PyTorch's wheels bring CUDA along; the host provides the driver (docker run --gpus all).
#   docker build -t fewstep . && docker run --gpus all -v "$PWD:/work" fewstep sample "three frogs on yellow"
FROM python:3.12-slim AS build
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist /source

FROM python:3.12-slim
ARG EXTRAS=metrics,quantize
RUN --mount=type=bind,from=build,source=/dist,target=/dist \
    --mount=type=bind,source=constraints.txt,target=/constraints.txt \
    pip install --no-cache-dir --constraint /constraints.txt "$(ls /dist/fewstep-*.whl)[${EXTRAS}]"
WORKDIR /work
ENTRYPOINT ["fewstep"]
