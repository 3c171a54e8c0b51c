"""Manifests as YAML that Kubernetes, Ray and people read alike."""

import io
import re
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString, LiteralScalarString

_AMBIGUOUS = re.compile(r"(?i:y|n|yes|no|on|off|true|false|null|~)|[-+.\d].*")
"""Strings that YAML 1.1, which Kubernetes and Ray read, takes for something else."""


def dump_manifests(documents: list[dict[str, Any]]) -> str:
    """The documents one after the other, in their trees' order; no anchors."""
    yaml = YAML()
    yaml.width = 100
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.ignore_aliases = lambda data: True
    stream = io.StringIO()
    yaml.dump_all([_with_styles(document) for document in documents], stream)
    return stream.getvalue()


def _with_styles(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _with_styles(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_with_styles(value) for value in node]
    if isinstance(node, str) and "\n" in node:
        return LiteralScalarString(node)
    if isinstance(node, str) and _AMBIGUOUS.fullmatch(node):
        return DoubleQuotedScalarString(node)
    return node
