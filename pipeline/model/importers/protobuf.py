"""The wire format of protocol buffers, as much of it as reading weights needs.

A message is a list of fields: a tag (number and wire type), then a value. Nothing is allocated that the bytes
don't hold, and a damaged message ends in a CheckpointError, never in a crash or an endless loop. Source:
protobuf.dev/programming-guides/encoding.
"""

import struct
from collections.abc import Iterator

from pipeline.errors import CheckpointError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}
_MAX_VARINT_BYTES = 10  # 64 bits in groups of seven


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field in order: an integer, or the bytes of anything else.

    Raises:
        CheckpointError: the message is cut off, or holds what the format doesn't know.
    """
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == _VARINT:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire_type == _BYTES:
            size, position = _varint(message, position)
        elif wire_type in _FIXED_SIZES:
            size = _FIXED_SIZES[wire_type]
        else:
            raise CheckpointError(f"damaged protobuf message: wire type {wire_type} of field {number}")
        if size > len(message) - position:
            raise CheckpointError(
                f"damaged protobuf message: field {number} of {size} bytes, {len(message) - position} left"
            )
        yield number, message[position : position + size]
        position += size


def message_of(value: int | memoryview) -> memoryview:
    """The bytes of a field that must have some. Raises: CheckpointError for a number."""
    if isinstance(value, int):
        raise CheckpointError("damaged protobuf message: a number in the place of a message")
    return value


def integers(value: int | memoryview) -> list[int]:
    """The integers of a field, one or packed."""
    if isinstance(value, int):
        return [value]
    found, position = [], 0
    while position < len(value):
        number, position = _varint(value, position)
        found.append(number)
    return found


def floats(value: int | memoryview) -> tuple[float, ...]:
    """The 32-bit floats of a field, one or packed."""
    data = message_of(value)
    if len(data) % 4:
        raise CheckpointError(f"damaged protobuf message: {len(data)} bytes are no 32-bit numbers")
    return struct.unpack(f"<{len(data) // 4}f", data)


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """The integer that starts at the position, and the position after it."""
    result = 0
    for index, byte in enumerate(message[position : position + _MAX_VARINT_BYTES]):
        result |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return result, position + index + 1
    raise CheckpointError(f"damaged protobuf message: no end of the number at byte {position}")
