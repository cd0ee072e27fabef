"""Protobuf messages from short tables, in a descriptor pool of their own.

A table has a line for each message: its fields as `name:type=number`. A type is a scalar of protobuf's language or
another message of the table; a `*` after it makes it repeated, `map<type>` a map from strings, and a `|` behind the
number makes the field one of the message's only `oneof`. The pool is private, so that a program which also loads the
official generated code, where the same names are registered, is not disturbed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, message_factory, wrappers_pb2
from google.protobuf.message import DecodeError

from serving.errors import InputError

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "bool": _Field.TYPE_BOOL,
    "bytes": _Field.TYPE_BYTES,
    "double": _Field.TYPE_DOUBLE,
    "float": _Field.TYPE_FLOAT,
    "int32": _Field.TYPE_INT32,
    "int64": _Field.TYPE_INT64,
    "string": _Field.TYPE_STRING,
    "uint32": _Field.TYPE_UINT32,
    "uint64": _Field.TYPE_UINT64,
}
_WELL_KNOWN = {"Any": any_pb2, "Int64Value": wrappers_pb2}


def message_classes(package: str, table: Mapping[str, str]) -> dict[str, Any]:
    """A class for each message of `table`, by its name, in protobuf package `package`."""
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
    pool = descriptor_pool.DescriptorPool()
    for module in _WELL_KNOWN.values():
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
        file.dependency.append(module.DESCRIPTOR.name)
    for name, fields in table.items():
        message = file.message_type.add(name=name)
        for field in fields.split():
            _add_field(message, field, package)
    pool.AddSerializedFile(file.SerializeToString())
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}")) for name in table}


def read_message(data: bytes, message: Any) -> None:
    """Read `data` into the empty `message`. Raises InputError."""
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise InputError(f"the message is no {message.DESCRIPTOR.name}") from None


def _add_field(message: Any, text: str, package: str) -> None:
    name, _, rest = text.partition(":")
    kind, _, number = rest.partition("=")
    field = message.field.add(name=name, number=int(number.rstrip("|")), label=_Field.LABEL_OPTIONAL)
    if number.endswith("|"):
        if not message.oneof_decl:
            message.oneof_decl.add(name="choice")
        field.oneof_index = 0
    if kind.startswith("map<"):
        entry = message.nested_type.add(name="".join(part.capitalize() for part in name.split("_")) + "Entry")
        entry.options.map_entry = True
        _add_field(entry, "key:string=1", package)
        _add_field(entry, f"value:{kind[4:-1]}=2", package)
        field.type, field.label = _Field.TYPE_MESSAGE, _Field.LABEL_REPEATED
        field.type_name = f".{package}.{message.name}.{entry.name}"
        return
    if kind.endswith("*"):
        kind, field.label = kind[:-1], _Field.LABEL_REPEATED
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type = _Field.TYPE_MESSAGE
        field.type_name = f".google.protobuf.{kind}" if kind in _WELL_KNOWN else f".{package}.{kind}"
