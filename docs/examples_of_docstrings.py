"""Tell the site's reader of docstrings that `Example:`, as the docstrings say, is a section of examples."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Read `Example:` as griffe's `Examples:`."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change a docstring as it is found."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M)
