"""YAML of strangers, read as data: no code, no aliases, each name once, numbers as people read them."""

import re
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """Plain data only, each name once and text; no aliases, of which a few lines could make gigabytes.

    Of YAML 1.1's readings that surprise, those of numbers are refused, and yes, no, on and off are text, as
    in YAML 1.2.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(
                f"an alias (*{self.peek_event().anchor}) is not allowed: write the value out"
            )
        node = super().compose_node(parent, index)
        line = f"at line {node.start_mark.line + 1}"
        if isinstance(node, yaml.ScalarNode) and node.style is None and SURPRISING.fullmatch(node.value):
            raise yaml.YAMLError(
                f"{node.value} {line} could mean an octal number or one to base 60: write a decimal number "
                f"without leading zeros, or text in quotes"
            )
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, _ in node.value:
                if key.tag != TEXT:
                    raise yaml.YAMLError(f"the name {key.value!r} {line} must be text: put it in quotes")
                if key.value in seen:
                    raise yaml.YAMLError(f"{key.value!r} stands twice in one mapping, {line}")
                seen.add(key.value)
        return node


TEXT, TRUTH = "tag:yaml.org,2002:str", "tag:yaml.org,2002:bool"
# 010 is 8 in YAML 1.1 and 10 in 1.2, 0o10 is text and 8, 1:30 is 90 and text
SURPRISING = re.compile(r"[-+]?(0_*[0-9][0-9_.]*|0o[0-7_]+|[1-9][0-9_]*(:[0-9]+)+(\.[0-9_]*)?)")
# Only true and false are truth values, as in YAML 1.2: "no" may be somebody's folder or class.
Loader.yaml_implicit_resolvers = {
    first: [
        (tag, re.compile(r"true|True|TRUE|false|False|FALSE") if tag == TRUTH else pattern)
        for tag, pattern in resolvers
        if tag != TRUTH or first in "tTfF"
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_yaml(text: str) -> Any:
    """YAML as data.

    Raises:
        ValueError: for anything that is not plain YAML, with the reason.
    """
    try:
        return yaml.load(text, Loader)
    except (
        yaml.YAMLError,
        ValueError,  # of dates that do not exist, numbers of a million digits and the like
        TypeError,
        OverflowError,
        AttributeError,
        LookupError,
        RecursionError,
    ) as error:
        raise ValueError(f"it cannot be read as YAML: {error}") from error
