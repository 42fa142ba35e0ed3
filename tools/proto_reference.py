"""The wire contract as one page of Markdown, made of the comments in the .proto files."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc_tools
from google.protobuf import descriptor_pb2
from grpc_tools import protoc

Field = descriptor_pb2.FieldDescriptorProto
TYPES = {number: name.removeprefix("TYPE_").lower() for name, number in Field.Type.items()}
TITLE = """# gRPC

Package `kasa.v1`, port 50051 by default; `grpc.health.v1.Health` and server reflection are served
beside it. This page is made of the comments in `proto/kasa/v1`.
"""
# Numbers of fields in descriptor.proto, of which the paths of comments are made.
MESSAGES, ENUMS, SERVICES, SYNTAX = 4, 5, 6, 12
MEMBERS, NESTED = 2, 3


def wire_reference(folder: Path) -> str:
    """The page for all .proto files of `folder`, which is `<root>/kasa/v1`."""
    return "\n\n".join([TITLE, *(part for file in _files(folder) for part in _File(file).parts())])


def _files(folder: Path) -> list[descriptor_pb2.FileDescriptorProto]:
    """The descriptors of the .proto files, comments included. Raises RuntimeError."""
    root = folder.parents[1]
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    names = [path.relative_to(root).as_posix() for path in sorted(folder.glob("*.proto"))]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "set")
        includes = [f"--proto_path={root}", f"--proto_path={well_known}"]
        flags = ["--include_source_info", f"--descriptor_set_out={out}"]
        if protoc.main(["protoc", *includes, *flags, *names]) != 0:
            raise RuntimeError(f"protoc refused {', '.join(names)}; its messages are above")
        return list(descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file)


class _File:
    """One .proto file."""

    def __init__(self, file: descriptor_pb2.FileDescriptorProto) -> None:
        self._file = file
        self._comments = {tuple(at.path): at for at in file.source_code_info.location}

    def parts(self) -> Iterator[str]:
        """Blocks of Markdown, in the order of the file."""
        yield f"## {self._file.name}"
        yield _text("\n".join(self._comments[(SYNTAX,)].leading_detached_comments))
        for index, service in enumerate(self._file.service):
            yield from self._service(service, (SERVICES, index))
        for index, message in enumerate(self._file.message_type):
            yield from self._message(message, (MESSAGES, index))
        for index, enum in enumerate(self._file.enum_type):
            yield from self._enum(enum, (ENUMS, index))

    def _comment(self, path: tuple[int, ...]) -> str:
        return _text(self._comments[path].leading_comments)

    def _service(self, service: Any, path: tuple[int, ...]) -> Iterator[str]:
        yield f"### {service.name}"
        yield self._comment(path)
        for index, method in enumerate(service.method):
            yield f"#### {service.name}.{method.name}"
            sent = "stream " * method.client_streaming + _type_name(method.input_type)
            answered = "stream " * method.server_streaming + _type_name(method.output_type)
            yield f"{sent} → {answered}"
            yield self._comment((*path, MEMBERS, index))

    def _message(self, message: Any, path: tuple[int, ...]) -> Iterator[str]:
        yield f"### {message.name}"
        yield self._comment(path)
        rows = [
            f"| `{field.name}` | {_field_type(field, message)} | {_cell(self._comment(at))} |"
            for index, field in enumerate(message.field)
            for at in [(*path, MEMBERS, index)]
        ]
        yield _table("field", "type", rows) if rows else "No fields."
        for index, nested in enumerate(message.nested_type):
            yield from self._message(nested, (*path, NESTED, index))

    def _enum(self, enum: Any, path: tuple[int, ...]) -> Iterator[str]:
        yield f"### {enum.name}"
        yield self._comment(path)
        rows = [
            f"| `{value.name}` | {value.number} | {_cell(self._comment((*path, MEMBERS, index)))} |"
            for index, value in enumerate(enum.value)
        ]
        yield _table("value", "number", rows)


def _text(comment: str) -> str:
    """A comment as Markdown that shows every character of it."""
    return re.sub(r"([<*|\[\]\\])", r"\\\1", re.sub(r"(?m)^ ", "", comment).strip())


def _cell(text: str) -> str:
    return " ".join(text.split())


def _table(name: str, kind: str, rows: list[str]) -> str:
    return "\n".join([f"| {name} | {kind} | |", "|---|---|---|", *rows])


def _field_type(field: Any, message: Any) -> str:
    name = _type_name(field.type_name) if field.type_name else TYPES[field.type]
    if field.label == Field.LABEL_REPEATED:
        return f"repeated {name}"
    if field.proto3_optional:
        return f"optional {name}"
    if field.HasField("oneof_index"):
        return f"{name}, one of `{message.oneof_decl[field.oneof_index].name}`"
    return name


def _type_name(full: str) -> str:
    """`full` is `.package.Name`; a name of this package is a link to its heading."""
    package, _, name = full.rpartition(".")
    return f"[{name}](#{name.lower()})" if package == ".kasa.v1" else full.removeprefix(".")
