"""YAML of strangers, read as data: no code, no aliases, each name once."""

from typing import Any

import yaml


class NotPlainYAML(ValueError):
    """A text that cannot be read; the message says why."""


class Loader(yaml.SafeLoader):
    """Plain data only, each name once; no aliases, of which a few lines could make gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"an alias (*{self.peek_event().anchor}) is not allowed: write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        content = super().construct_mapping(node, deep)
        if len(content) < len(node.value):
            names = [self.construct_object(key) for key, _ in node.value]
            twice = next(name for name in names if names.count(name) > 1)
            raise yaml.YAMLError(f"{twice!r} stands twice in one mapping, at line {node.start_mark.line + 1}")
        return content


def load_yaml(text: str) -> Any:
    """YAML as data.

    Raises:
        NotPlainYAML: for anything that is not plain YAML, with the reason.
    """
    try:
        return yaml.load(text, Loader)
    except RecursionError as error:
        raise NotPlainYAML("it cannot be read as YAML: it is nested too deeply") from error
    # ValueError, TypeError, ...: what dates that do not exist, numbers of a million digits and the like raise.
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, AttributeError, LookupError) as error:
        raise NotPlainYAML(f"it cannot be read as YAML: {error}") from error
