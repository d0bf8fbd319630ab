"""Addresses without what is secret in them: what may be written into ledgers, logs and outputs.

A signed URL carries its key in the query, an address of a server may carry a password. Both are needed to open a scene
and must not outlive that; credentials otherwise come from the environment, where GDAL finds them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import parse_qsl, urlencode

_NAMES = {"id", "file", "filename", "name", "path", "product", "scene", "item", "version", "versionid"}
"""Parameters of a query that say which scene is meant. All others may be part of a signature."""

_USER = re.compile(r"(?<=://)[^/@\s]+@")
# The query of an address goes as a whole: what a signature is called differs from store to store. Quotes, brackets and
# blanks end it; so does a colon before a blank, with which messages go on.
_QUERY = re.compile(r"(?<=[^\s?'\"()<>])\?[\w.%-]+=[^\s'\"()<>]*?(?=[:;,.]?(?:[\s'\"()<>]|$))")
# GDAL takes some of its settings, tokens among them, between a virtual file system's name and the address.
_INSIDE = re.compile(r"(/vsi\w+)\?[^\s'\"()<>]*?url=([^\s&'\"()<>]+)[^\s'\"()<>]*", re.I)


def bare(address: str) -> str:
    """An address without user, password and query, but for what in the query names the scene; a path on disk as it is.

    `https://a/b.tif?X-Amz-Signature=...` becomes `https://a/b.tif`, `https://a/get?id=7&token=...` becomes
    `https://a/get?id=7`, `s3://a/b.tif` stays.
    """
    if "://" not in address and not address.startswith("/vsi"):
        return address
    text = _USER.sub("", _INSIDE.sub(r"\1/\2", address))
    head, _, query = text.partition("#")[0].partition("?")
    kept = [(name, value) for name, value in parse_qsl(query) if name.lower() in _NAMES]
    return f"{head}?{urlencode(kept)}" if kept else head


def scrub(text: str, secrets: Mapping[str, str] | None = None) -> str:
    """A message without what is secret in the addresses that it names.

    `secrets` maps addresses as opened to what may be shown of them; others are found by their look.
    """
    for opened, shown in (secrets or {}).items():
        text = text.replace(opened, shown)
    return _QUERY.sub("", _USER.sub("", _INSIDE.sub(r"\1/\2", text)))
