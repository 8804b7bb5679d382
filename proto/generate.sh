#!/usr/bin/env bash
# Generates the gRPC code beside each .proto, in an environment of its own: grpcio-tools 1.76.0 (the newest that
# coexists with Ray and vLLM) wants protobuf<7, the run-time packages want a newer one.
#   proto/generate.sh           writes the generated files
#   proto/generate.sh --check   writes them to a temporary folder and fails on a difference
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

requirements=(grpcio-tools==1.76.0 mypy-protobuf==5.1.0)
folder=twinpool/proto/twinpool/v1
venv=.venv-gen

if [[ "$(cat "$venv/.stamp" 2>/dev/null)" != "${requirements[*]}" ]]; then
    "${PYTHON:-python3}" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install --quiet "${requirements[@]}"
    echo "${requirements[*]}" >"$venv/.stamp"
fi

generate() {
    PATH="$PWD/$venv/bin:$PATH" "$venv/bin/python" -m grpc_tools.protoc -Isrc \
        --python_out="$1" --pyi_out="$1" --grpc_python_out="$1" --mypy_grpc_out="quiet:$1" "src/$folder"/*.proto
}

case "${1:-}" in
"") generate src ;;
--check)
    fresh=$(mktemp -d)
    trap 'rm -rf "$fresh"' EXIT
    generate "$fresh"
    if ! diff -r --exclude='*.proto' --exclude=__pycache__ "$fresh/$folder" "src/$folder"; then
        echo "generated gRPC code is out of date: run proto/generate.sh" >&2
        exit 1
    fi
    ;;
*)
    echo "usage: proto/generate.sh [--check]" >&2
    exit 2
    ;;
esac
