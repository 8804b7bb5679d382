"""The committed gRPC code: whole, made by the pinned tools, loadable beside the installed protobuf and grpcio."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor, FileDescriptor

PACKAGE = "twinpool.proto.twinpool.v1"
PROTO_FOLDER = "proto/twinpool/v1"
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")
GRPC_TOOLS = "1.76.0"


@pytest.fixture(scope="module")
def sources(root: Path) -> list[Path]:
    found = sorted((root / PROTO_FOLDER).glob("*.proto"))
    assert found, "no .proto file"
    return found


def messages(descriptor: FileDescriptor | Descriptor) -> Iterator[Descriptor]:
    """Messages of a file or a message, nested ones included."""
    inner = (
        descriptor.message_types_by_name if isinstance(descriptor, FileDescriptor) else descriptor.nested_types_by_name
    )
    for message in inner.values():
        yield message
        yield from messages(message)


def test_every_proto_has_its_four_files(root: Path, sources: list[Path]) -> None:
    expected = {source.stem + suffix for source in sources for suffix in SUFFIXES}
    found = {path.name for path in (root / PROTO_FOLDER).iterdir() if "_pb2" in path.name}
    assert found == expected


def test_made_by_the_pinned_tools(sources: list[Path]) -> None:
    for source in sources:
        module = importlib.import_module(f"{PACKAGE}.{source.stem}_pb2_grpc")
        assert module.GRPC_GENERATED_VERSION == GRPC_TOOLS


def test_holds_what_the_proto_names(sources: list[Path]) -> None:
    for source in sources:
        importlib.import_module(f"{PACKAGE}.{source.stem}_pb2")
        file = descriptor_pool.Default().FindFileByName(f"twinpool/{PROTO_FOLDER}/{source.name}")
        text = source.read_text(encoding="utf-8")
        assert {message.name for message in messages(file)} >= set(re.findall(r"^\s*message (\w+)", text, re.M))
        assert set(file.services_by_name) == set(re.findall(r"^service (\w+)", text, re.M))


def test_no_field_is_named_descriptor(sources: list[Path]) -> None:
    """The C++ that protoc writes for such a field does not compile."""
    for source in sources:
        file = importlib.import_module(f"{PACKAGE}.{source.stem}_pb2").DESCRIPTOR
        assert [m.full_name for m in messages(file) if "descriptor" in m.fields_by_name] == []


def test_up_to_date(root: Path) -> None:
    if not (root / ".venv-gen" / ".stamp").exists():
        pytest.skip("the generator is not installed; `make check` installs it")
    environment = {**os.environ, "PYTHON": sys.executable}
    run = subprocess.run(
        [root / "proto" / "generate.sh", "--check"], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
