"""Annotations as XML from elsewhere: parsed without entities, and not of any size."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

from pipelines.errors import DataError

_LARGEST = 8 << 20  # bytes: VOC's largest annotation has 30 kB


def parse_xml(data: bytes, source: Path) -> ET.Element:
    """The root element.

    A document type, the only place where entities can be defined, is refused before parsing: a few
    lines of nested entities expand to gigabytes. The text must be UTF-8, so none can hide.

    Raises:
        DataError: it has one, is larger than any annotation, or is no XML.
    """
    if len(data) > _LARGEST:
        raise DataError(f"{source} has {len(data):,} bytes, more than any annotation: refused")
    try:
        text = data.decode("utf-8-sig")
        if "<!DOCTYPE" in text or "<!ENTITY" in text:
            raise DataError(f"{source} defines a document type or entities: refused, unread")
        return ET.fromstring(text)
    except (UnicodeDecodeError, ValueError, ET.ParseError) as error:
        raise DataError(f"{source} is no XML in UTF-8: {error}") from error
