"""YAML of strangers, read as data: no code, no aliases, each name once, numbers as people read them."""

import re
from typing import Any

import yaml


class NotPlainYAML(ValueError):
    """A text that cannot be read; the message says why."""


class Loader(yaml.SafeLoader):
    """Plain data only, each name once; no aliases, of which a few lines could make gigabytes.

    Of YAML 1.1's readings that surprise, those of numbers are refused (``construct_yaml_int``), and yes, no,
    on and off are text, as in YAML 1.2.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(
                f"an alias (*{self.peek_event().anchor}) is not allowed: write the value out"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        content = super().construct_mapping(node, deep)
        if len(content) < len(node.value):
            names = [self.construct_object(key) for key, _ in node.value]
            twice = next(name for name in names if names.count(name) > 1)
            raise yaml.YAMLError(f"{twice!r} stands twice in one mapping, at line {node.start_mark.line + 1}")
        return content

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A whole number; YAMLError for one that YAML 1.1 would take for octal or for base 60, or that is
        none in 1.1.
        """
        self._refuse_surprise(node)
        return super().construct_yaml_int(node)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        """A number; YAMLError as ``construct_yaml_int``."""
        self._refuse_surprise(node)
        return super().construct_yaml_float(node)

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        """Text; YAMLError for an octal number as YAML 1.2 writes it, which 1.1 does not know."""
        if node.style is None and OCTAL_OF_1_2.fullmatch(node.value):
            self._refuse(node, "an octal number")
        return super().construct_yaml_str(node)

    def _refuse_surprise(self, node: yaml.ScalarNode) -> None:
        if ":" in node.value:
            self._refuse(node, "a number to base 60")
        if LEADING_ZERO.match(node.value):
            self._refuse(node, "an octal number")

    def _refuse(self, node: yaml.ScalarNode, meaning: str) -> None:
        raise yaml.YAMLError(
            f"{node.value} at line {node.start_mark.line + 1} could mean {meaning}: write a decimal "
            f"number without leading zeros, or text in quotes"
        )


LEADING_ZERO = re.compile(r"[-+]?0_*[0-9]")  # 010 is 8 in YAML 1.1 and 10 in 1.2
OCTAL_OF_1_2 = re.compile(r"[-+]?0o[0-7_]+")
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
Loader.add_constructor("tag:yaml.org,2002:float", Loader.construct_yaml_float)
Loader.add_constructor("tag:yaml.org,2002:str", Loader.construct_yaml_str)
# Only true and false are truth values, as in YAML 1.2: "no" may be somebody's folder or class.
Loader.yaml_implicit_resolvers = {
    first: [
        (tag, re.compile(r"true|True|TRUE|false|False|FALSE") if tag == "tag:yaml.org,2002:bool" else pattern)
        for tag, pattern in resolvers
        if tag != "tag:yaml.org,2002:bool" or first in "tTfF"
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_yaml(text: str) -> Any:
    """YAML as data.

    Raises:
        NotPlainYAML: for anything that is not plain YAML, with the reason.
    """
    try:
        return yaml.load(text, Loader)
    except RecursionError as error:
        raise NotPlainYAML("it cannot be read as YAML: it is nested too deeply") from error
    # ValueError, TypeError, ...: of dates that do not exist, numbers of a million digits and the like.
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, AttributeError, LookupError) as error:
        raise NotPlainYAML(f"it cannot be read as YAML: {error}") from error
