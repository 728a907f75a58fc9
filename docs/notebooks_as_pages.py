"""Make every notebook a page of the site: text, code and what the code showed, as Markdown whose links are checked."""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put a page and its pictures in the place of each notebook, when mkdocs has found its files."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        stem = file.src_uri.removesuffix(".ipynb")
        pictures: dict[str, bytes] = {}
        cells = json.loads(Path(file.abs_src_path).read_text(encoding="utf-8"))["cells"]
        text = "\n\n".join(part for cell in cells for part in parts(cell, Path(stem).name, pictures))
        files.remove(file)
        files.append(File.generated(config, f"{stem}.md", content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, f"{Path(stem).parent.as_posix()}/{name}", content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead links to notebooks to their pages."""
    return re.sub(r"(\]\([\w./]*)\.ipynb\)", r"\1.md)", markdown)


def parts(cell: dict[str, Any], stem: str, pictures: dict[str, bytes]) -> Iterator[str]:
    """Yield a cell and its outputs as Markdown, and add its pictures to those of the page, by file name."""
    source = "".join(cell["source"])
    yield source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```"
    for output in cell.get("outputs", ()):
        data = output.get("data", {})
        if "image/png" in data:
            name = f"{stem}-{len(pictures)}.png"
            pictures[name] = base64.b64decode(data["image/png"])
            yield f"![output]({name})"
        elif "text/html" in data:
            yield "".join(data["text/html"])
        else:
            yield f"```text\n{''.join(output.get('text') or data['text/plain']).rstrip()}\n```"
